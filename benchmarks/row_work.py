"""What the row work of each objective, [N, k] in PyTorch, costs within a step of linear_td_loss.

    python benchmarks/row_work.py [--json FILE]

A step is forward and backward of the student's side on the action sets of a real teacher
(`tdkd/benchmark/sets.npz`), log Z over all columns (exact) or from the batch vocabulary (batch).
The row work is what the step does of it, called by itself on values of the same shape: chunk by
chunk with its gradient, and once more for the terms, where gradients are made in forward; once with
one backward elsewhere. They take turns; medians. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkd import ops
from tdkd.benchmark.cases import Case
from tdkd.benchmark.linear import Student, make_student
from tdkd.benchmark.report import environment
from tdkd.kernels import head, routes
from tdkd.kernels.linear_rows import in_forward
from tdkd.objectives import Objective, parse
from tdkd.td_rows import TDRows

OBJECTIVES = (
    "ForwardKL(tail=True)",
    "ReverseKL(tail=True)",
    "JSD(tail=True)",
    "SkewKL(tail=True)",
    "TotalVariation(tail=True)",
    "LK(tail=True)",
    "LK('hybrid', tail=True)",
    "CrossEntropy(tail=True)",
    "IQLearn()",
    "IQLearn('js', alpha=1.0, expectation='teacher')",
    "IQLearn(alpha=1.0, value='initial')",
    "LSIQ()",
    "SQIL()",
    "SoftTD()",
    "SoftTD(3)",
    "SoftTD(lam=0.9)",
    "ForwardKL(tail=True) + 0.05 * IQLearn(alpha=2.0, stop_gradient='next')",
)
EXTRA = 1024
"""Columns that a batch vocabulary samples."""
ANSWER = 96
"""Rows of a response."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2048), ("vocab", 49_152), ("hidden", 576), ("k", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    case = Case("linear_td_loss", options.rows, options.vocab, k=options.k, hidden=options.hidden)
    measured = measure(make_student(case), options.rounds)
    print("| objective | exact, ms | row work, ms | share | batch, ms | row work, ms | share |")
    print("|---|---|---|---|---|---|---|")
    for text, of_text in measured.items():
        cells = []
        for normaliser in ("exact", "batch"):
            step, work = (1e3 * seconds for seconds in of_text[normaliser])
            cells += [f"{step:.1f}", f"{work:.1f}", f"{work / step:.1%}"]
        print(f"| `{text}` | {' | '.join(cells)} |")
    if options.json:
        content = {**environment("cpu"), "case": case._asdict(), "seconds": measured}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def measure(student: Student, rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds of a step and of the row work in it, by objective and normaliser."""
    successor = torch.arange(1, student.tokens.numel() + 1)
    successor[ANSWER - 1 :: ANSWER] = -1
    successor[-1] = -1
    runs: dict[tuple[str, str], tuple[Callable[[], object], Callable[[], object]]] = {}
    for text in OBJECTIVES:
        objective = parse(text)
        for normaliser in ("exact", "batch"):
            runs[text, normaliser] = (
                step(student, objective, successor, normaliser),
                row_work(student, objective, successor, normaliser),
            )
    times: dict[tuple[str, str], list[list[float]]] = {key: [[], []] for key in runs}
    for number in range(rounds + 1):  # the first does not count
        for key, pair in runs.items():
            for kept, run in zip(times[key], pair, strict=True):
                start = time.perf_counter()
                run()
                if number:
                    kept.append(time.perf_counter() - start)
    medians = {key: tuple(map(statistics.median, kept)) for key, kept in times.items()}
    return {text: {name: medians[text, name] for name in ("exact", "batch")} for text in OBJECTIVES}


def step(
    student: Student, objective: Objective, successor: Tensor, normaliser: str
) -> Callable[[], object]:
    """Forward and backward, gradients of hidden states and head."""
    leaves = student.hidden, student.weight

    def run() -> object:
        out = ops.linear_td_loss(
            *leaves,
            student.tokens,
            actions=student.actions,
            objective=objective,
            successor=successor,
            normaliser=normaliser,  # type: ignore[arg-type]
            extra=EXTRA,
            generator=torch.Generator().manual_seed(0),
        )
        return torch.autograd.grad(out.loss, leaves)

    return run


def row_work(
    student: Student, objective: Objective, successor: Tensor, normaliser: str
) -> Callable[[], object]:
    """The part of :func:`step` that is the objective's, on values of a student."""
    ids, log_probs, _ = student.actions
    rows = TDRows.of(
        ids,
        log_probs,
        student.tokens,
        successor,
        ignore_index=-100,
        objective=objective,
        level="log_prob",
        gamma=0.99,
        soft_value=ops.soft_value,
    )
    hidden, weight = student.hidden, student.weight
    columns = weight.shape[0]
    if normaliser == "batch":
        drawn = ops.batch_vocabulary(student.actions, columns, extra=EXTRA).ids.numel()
        columns = drawn if routes.pays("cpu", drawn, columns, hidden.shape[0]) else columns
    with torch.no_grad():
        z = ops.linear_gather_q(hidden, weight, ids)
        rest = ops.linear_logsumexp(hidden, weight)
    if objective.rowwise and (linked := in_forward.links(rows, hidden, columns)) is not None:
        size = head.chunk_rows(hidden.device, columns)
        chunks = torch.arange(z.shape[0]).split(size)
        rest = rest.double()

        def in_chunks() -> object:
            made = []
            for index in chunks:
                inside = slice(int(index[0]), int(index[-1]) + 1)
                part = rows.take(index) if linked[0].numel() else rows.run(inside)
                given = z[inside], rest[inside]
                made.append(in_forward._gradients(part, index.numel(), *given, 1.0)[0])
            terms = in_forward._joined(made)
            return terms, rows.td_error(terms.q, rows.next_value(terms.value))

        return in_chunks
    leaves: Any = z.requires_grad_(), rest.requires_grad_()
    return lambda: torch.autograd.grad(rows(*leaves).loss.sum(), leaves)


if __name__ == "__main__":
    main()
