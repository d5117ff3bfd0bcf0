"""What is kept of a run: the machine, a JSON file, a picture, and tables to read."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text

import tdkd
from tdkd.benchmark.cases import Case
from tdkd.benchmark.measure import ANCHOR, Result
from tdkd.errors import UserError

SCHEMA = 1


class Measured(NamedTuple):
    """A case and its results, one a rival."""

    case: Case
    results: list[Result]


def environment() -> dict[str, Any]:
    """What a result depends on, without names of hosts or directories."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory_bytes(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tdkd": tdkd.__version__,
            "triton": _version("triton"),
            "liger_kernel": _version("liger-kernel"),
        },
        "git": _git(),
    }


def content(suite: str, threads: int, rounds: int, measured: Sequence[Measured]) -> dict[str, Any]:
    """The JSON of a run, times in seconds, sizes in bytes."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suite": suite,
        "threads": threads,
        "rounds": rounds,
        **environment(),
        "cases": [
            {**case._asdict(), "rivals": [result._asdict() for result in results]}
            for case, results in measured
        ],
    }


def make_directory(path: Path) -> None:
    """The directory of the results, or one line that says why there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: expected a directory, got {path}: {error.strerror}") from error


def write_json(path: Path, run: dict[str, Any]) -> None:
    """A JSON file that appears whole or not at all."""
    _write_whole(path, (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode())


def write_picture(path: Path, run: dict[str, Any]) -> None:
    """Bars of time in units of ``amax``, one group a case, one panel an op.

    Args:
        path: PNG to write, whole or not at all.
        run: the JSON of a run, as :func:`content` makes it.
    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    panels = {
        op: [case for case in run["cases"] if case["op"] == op]
        for op in dict.fromkeys(case["op"] for case in run["cases"])
    }
    heights = [sum(1 + len(_bars(case)) for case in cases) for cases in panels.values()]
    names = list(dict.fromkeys(r["rival"] for c in run["cases"] for r in c["rivals"]))
    figure = Figure(figsize=(11, 1.6 + 0.24 * sum(heights) + 0.6 * len(panels)))
    figure.set_layout_engine("constrained")
    machine, threads = run["machine"], run["threads"]
    figure.suptitle(
        f"tdkd bench, suite {run['suite']}: {machine['cpu']} ({machine['capability']}), "
        f"{threads} thread{'s' * (threads > 1)}, torch {run['versions']['torch']}, "
        f"{run['date'][:10]}",
        fontsize=11,
    )
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (op, cases) in zip(grid[:, 0], panels.items(), strict=True):
        ticks, labels, y, longest = [], [], 0.0, 1.0
        for case in cases:
            bars = _bars(case)
            ticks.append(y + (len(bars) - 1) / 2)
            labels.append(_label(case))
            for name, relative, milliseconds in bars:
                axes.barh(y, relative, height=0.85, color=f"C{names.index(name) % 10}")
                axes.annotate(
                    f"{name}: {relative:.3g}x, {milliseconds:.3g} ms",
                    (relative, y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
                longest = max(longest, relative)
                y += 1
            y += 1
        axes.set_xscale("log")
        # room for the text beside the longest bar
        axes.set_xlim(0.5, longest * (longest / 0.5) ** 0.35 * 1.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.set_ylim(y - 0.8, -1.2)  # the first case on top
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(op, fontsize=10, loc="left")
        axes.set_xlabel(
            f"median time / time of {ANCHOR} (log scale; shorter is faster)", fontsize=8
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _write_whole(path, buffer.getvalue())


def table(measured: Measured) -> Table:
    """One case to read in a terminal; benchmarks/README.md explains the columns."""
    shown = Table(title=str(measured.case), title_justify="left")
    shown.add_column("rival", no_wrap=True)
    for column in ("median ms", "ratio", "GB/s", "of amax", "extra MB", "allocs"):
        shown.add_column(column, justify="right")
    for result in measured.results:
        if result.skipped is not None:
            continue
        shown.add_row(
            result.rival,
            _number(result.median_s, 1e3),
            _number(result.ratio),
            _number(result.gb_per_s),
            "" if result.share_of_amax is None else f"{result.share_of_amax:.1%}",
            _number(result.peak_extra_bytes, 1e-6),
            "" if result.logits_sized_allocations is None else f"{result.logits_sized_allocations}",
        )
    skipped = [f"{r.rival}: {r.skipped}" for r in measured.results if r.skipped is not None]
    if skipped:
        shown.caption = Text("skipped: " + "; ".join(skipped))  # brackets are no markup
        shown.caption_justify = "left"
    return shown


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    value *= scale
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(case: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, time over the anchor's, and milliseconds of who was timed, the anchor left out."""
    medians = {r["rival"]: r["median_s"] for r in case["rivals"] if r["median_s"] is not None}
    anchor = medians.pop(ANCHOR, None)
    if anchor is None:
        return []
    return [(name, median / anchor, median * 1e3) for name, median in medians.items()]


def _label(case: dict[str, Any]) -> str:
    return f"{case['rows']} x {case['vocab']}\n{case['dtype']}, k={case['k']}, {case['logits']}"


def _write_whole(path: Path, data: bytes) -> None:
    # not tdkd.records.write_whole, which needs the extras
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the clone that this package runs from, and whether its code differs from that."""
    root = Path(tdkd.__file__).resolve().parent.parent
    try:
        # a virtual environment within some other clone is not tracked by it
        _git_says(root, "ls-files", "--error-unmatch", "tdkd/__init__.py")
        commit = _git_says(root, "rev-parse", "HEAD").strip()
        changed = _git_says(root, "status", "--porcelain", "--", "tdkd", "csrc", "setup.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changed.strip())}


def _git_says(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
