"""Seconds that importing tdkd adds to importing torch: medians over fresh processes.

    python benchmarks/imports.py [--rounds 9]

Exit code 1 where one is above 0.3 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

LIMIT = 0.3
STATEMENTS = ("import tdkd", "from tdkd import nn, objectives, ops")
TIMED = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
exec(sys.argv[1])
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    above = False
    for statement in STATEMENTS:
        times = []
        for _ in range(rounds + 1):
            command = [sys.executable, "-c", TIMED, statement]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times.append([float(x) for x in done.stdout.split()])
        timed = times[1:]  # the first reads the disk
        torch, own = (statistics.median(column) for column in zip(*timed, strict=True))
        worst = max(own for _, own in timed)
        above |= own > LIMIT
        print(f"{statement}: {own:.3f} s (at most {worst:.3f}) on top of torch's {torch:.2f} s")
    sys.exit(above)


if __name__ == "__main__":
    main()
