"""tdkd bench: time and memory of the ops against what else one could call."""

from __future__ import annotations

from tdkd.benchmark import report
from tdkd.benchmark import run as benchmark
from tdkd.cli.console import console, progress_bar


def run(options: benchmark.Options) -> None:
    """The command, with a bar of its progress."""
    with progress_bar() as progress:
        task = progress.add_task("bench")

        def tell(count: int, total: int, what: str) -> None:
            progress.update(task, completed=count, total=total, description=what)

        done = benchmark.run(options, tell)
    for measured in done.measured:
        print(report.table(measured))
    for line in benchmark.closing(done):
        console.print(line, markup=False, soft_wrap=True)
