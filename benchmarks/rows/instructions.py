"""Instructions a logit of the row bodies, counted by callgrind: a regression shows without a clock.

Compares with instructions.json beside this file and fails where a body needs 5 % more; --write
replaces the file. Callgrind knows no AVX-512: the portable and the AVX2 bodies alone are counted.
Needs g++ and valgrind.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
VOCAB, K = 32_768, 64


def count(program: Path, op: str, isa: str, dtype: str, rows: int) -> int:
    """Instructions of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={scratch}/out",
                *map(str, (program, op, isa, dtype, VOCAB, K, rows)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(re.search(r"Collected : (\d+)", done.stderr).group(1))


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch, "rows")
        command = ["g++", "-std=c++20", "-O3", "-w", f"-I{HERE.parents[1] / 'csrc'}"]
        subprocess.run([*command, str(HERE / "rows.cpp"), "-o", str(program)], check=True)
        measured = {}
        for op in ("select", "student", "backward"):
            for isa in ("portable", "avx2"):
                for dtype in ("float32", "bfloat16"):
                    # 64 rows are drawn in either run, so that the difference is the bodies alone
                    more, less = (count(program, op, isa, dtype, rows) for rows in (96, 64))
                    name = f"{op} {isa} {dtype}"
                    measured[name] = round((more - less) / (32 * VOCAB), 3)
                    print(f"{name:28} {measured[name]:7.3f} instructions a logit", flush=True)
    record = HERE / "instructions.json"
    if "--write" in sys.argv:
        record.write_text(json.dumps(measured, indent=2) + "\n")
        return 0
    expected = json.loads(record.read_text())
    worse = [name for name, value in measured.items() if value > 1.05 * expected[name]]
    for name in worse:
        print(f"{name}: {measured[name]} instructions a logit, {expected[name]} on record")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
