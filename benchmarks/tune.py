"""Times the launch configurations of the Triton kernels, and writes the winners to the package.

    python benchmarks/tune.py [--device cuda] [--budget SECONDS] [--output FILE] [--dry-run]

Each kernel is timed through the op that uses it, all of its configurations in turns; the least
geometric mean over the shapes wins. The entries of other architectures in the file are kept. On CPU
(TRITON_INTERPRET=1) nothing that it finds means anything: that is a rehearsal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdkd import ops, records
from tdkd.benchmark.cases import DEVICES, Case, Inputs, make_inputs
from tdkd.benchmark.measure import Clock, order, reason
from tdkd.benchmark.report import aligned
from tdkd.errors import UserError
from tdkd.kernels import tuning
from tdkd.kernels.student_rows import student_rows
from tdkd.kernels.tuning import Config
from tdkd.testing import interpreted
from tdkd.types import Scale

SHAPES = ((8192, 151_936, "bfloat16"), (2048, 151_936, "float32"))
Runs = dict[str, Callable[[], Any]]


class Timed(NamedTuple):
    """One kernel at one shape."""

    kernel: str
    case: Case
    seconds: dict[Config, float]
    """medians; a configuration that failed is not there."""


def calls_of(inputs: Inputs, k: int) -> Runs:
    """What is called to time each kernel."""
    logits = inputs.main
    student = logits.detach().requires_grad_()
    ids = logits.topk(min(k, logits.shape[-1])).indices.int()
    state = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)

    def forward() -> tuple[Tensor, ...]:
        return student_rows(student, ids, Scale(), state=state)

    results = forward()
    grads = [torch.randn_like(result) for result in results]
    return {
        "select_stream": lambda: ops.select_actions(logits, k, impl="fused"),
        "student_stream": forward,
        "student_grad": lambda: torch.autograd.grad(results, student, grads, retain_graph=True),
    }


def time_kernel(
    kernel: str, call: Callable[[], Any], inputs: Inputs, clock: Clock, rounds: int
) -> dict[Config, float]:
    """Median seconds of each configuration; one that fails is passed over."""
    times: dict[Config, list[float]] = {}

    def start(choice: Config) -> Callable[[], float]:
        with tuning.override(kernel, choice):
            return clock.start(lambda _: call(), inputs)

    for choice in tuning.CHOICES[kernel]:
        try:
            start(choice)
            clock.synchronize()
        except Exception as error:  # too much shared memory, say: the others go on
            print(f"{kernel}: {name_of(choice)} is passed over: {reason(error)}")
        else:
            times[choice] = []
    choices = list(times)
    for turn in range(rounds):
        started = [(choices[i], start(choices[i])) for i in order(turn, len(choices))]
        clock.synchronize()
        for choice, seconds in started:
            times[choice].append(seconds())
    return {choice: statistics.median(seconds) for choice, seconds in times.items()}


def winner(timed: list[Timed]) -> Config | None:
    """The configuration with the least geometric mean over the shapes that all of them saw."""
    if not timed:
        return None
    first, *others = (set(one.seconds) for one in timed)
    common = first.intersection(*others)
    if not common:
        return None
    return min(common, key=lambda choice: sum(math.log(one.seconds[choice]) for one in timed))


def name_of(choice: Config) -> str:
    return f"block {choice.block}, {choice.num_warps} warps, {choice.num_stages} stages"


def table(kernel: str, timed: list[Timed], best: Config | None) -> list[str]:
    """Milliseconds of every configuration, and who won."""
    shapes = [f"{one.case.rows} x {one.case.vocab} {one.case.dtype}, ms" for one in timed]
    rows = [[kernel, *shapes, ""]]
    for choice in tuning.CHOICES[kernel]:
        seconds = [one.seconds.get(choice) for one in timed]
        shown = ["" if s is None else f"{s * 1e3:.4g}" for s in seconds]
        rows.append([name_of(choice), *shown, "wins" if choice == best else ""])
    return aligned(rows)


def merged(path: Path, architecture: str, winners: dict[str, Config]) -> dict[str, Any]:
    """The table in ``path`` with these entries of one architecture."""
    found = json.loads(path.read_text()) if path.exists() else {}
    entry = {kernel: choice._asdict() for kernel, choice in winners.items()}
    return {**found, architecture: {**found.get(architecture, {}), **entry}}


def tune(options: argparse.Namespace) -> None:
    """Times, prints, writes."""
    if options.device not in DEVICES:
        raise UserError(f"device: expected one of {', '.join(DEVICES)}, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected cpu, for torch sees no GPU here, got cuda")
    late = math.inf if options.budget is None else time.monotonic() + options.budget
    clock = Clock(options.device)
    timed: dict[str, list[Timed]] = {kernel: [] for kernel in tuning.CHOICES}
    for rows, vocab, dtype in SHAPES:
        case = Case(
            "select_actions",
            options.rows or rows,
            options.vocab or vocab,
            options.k,
            dtype=dtype,
            device=options.device,
        )
        inputs = make_inputs(case)[0]
        for kernel, call in calls_of(inputs, case.k).items():
            if time.monotonic() >= late:
                print(f"{kernel}: {rows} x {vocab} {dtype} is left out by --budget")
                continue
            seconds = time_kernel(kernel, call, inputs, clock, options.rounds)
            if seconds:
                timed[kernel].append(Timed(kernel, case, seconds))
    winners = {}
    for kernel, found in timed.items():
        best = winner(found)
        print("\n".join(table(kernel, found, best)), end="\n\n")
        if best is not None:
            winners[kernel] = best
    if not winners:
        raise UserError("configurations: expected one that runs, got none")
    output = options.output or (tuning.TABLE if options.device == "cuda" else None)
    if options.dry_run or output is None:
        print("nothing is written")
        return
    path = Path(output)
    records.check_directory(path.parent, "output")
    records.write_whole(
        path, merged(path, tuning.architecture(torch.device(options.device)), winners)
    )
    print(f"written to {path.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--rows", type=int, help="in place of those of both shapes")
    parser.add_argument("--vocab", type=int, help="likewise")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="times of each configuration")
    parser.add_argument("--budget", type=float, help="seconds after which no kernel begins")
    parser.add_argument("--output", help="the table in the package without it; none on CPU")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    try:
        with interpreted() if options.device == "cpu" else contextlib.nullcontext():
            tune(options)
    except UserError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
