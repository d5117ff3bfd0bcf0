"""tdkd verify: whether the kernels of this machine do what the reference says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from tdkd import verify
from tdkd.benchmark.report import environment, write_json
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
) -> int:
    """The command; 1 where something failed."""
    if cases is not None and cases < 1:
        raise UserError(f"cases: expected a number >= 1, got {cases}")
    count = verify.CASES["full" if full else "quick"] if cases is None else cases
    wanted, dtypes = op or list(verify.SUBJECTS), dtype or list(verify.DTYPES)
    findings = []
    with progress_bar() as progress:
        task = progress.add_task("verify", total=len(wanted) * len(dtypes))
        drawn = verify.verify(
            device=device,
            ops_=wanted,
            dtypes=dtypes,
            cases=count,
            seed=seed,
            tell=lambda what: progress.update(task, description=what),
        )
        for finding in drawn:
            findings.append(finding)
            progress.advance(task)
    if not op and not dtype:
        for source in (verify.memory_findings, verify.graph_findings, verify.raw_findings):
            with console.status(source.__name__.split("_")[0]):
                findings += source(device)
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
        if found.dtype in verify.DTYPES:
            number = found.failures[0].split(":")[0].removeprefix("seed ")
            console.print(
                f"  again: tdkd verify --op {found.op} --dtype {found.dtype} --device {device} "
                f"--seed {number} --cases 1",
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
        write_json(Path(output), content)
    total = sum(found.cases for found in findings)
    console.print(f"{total} cases, {len(failed)} of {len(findings)} lines failed")
    return 1 if failed else 0
