"""One run of ``tdkd bench``, from its options to its files, without a word to a terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tdkd import records
from tdkd.benchmark import report
from tdkd.benchmark.cases import Case, choose
from tdkd.benchmark.measure import ROUNDS, measure
from tdkd.benchmark.rivals import rivals_of
from tdkd.errors import UserError


class Options(NamedTuple):
    """The options of ``tdkd bench``; an empty sequence or None leaves a choice to the suite."""

    suite: str = "quick"
    op: str | None = None
    vocab: Sequence[int] = ()
    rows: int | None = None
    k: Sequence[int] = ()
    dtype: Sequence[str] = ()
    logits: Sequence[str] = ()
    sets: Sequence[str] = ()
    rounds: int | None = None
    threads: int | None = None
    output: str = "benchmarks/results"
    name: str | None = None
    compile: bool = True
    device: str = "cpu"
    budget: float | None = None
    """seconds after which no new case begins."""


class Done(NamedTuple):
    """What a run leaves."""

    measured: list[report.Measured]
    left_out: list[Case]
    files: list[Path]
    missing: str | None
    """package without which there is no picture."""


def run(options: Options, tell: Callable[[int, int, str], None]) -> Done:
    """Measures, and writes the JSON anew after every case.

    Args:
        options: what to measure.
        tell: hears cases done, cases in all, and what is measured next.
    Raises:
        UserError: an option is wrong.
    """
    changed = {
        "vocab": options.vocab,
        "rows": [] if options.rows is None else [options.rows],
        "k": options.k,
        "dtype": options.dtype,
        "logits": options.logits,
        "sets": options.sets,
    }
    cases = choose(options.suite, options.op, device=options.device, **changed)
    for option in ("rounds", "threads"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"{option}: expected a number >= 1, got {value}")
    if options.budget is not None and not options.budget > 0:
        raise UserError(f"budget: expected seconds > 0, got {options.budget:g}")
    name = options.name
    if name is None:
        # a part of a suite does not take the place of the whole
        part = options.op or any(changed.values()) or options.budget is not None
        name = f"{options.suite}-part" if part else options.suite
    elif not name or name != Path(name).name:
        raise UserError(f"name: expected a file name without extension, got {name}")
    directory = Path(options.output)
    records.check_directory(directory, "output")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would talk into the progress bar

    files = [directory / f"{name}.json", directory / f"{name}.png"]
    rounds = options.rounds or ROUNDS[options.device]
    before = torch.get_num_threads()
    began = time.monotonic()
    measured: list[report.Measured] = []
    missing = None
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        while True:
            left = cases[len(measured) :]
            late = options.budget is not None and time.monotonic() - began >= options.budget
            written = report.content(
                options.suite, options.device, torch.get_num_threads(), rounds, measured, left
            )
            records.write_whole(files[0], written)
            if not left or late:
                break
            case = left[0]

            def next_rival(rival: str, case: Case = case) -> None:
                tell(len(measured), len(cases), f"{case}: {rival}")

            results = measure(
                case, rivals_of(case), rounds=rounds, compile=options.compile, tell=next_rival
            )
            measured.append(report.Measured(case, results))
            tell(len(measured), len(cases), str(case))
    finally:
        torch.set_num_threads(before)
    try:
        if not report.write_picture(files[1], written):
            del files[1]
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        del files[1]
    return Done(measured, left, files, missing)


def closing(done: Done) -> list[str]:
    """What there is to say at the end of a run."""
    lines = []
    if done.left_out:
        lines.append(f"left out by --budget: {'; '.join(map(str, done.left_out))}")
    if done.missing is not None:
        lines.append(f'no picture: {done.missing} is missing: pip install "tdkd[train]"')
    return [*lines, f"written to {' and '.join(map(str, done.files))}"]
