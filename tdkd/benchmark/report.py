"""What is kept of a run: the machine, a JSON file, a picture, and tables to read."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tdkd
from tdkd import records
from tdkd.benchmark.cases import Case, describe
from tdkd.benchmark.measure import Result
from tdkd.benchmark.rivals import ANCHORS

SCHEMA = 2


class Measured(NamedTuple):
    """A case and its results, one a rival."""

    case: Case
    results: list[Result]


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a result depends on, without names of hosts or directories."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory_bytes(),
            "system": f"{platform.system()} {platform.machine()}",
            **({"gpu": _gpu()} if device == "cuda" else {}),
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


def content(
    suite: str,
    device: str,
    threads: int,
    rounds: int,
    measured: Sequence[Measured],
    left_out: Sequence[Case] = (),
) -> dict[str, Any]:
    """The JSON of a run, times in seconds, sizes in bytes."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite": suite,
        "device": device,
        "anchor": ANCHORS[device],
        "threads": threads,
        "rounds": rounds,
        **environment(device),
        "cases": [
            {**case._asdict(), "rivals": [result._asdict() for result in results]}
            for case, results in measured
        ],
        "left_out": [case._asdict() for case in left_out],
    }


def write_picture(path: Path, run: dict[str, Any]) -> bool:
    """Bars of time in units of the anchor's, one group a case, one panel an op.

    Args:
        path: PNG to write, whole or not at all.
        run: the JSON of a run, as :func:`content` makes it.
    Returns:
        False where nothing was timed that could be drawn, and nothing is written.
    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    anchor = run["anchor"]
    shown = [case for case in run["cases"] if _bars(case, anchor)]
    panels = {
        op: [case for case in shown if case["op"] == op]
        for op in dict.fromkeys(case["op"] for case in shown)
    }
    if not panels:
        return False
    heights = [sum(1 + len(_bars(case, anchor)) for case in cases) for cases in panels.values()]
    names = list(dict.fromkeys(r["rival"] for c in run["cases"] for r in c["rivals"]))
    figure = Figure(figsize=(11, 1.6 + 0.24 * sum(heights) + 0.6 * len(panels)))
    figure.set_layout_engine("constrained")
    figure.suptitle(
        f"tdkd bench, suite {run['suite']}: {_hardware(run)}, "
        f"torch {run['versions']['torch']}, {run['date'][:10]}",
        fontsize=11,
    )
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (op, cases) in zip(grid[:, 0], panels.items(), strict=True):
        ticks, labels, y, lengths = [], [], 0.0, [1.0]
        for case in cases:
            bars = _bars(case, anchor)
            ticks.append(y + (len(bars) - 1) / 2)
            labels.append("\n".join(textwrap.wrap(describe(case), 16)))
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
                lengths.append(relative)
                y += 1
            y += 1
        axes.set_xscale("log")
        # room for the text beside the longest bar
        low, high = min(0.5, 0.7 * min(lengths)), max(lengths)
        axes.set_xlim(low, high * (high / low) ** 0.35 * 1.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.set_ylim(y - 0.8, -1.2)  # the first case on top
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(op, fontsize=10, loc="left")
        axes.set_xlabel(
            f"median time / time of {anchor} (log scale; shorter is faster)", fontsize=8
        )
    records.write_figure(path, figure, dpi=130)
    return True


COLUMNS = ("rival", "median ms", "ratio", "GB/s", "share", "extra MB", "allocs")


def table(measured: Measured) -> str:
    """One case to read in a terminal; benchmarks/README.md explains the columns."""
    anchor = ANCHORS[measured.case.device]
    rows: list[Sequence[str]] = [COLUMNS]
    for result in measured.results:
        if result.skipped is None:
            allocs = result.logits_sized_allocations
            rows.append(
                (
                    result.rival,
                    _number(result.median_s, 1e3),
                    _number(result.ratio),
                    _number(result.gb_per_s),
                    "" if result.share is None else f"{result.share:.1%}",
                    _number(result.peak_extra_bytes, 1e-6),
                    "" if allocs is None else f"{allocs}",
                )
            )
    skipped = [f"  skipped: {r.rival}: {r.skipped}" for r in measured.results if r.skipped]
    return "\n".join([f"{measured.case} (share of {anchor})", *aligned(rows), *skipped, ""])


def summary(run: dict[str, Any]) -> str:
    """A run's JSON as one line a case: ``tdkd``, and how many times slower others are."""
    others = ("tdkd reference", "torch eager", "torch.compile", "published")
    rows: list[Sequence[str]] = [("case", "tdkd ms", "GB/s", f"of {run['anchor']}", *others)]
    for case in run["cases"]:
        by_name = {result["rival"]: result for result in case["rivals"]}
        ours = by_name["tdkd"]
        rows.append(
            (
                f"{case['op']} {describe(case)}",
                _number(ours["median_s"], 1e3) or "skipped",
                _number(ours["gb_per_s"]),
                "" if ours["share"] is None else f"{ours['share']:.1%}",
                *(_number(by_name.get(name, {}).get("ratio")) for name in others),
            )
        )
    lines = [f"{_hardware(run)}, torch {run['versions']['torch']}", *aligned(rows)]
    if run["left_out"]:
        lines.append(f"left out for lack of time: {len(run['left_out'])} cases")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _hardware(run: dict[str, Any]) -> str:
    machine, threads = run["machine"], run["threads"]
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']} ({machine['capability']}), {threads} thread{'s' * (threads > 1)}"


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    value *= scale
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(case: dict[str, Any], anchor: str) -> list[tuple[str, float, float]]:
    """Name, time over the anchor's, and milliseconds of who was timed, the anchor left out."""
    medians = {r["rival"]: r["median_s"] for r in case["rivals"] if r["median_s"] is not None}
    base = medians.pop(anchor, None)
    if base is None:
        return []
    return [(name, median / base, median * 1e3) for name, median in medians.items()]


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


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


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
