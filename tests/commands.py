"""The command in this process, and the faults that a machine puts in its way."""

import contextlib
import ctypes
import os
import resource
import sys

import pytest

from tdkd.cli import main


def call(monkeypatch, capsys, *args):
    """Exit code and stderr of ``tdkd args`` in this process."""
    monkeypatch.setattr(sys, "argv", ["tdkd", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, capsys.readouterr().err


def one_line(error):
    assert "Traceback" not in error
    # transformers' bar over the weights may stand before it
    *bars, line = error.strip().splitlines()
    assert all("Loading weights" in bar for bar in bars if bar)
    assert line.startswith("tdkd: ")
    return line


def contents(folder):
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def room_for(size):
    """No file of this process grows beyond ``size`` bytes.

    The kernel enforces it for Python, C++ and Rust alike, for root too and without a mount: a write
    is taken in part up to the limit, and the next one fails (EFBIG in place of ENOSPC).
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def bound_by_modes():
    """Modes of files bind this thread, even where it is root's.

    Root's way past them is a pair of capabilities (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), which a
    thread may put down and take up again.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high ones
    if libc.capget(header, sets):
        pytest.skip("root whose capabilities cannot be read: modes bind nobody here")
    before = sets[0]
    sets[0] = before & ~0b110
    if libc.capset(header, sets):
        pytest.skip("root whose capabilities cannot be put down: modes bind nobody here")
    try:
        yield
    finally:
        sets[0] = before
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")
