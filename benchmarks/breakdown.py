"""Which kernels of a GPU take the time of an op: a table a case, and the JSON of it.

    python benchmarks/breakdown.py [--budget SECONDS] [--output FILE]

The first case of each op in the suite `gpu`; what the profiler adds to the host's time is in the
gaps, so that these are longer than without it.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tdkd import records
from tdkd.benchmark.cases import SUITES, Case, Run, make_inputs
from tdkd.benchmark.measure import reason
from tdkd.benchmark.report import aligned, environment
from tdkd.benchmark.rivals import rivals_of

BARE = ("three products", "one product")
"""The rivals that are shown beside our own."""
CALLS = 3
NAME = 60
"""characters of a kernel's name that a table shows."""


def kernels_of(run: Run, inputs: list[Any]) -> tuple[dict[str, tuple[float, float]], float]:
    """Calls and microseconds a run of every kernel, and microseconds from first to last."""
    run(inputs[0])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for i in range(CALLS):
            run(inputs[i % len(inputs)])
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    spans = []
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found[event.name]
            entry[0] += 1 / CALLS
            entry[1] += event.time_range.elapsed_us() / CALLS
            spans.append((event.time_range.start, event.time_range.end))
    span = (max(end for _, end in spans) - min(start for start, _ in spans)) / CALLS if spans else 0
    return {name: (calls, us) for name, (calls, us) in found.items()}, span


def breakdown(case: Case) -> dict[str, Any]:
    """Of every rival of ours, and of the bare products."""
    inputs, taken = make_inputs(case)[:CALLS], {}
    for rival in rivals_of(case):
        ours = rival.name.startswith("tdkd") and rival.name != "tdkd reference"
        if not ours and rival.name not in BARE:
            continue
        try:
            kernels, span = kernels_of(rival.prepare(case), inputs)
        except Exception as error:  # one that fails is told, and the others go on
            print(f"{case}: {rival.name}: {reason(error)}")
            continue
        rows = [[f"{case}: {rival.name}", "calls", "us"]]
        for name, (calls, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:14]:
            rows.append([name[:NAME], f"{calls:.3g}", f"{us:.0f}"])
        busy = sum(us for _, us in kernels.values())
        rows.append(["in all; from the first to the last, with gaps", f"{busy:.0f}", f"{span:.0f}"])
        print("\n".join(aligned(rows)), end="\n\n", flush=True)
        taken[rival.name] = {"kernels": kernels, "span_us": span}
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=60, help="seconds; no case begins after")
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("breakdown: expected a GPU, for torch sees none here", file=sys.stderr)
        return 2
    began, cases, ops_seen = time.monotonic(), [], set()
    for case in SUITES["gpu"]:
        kind = (case.op, case.autocast)
        if kind in ops_seen or time.monotonic() - began > options.budget:
            continue
        ops_seen.add(kind)
        case = case._replace(device="cuda")
        cases.append({**case._asdict(), "taken": breakdown(case)})
        torch.cuda.empty_cache()
        if options.output:  # after each case: the stage has a limit
            path = Path(options.output)
            records.check_directory(path.parent, "output")
            records.write_whole(path, {**environment("cuda"), "calls": CALLS, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
