"""tdkd verify: whether the kernels of this machine, or an objective, do what they must."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from tdkd import records, verify, verify_objective
from tdkd.benchmark.report import environment
from tdkd.cli.console import console, progress_bar
from tdkd.errors import UserError


def run(
    *,
    device: str,
    dtype: list[str],
    op: list[str],
    cases: int | None,
    full: bool,
    seed: int,
    output: str | None,
    objective: str | None = None,
) -> int:
    """The command; 1 where something failed."""
    if cases is not None and cases < 1:
        raise UserError(f"cases: expected a number >= 1, got {cases}")
    count = verify.CASES["full" if full else "quick"] if cases is None else cases
    if objective is None:
        findings = _of_ops(device, op, dtype, count, seed)
    elif op or dtype:
        raise UserError("objective: expected neither op nor dtype beside it, got one")
    else:
        findings = _of_objective(objective, device, count, seed)
    table = Table(title=f"tdkd verify, {findings[0].backend}, torch {torch.__version__}")
    for column in ("op", "dtype", "cases", "worst / allowed", ""):
        table.add_column(column)
    for found in findings:
        verdict = "pass" if found.passed else "[red]FAIL[/red]"
        judged = found.dtype in verify.DTYPES or found.dtype == "memory"
        worst = f"{found.worst:.3f}" if judged else ""
        table.add_row(found.op, found.dtype, str(found.cases), worst, verdict)
    console.print(table)
    failed = [found for found in findings if not found.passed]
    for found in failed:
        for failure in found.failures[:3]:
            console.print(f"{found.op} {found.dtype}: {failure}", markup=False, soft_wrap=True)
        if objective is not None or found.dtype in verify.DTYPES:
            number = found.failures[0].split(":")[0].removeprefix("seed ")
            what = f"--op {found.op} --dtype {found.dtype}"
            if objective is not None:
                what = f"--objective {shlex.quote(objective)}"
            console.print(
                f"  again: tdkd verify {what} --device {device} --seed {number} --cases 1",
                markup=False,
                soft_wrap=True,
            )
    content = {
        **environment(device),
        "device": device,
        "seed": seed,
        "findings": [{**asdict(found), "passed": found.passed} for found in findings],
    }
    if output == "-":
        print(json.dumps(content, indent=2))
    elif output is not None:
        records.write_whole(Path(output), content)
    total = sum(found.cases for found in findings)
    console.print(f"{total} cases, {len(failed)} of {len(findings)} lines failed")
    return 1 if failed else 0


def _of_ops(
    device: str, op: list[str], dtype: list[str], cases: int, seed: int
) -> list[verify.Finding]:
    wanted, dtypes = op or list(verify.SUBJECTS), dtype or list(verify.DTYPES)
    with progress_bar() as progress:
        task = progress.add_task("verify", total=len(wanted) * len(dtypes))
        drawn = verify.verify(
            device=device,
            ops_=wanted,
            dtypes=dtypes,
            cases=cases,
            seed=seed,
            tell=lambda what: progress.update(task, description=what),
        )
        findings = _advancing(drawn, lambda: progress.advance(task))
    if not op and not dtype:
        for source in (verify.memory_findings, verify.graph_findings, verify.raw_findings):
            with console.status(source.__name__.split("_")[0]):
                findings += source(device)
    return findings


def _of_objective(spec: str, device: str, cases: int, seed: int) -> list[verify.Finding]:
    # the console script does not look where its user is
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    objective = verify_objective.load(spec)
    with progress_bar() as progress:
        task = progress.add_task("verify", total=len(verify_objective.QUESTIONS))
        drawn = verify_objective.verify_objective(
            objective,
            name=spec.partition(":")[2] or spec,
            device=device,
            cases=cases,
            seed=seed,
            tell=lambda what: progress.update(task, description=what),
        )
        return _advancing(drawn, lambda: progress.advance(task))


def _advancing(
    drawn: Iterator[verify.Finding], advance: Callable[[], None]
) -> list[verify.Finding]:
    findings = []
    for finding in drawn:
        findings.append(finding)
        advance()
    return findings
