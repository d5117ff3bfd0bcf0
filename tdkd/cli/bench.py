"""tdkd bench: time and memory of the ops against what else one could call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from tdkd.benchmark import report
from tdkd.benchmark.cases import Case, choose
from tdkd.benchmark.measure import measure
from tdkd.benchmark.rivals import RIVALS
from tdkd.cli.console import console, progress_bar
from tdkd.errors import UserError


def run(
    *,
    suite: str,
    op: str | None,
    vocab: Sequence[int],
    rows: int | None,
    k: Sequence[int],
    dtype: Sequence[str],
    logits: Sequence[str],
    rounds: int,
    threads: int | None,
    output: str,
    name: str | None,
    compile: bool,
) -> None:
    """The command; every argument is an option of ``tdkd bench``."""
    changed = {
        "vocab": vocab,
        "rows": [] if rows is None else [rows],
        "k": k,
        "dtype": dtype,
        "logits": logits,
    }
    cases = choose(suite, op, **changed)
    for option, value in (("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{option}: expected a number >= 1, got {value}")
    if name is None:
        # a part of a suite does not take the place of the whole
        name = f"{suite}-part" if op or any(changed.values()) else suite
    elif not name or name != Path(name).name:
        raise UserError(f"name: expected a file name without extension, got {name}")
    directory = Path(output)
    report.make_directory(directory)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would talk into the progress bar

    before = torch.get_num_threads()
    measured = []
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        used = torch.get_num_threads()
        with progress_bar() as progress:
            task = progress.add_task("bench", total=len(cases))
            for case in cases:
                results = measure(
                    case,
                    RIVALS[case.op],
                    rounds=rounds,
                    compile=compile,
                    tell=partial(_tell, progress, task, case),
                )
                measured.append(report.Measured(case, results))
                progress.advance(task)
    finally:
        torch.set_num_threads(before)

    stdout = Console()
    for done in measured:
        stdout.print(report.table(done))
    written = report.content(suite, used, rounds, measured)
    files = [directory / f"{name}.json", directory / f"{name}.png"]
    report.write_json(files[0], written)
    try:
        report.write_picture(files[1], written)
    except ModuleNotFoundError as error:
        del files[1]
        missing = (error.name or "").split(".")[0]
        console.print(f'no picture: {missing} is missing: pip install "tdkd[train]"', markup=False)
    console.print(f"written to {' and '.join(map(str, files))}", markup=False, soft_wrap=True)


def _tell(progress: Progress, task: TaskID, case: Case, rival: str) -> None:
    progress.update(task, description=f"{case}: {rival}")
