"""Time and memory of every rival on one case."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tdkd.benchmark.cases import Case, Inputs, Run, Skip, make_inputs
from tdkd.benchmark.rivals import ANCHORS, Rival
from tdkd.testing import memory_events, peak_bytes

ENOUGH_SECONDS = {"cpu": 6.0, "cuda": 2.0}
"""A slow rival stops after two rounds, or when it has been timed so long, whichever is later."""
ROUNDS = {"cpu": 10, "cuda": 20}
"""Times of each rival where nobody says otherwise."""
HEAD_START_BYTES = 1 << 30
"""Read on a GPU before each call: no cache holds its inputs, and the host has some 0.3 ms to launch
what the call consists of, as in a training step whose queue is full."""


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
    share: float | None = None
    """``gb_per_s`` over that of the anchor: ``amax`` on CPU, ``copy`` on a GPU."""
    peak_extra_bytes: int | None = None
    """growth of memory within one call, results included: resident, or of torch's on a GPU; None,
    as the two below, where that call fails."""
    result_bytes: int | None = None
    """size of the tensors that a call returns, gradients included."""
    logits_sized_allocations: int | None = None
    """tensors at least as large as the case's main one that one call allocates."""


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
    _free(case.device)
    try:
        copies = make_inputs(case)
        clock = Clock(case.device)
    except Exception as error:
        return [Result(rival.name, skipped=reason(error)) for rival in rivals]
    calls = 0

    def start(run: Run) -> Callable[[], float]:
        nonlocal calls
        inputs = copies[calls % len(copies)]
        calls += 1
        return clock.start(run, inputs)

    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}

    def skip(name: str, why: str) -> None:
        skipped[name] = why
        runs.pop(name, None)

    for rival in rivals:
        tell(rival.name)
        if rival.compiles and not (compile and case.compiled):
            skip(
                rival.name,
                "not compiled in this case, for time" if compile else "left out by --no-compile",
            )
            continue
        try:
            run = rival.prepare(case)
            began = time.perf_counter()
            seconds = start(run)
            clock.synchronize()
            waited = time.perf_counter() - began
            first[rival.name] = seconds() if case.device == "cpu" else waited
        except Exception as error:  # a rival that fails is reported, and the others go on
            skip(rival.name, reason(error))
        else:
            runs[rival.name] = run
        if rival.name in skipped:
            _free(case.device)  # only here has the error let go of the tensors of its frames

    running = [rival for rival in rivals if rival.name in runs]
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            started: dict[str, Callable[[], float]] = {}
            failed = len(skipped)
            for i in order(turn, len(running)):
                name = running[i].name
                if name in skipped or enough(times[name], rounds, ENOUGH_SECONDS[case.device]):
                    continue
                tell(name)
                try:
                    started[name] = start(runs[name])
                except Exception as error:
                    skip(name, reason(error))
            try:
                clock.synchronize()
                for name, seconds in started.items():
                    times[name].append(seconds())
            except Exception as error:  # a GPU that failed says so here, and fails from now on
                for name in started:
                    skip(name, reason(error))
            if len(skipped) > failed:
                _free(case.device)
    finally:
        gc.enable()

    results = []
    for rival in rivals:
        if rival.name in skipped:
            results.append(Result(rival.name, skipped=skipped[rival.name]))
            continue
        tell(f"{rival.name}, memory")
        low, median, high = quartiles(times[rival.name])
        moved = rival.passes * case.main_bytes or None
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
                result_bytes=result_bytes(runs[rival.name], copies[0]),
                logits_sized_allocations=allocations(runs[rival.name], copies[0], case.main_bytes),
            )
        )
    return compared(results, ANCHORS[case.device])


class Clock:
    """Times calls: the host's seconds on CPU, those of CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.ahead = torch.ones(HEAD_START_BYTES // 4, device=device)

    def start(self, run: Run, inputs: Inputs) -> Callable[[], float]:
        """Calls; the seconds that it took are known after :meth:`synchronize`."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.ahead.amax()
            begin.record()
            run(inputs)
            end.record()
            return lambda: begin.elapsed_time(end) * 1e-3
        began = time.perf_counter()
        result = run(inputs)
        seconds = time.perf_counter() - began
        del result  # freed outside of the timing
        return lambda: seconds

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _free(device: str) -> None:
    """Lets go of what a failure or an earlier case has left."""
    if device == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that failed cannot do this either
            torch.cuda.empty_cache()


def order(turn: int, count: int) -> list[int]:
    """Who is called in a round: everyone once, the first of the last round at the end."""
    return [(turn + i) % count for i in range(count)]


def enough(times: Sequence[float], rounds: int, seconds: float) -> bool:
    """Whether a rival has been timed often, or long, enough."""
    return len(times) >= rounds or (len(times) >= 2 and sum(times) >= seconds)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; all the same of a single time."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def compared(results: Sequence[Result], anchor_name: str) -> list[Result]:
    """Fills in what takes two rivals: the ratio, and the share of the anchor's bandwidth."""
    by_name = {result.rival: result for result in results}
    anchor = by_name.get(anchor_name)

    def ratio(result: Result) -> float | None:
        base = by_name.get(result.against) if result.against else None
        if result.median_s is None or base is None or base.median_s is None:
            return None
        return result.median_s / base.median_s

    def share(result: Result) -> float | None:
        if result.gb_per_s is None or anchor is None or anchor.gb_per_s is None:
            return None
        return result.gb_per_s / anchor.gb_per_s

    return [r._replace(ratio=ratio(r), share=share(r)) for r in results]


def reason(error: Exception) -> str:
    """An error as one line, without directories of this machine."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    words = (word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in text.split())
    text = " ".join(words)
    return text if isinstance(error, Skip) else f"{type(error).__name__}: {text}"


def result_bytes(run: Run, inputs: Inputs) -> int | None:
    """Size of what a call returns; None if it fails, as where memory is short."""
    try:
        leaves = torch.utils._pytree.tree_leaves(run(inputs))
    except RuntimeError:
        return None
    return sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))


def peak_extra_bytes(run: Run, inputs: Inputs) -> int | None:
    """Growth of memory within one call: this process's, or torch's on a GPU. None where Linux
    cannot tell, or the call fails."""
    gc.collect()
    if inputs.main.is_cuda:
        try:
            return peak_bytes(lambda: run(inputs), inputs.main.device)
        except RuntimeError:  # out of memory, too
            return None
    _trim()
    try:
        # 5: the peak begins again at what is resident now (man 5 proc)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        result = run(inputs)
        peak = _resident("VmHWM")
    except (OSError, KeyError, RuntimeError):
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
        events = memory_events(lambda: run(inputs))
    except (RuntimeError, OSError, ValueError, KeyError):
        return None
    return sum(size >= least for size in events)
