"""Folders that appear whole or not at all, and what is wrong with a checkpoint that is not whole.

A folder is written in ``.tdkd-unfinished`` beside its place, brought to disk, and renamed. A
process that dies leaves ``.tdkd-unfinished`` behind, which the next run clears.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tdkd.errors import UserError, missing

try:
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise missing(error) from error

UNFINISHED = ".tdkd-unfinished"
BEFORE = "before-"
STATE = "trainer_state.json"
# what a run in one process needs to go on as if nothing had happened
NEEDED = (STATE, "*model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")

_NAME = re.compile(r"checkpoint-(\d+)")
# torch's writer has no exception of its own for a disk that takes no more
_WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos|iostream")


def clear(output: Path) -> None:
    """Removes what a process that died was writing; puts back what it was about to replace."""
    staging = output / UNFINISHED
    for before in staging.glob(f"{BEFORE}*"):
        place = output / before.name.removeprefix(BEFORE)
        if not place.exists():
            os.replace(before, place)
    if staging.exists():
        shutil.rmtree(staging)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Nothing half-written is left where the disk takes no more, and the error is one line.

    Raises:
        UserError: in place of the error of whatever wrote.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _WRITER.search(str(error)):
            raise
        clear(output)
        raise UserError(
            f"output_dir: expected to write to {output}, got {_first_line(error)}"
        ) from error


def publish(output: Path, name: str) -> None:
    """Moves ``.tdkd-unfinished/<name>`` to its place; what is there already goes when the new one
    is."""
    staging = output / UNFINISHED
    for path in staging.rglob("*"):
        _to_disk(path)
    if (output / name).exists():
        os.replace(output / name, staging / (BEFORE + name))
    os.replace(staging / name, output / name)
    _to_disk(output)
    shutil.rmtree(staging)


def discard(output: Path, name: str) -> None:
    """Removes a folder by way of ``.tdkd-unfinished``: no part of it stays under its name."""
    staging = output / UNFINISHED
    staging.mkdir(exist_ok=True)
    os.replace(output / name, staging / name)
    shutil.rmtree(staging)


def rotate(output: Path, limit: int | None, keep: Iterable[str]) -> None:
    """Discards the oldest checkpoints beyond ``limit``, but none of ``keep``."""
    if limit is None or limit < 1:
        return
    names = sorted(_names(output), key=lambda name: ((output / name).stat().st_mtime, _step(name)))
    spared = {name for name in names if name in set(keep)}
    excess = len(names) - max(limit, len(spared))
    for name in [name for name in names if name not in spared][: max(0, excess)]:
        discard(output, name)


def set_aside(output: Path, beside: Iterable[str] = ()) -> Path | None:
    """Moves all checkpoints to a folder ``earlier-<n>``, and tells which, if there are any: what
    starts afresh must not be resumed from what went further before it. Files ``beside`` them
    follow."""
    names = _names(output)
    if not names:
        return None
    place = next(p for p in (output / f"earlier-{n}" for n in count(1)) if not p.exists())
    place.mkdir()
    for name in [*sorted(names, key=_step, reverse=True), *beside]:
        if (output / name).exists():
            os.replace(output / name, place / name)
    return place


def last(output: Path) -> Path | None:
    """The checkpoint of the highest step."""
    names = _names(output)
    return output / max(names, key=_step) if names else None


def step(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return _step(path.name)


def check(path: Path, needed: Iterable[str] = NEEDED) -> None:
    """Refuses a checkpoint that is not whole.

    Args:
        path: its folder.
        needed: files that must be there, as patterns.
    Raises:
        UserError: a file is missing, or cut short, or is not what its name says.
    """
    damage = _damage(path, needed)
    if damage is None:
        return
    others = [name for name in _names(path.parent) if _step(name) < _step(path.name)]
    then = f"go on from {max(others, key=_step)}" if others else "start afresh"
    raise UserError(
        f"output_dir: expected a whole checkpoint in {path}, got {damage}; move it away to {then}"
    )


def _damage(path: Path, needed: Iterable[str]) -> str | None:
    for name in needed:
        if not any(path.rglob(name)):
            return f"no {name}"
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                shards = content.get("weight_map", {}) if isinstance(content, dict) else {}
                for shard in shards.values():
                    if not (file.parent / shard).is_file():
                        return f"no {shard}, which {name} names"
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # compares the header with the size
                    pass
            elif file.suffix in (".pt", ".pth") or file.match("training_args.bin"):
                zipfile.ZipFile(file).close()  # the directory of a zip is at its end
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name} that cannot be read ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _names(output: Path) -> list[str]:
    return [p.name for p in output.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _to_disk(path: Path) -> None:
    if os.name == "nt":  # which does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
