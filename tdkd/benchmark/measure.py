"""Time and memory of every rival on one case."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tdkd.benchmark.cases import Case, Inputs, make_inputs
from tdkd.benchmark.rivals import Rival, Run, Skip

ANCHOR = "amax"
"""The rival that reads logits as fast as this machine does."""
ENOUGH_SECONDS = 6.0
"""A slow rival stops after two rounds, or when it has been timed so long, whichever is later."""


class Result(NamedTuple):
    """One rival on one case; where it was skipped, everything but the reason is None."""

    rival: str
    skipped: str | None = None
    first_call_s: float | None = None
    """seconds of the first call: compilation, first touch of memory."""
    times_s: tuple[float, ...] = ()
    """seconds of each round that counts."""
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    against: str | None = None
    ratio: float | None = None
    """median over that of ``against``: above 1 is slower."""
    bytes_moved: int | None = None
    """the least that an op of this kind must read and write."""
    gb_per_s: float | None = None
    """``bytes_moved`` over the median, 10^9 bytes a second."""
    share_of_amax: float | None = None
    """``gb_per_s`` over that of the anchor."""
    peak_extra_bytes: int | None = None
    """growth of resident memory within one call, results included."""
    logits_sized_allocations: int | None = None
    """tensors at least as large as the case's logits that one call allocates."""


def measure(
    case: Case,
    rivals: Sequence[Rival],
    *,
    rounds: int,
    compile: bool = True,
    tell: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Times the rivals in turns and then, apart from that, their memory.

    Each rival is called once before its times count. In every round each rival that still runs is
    called once, on the next copy of the inputs; the order rotates by one a round.

    Args:
        case: what to measure.
        rivals: of the case's op.
        rounds: at most so many times of each.
        compile: False skips the rivals that need a compiler.
        tell: hears who is called next.
    Returns:
        One result a rival, in their order.
    """
    torch.compiler.reset()  # what earlier cases compiled would count against the recompile limit
    copies = make_inputs(case)
    calls = 0

    def call(run: Run) -> float:
        nonlocal calls
        inputs = copies[calls % len(copies)]
        calls += 1
        start = time.perf_counter()
        result = run(inputs)
        seconds = time.perf_counter() - start
        del result  # freed outside of the timing
        return seconds

    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for rival in rivals:
        tell(rival.name)
        if rival.compiles and not compile:
            skipped[rival.name] = "left out by --no-compile"
            continue
        try:
            run = rival.prepare(case)
            first[rival.name] = call(run)
        except Exception as error:  # a rival that fails is reported, and the others go on
            skipped[rival.name] = reason(error)
            continue
        runs[rival.name] = run
        if not rival.warm:
            times[rival.name].append(first[rival.name])

    running = [rival for rival in rivals if rival.name in runs]
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in order(turn, len(running)):
                rival = running[i]
                if not enough(times[rival.name], rival.max_rounds or rounds):
                    tell(rival.name)
                    times[rival.name].append(call(runs[rival.name]))
    finally:
        gc.enable()

    results = []
    for rival in rivals:
        if rival.name in skipped:
            results.append(Result(rival.name, skipped=skipped[rival.name]))
            continue
        tell(f"{rival.name}, memory")
        low, median, high = quartiles(times[rival.name])
        moved = rival.passes * case.logits_bytes or None
        results.append(
            Result(
                rival=rival.name,
                first_call_s=first[rival.name],
                times_s=tuple(times[rival.name]),
                median_s=median,
                quartiles_s=(low, high),
                against=rival.against,
                bytes_moved=moved,
                gb_per_s=moved / median / 1e9 if moved else None,
                peak_extra_bytes=peak_extra_bytes(runs[rival.name], copies[0]),
                logits_sized_allocations=allocations(runs[rival.name], copies[0], case.logits_bytes)
                if rival.warm  # one more call of a slow rival is not worth it
                else None,
            )
        )
    return compared(results)


def order(turn: int, count: int) -> list[int]:
    """Who is called in a round: everyone once, the first of the last round at the end."""
    return [(turn + i) % count for i in range(count)]


def enough(times: Sequence[float], rounds: int) -> bool:
    """Whether a rival has been timed often, or long, enough."""
    return len(times) >= rounds or (len(times) >= 2 and sum(times) >= ENOUGH_SECONDS)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; all the same of a single time."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def compared(results: Sequence[Result]) -> list[Result]:
    """Fills in what takes two rivals: the ratio, and the share of the anchor's bandwidth."""
    by_name = {result.rival: result for result in results}
    anchor = by_name.get(ANCHOR)

    def ratio(result: Result) -> float | None:
        base = by_name.get(result.against) if result.against else None
        if result.median_s is None or base is None or base.median_s is None:
            return None
        return result.median_s / base.median_s

    def share(result: Result) -> float | None:
        if result.gb_per_s is None or anchor is None or anchor.gb_per_s is None:
            return None
        return result.gb_per_s / anchor.gb_per_s

    return [r._replace(ratio=ratio(r), share_of_amax=share(r)) for r in results]


def reason(error: Exception) -> str:
    """An error as one line, without directories of this machine."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    words = (word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in text.split())
    text = " ".join(words)
    return text if isinstance(error, Skip) else f"{type(error).__name__}: {text}"


def peak_extra_bytes(run: Run, inputs: Inputs) -> int | None:
    """Growth of this process's resident memory within one call; None where Linux cannot tell."""
    gc.collect()
    _trim()
    try:
        # 5: the peak begins again at what is resident now (man 5 proc)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        result = run(inputs)
        peak = _resident("VmHWM")
    except (OSError, KeyError):
        return None
    del result
    return max(0, peak - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[field].split()[0]) * 1024


def _trim() -> None:
    """Freed memory that the allocator keeps would hide what a call takes."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def allocations(run: Run, inputs: Inputs, least: int) -> int | None:
    """Tensors of at least so many bytes that one call allocates; None if the profiler fails."""
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            result = run(inputs)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    except (RuntimeError, OSError, ValueError, KeyError):
        return None
    del result
    return sum(e.get("name") == "[memory]" and e["args"]["Bytes"] >= least for e in events)
