"""What the GPU kernels must move and issue, next to what an H100 can: a model, no measurement.

python benchmarks/compiled.py --json benchmarks/results/compiled.json
python benchmarks/model.py            # the tables of docs/performance.md, as Markdown
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tdkd.kernels.select_actions.triton import blocks, group_size
from tdkd.kernels.student_rows.triton import GROUP

COMPILED = Path(__file__).parent / "results" / "compiled.json"

# H100 SXM: what a copy moves, and what 132 multiprocessors of 4 schedulers issue.
BYTES_A_SECOND = 3.0e12
INSTRUCTIONS_A_SECOND = 132 * 4 * 1.755e9

SHAPES = [
    (8192, 151_936, "bfloat16", 64),
    (8192, 151_936, "bfloat16", 1024),
    (8192, 128_256, "bfloat16", 64),
    (8192, 32_000, "bfloat16", 64),
    (4096, 262_144, "bfloat16", 64),
    (2048, 151_936, "float32", 64),
]


class Cost(NamedTuple):
    """Of one op at one size."""

    moved: float
    """bytes read and written."""
    needed: float
    """bytes that any kernel must move."""
    issued: float
    """instructions of warps."""

    @property
    def memory_ms(self) -> float:
        return 1e3 * self.moved / BYTES_A_SECOND

    @property
    def issue_ms(self) -> float:
        return 1e3 * self.issued / INSTRUCTIONS_A_SECOND


def costs(
    kernels: list[dict[str, Any]], rows: int, vocab: int, dtype: str, k: int
) -> dict[str, Cost]:
    """Cost of selection, of the student's rows forward, and backward."""

    def of(kernel: str, k: int = 64) -> dict[str, Any]:
        (found,) = (
            x
            for x in kernels
            if (x["kernel"], x["dtype"], x["k"]) == (kernel, dtype, k)
            and x["target"] == "sm_90"
            and not x["variant"]
        )
        return found

    size = 4 if dtype == "float32" else 2
    logits = rows * vocab * size
    group = group_size(vocab, k)
    groups = -(-vocab // group)
    chunk = blocks(k).chunk
    select = of("select", k)
    # every instruction once, slow paths included, and its longest loop for every chunk it looks at
    looks = -(-groups // chunk) + -(-k * group // chunk)
    a_row = blocks(k).warps * (select["instructions"] + looks * select["longest_loop"])
    found = {
        "select_actions": Cost(
            logits + rows * (2 * groups * size + k * group * size + 24 * k),
            logits + rows * 8 * k,
            of("select_stream")["instructions_a_logit"] * rows * vocab / 32 + rows * a_row,
        )
    }
    sums = -(-vocab // GROUP)
    finish = of("student_finish", 64 if k <= 64 else 1024)
    # a slot's group is read again; 16 slots at a time
    a_row = finish["warps"] * (finish["instructions"] + k / 16 * finish["longest_loop"])
    found["student, forward"] = Cost(
        logits + rows * (16 * sums + k * GROUP * size + 20 * k),
        logits + rows * 8 * k,
        of("student_stream")["instructions_a_logit"] * rows * vocab / 32 + rows * a_row,
    )
    found["student, backward"] = Cost(
        2 * logits + rows * 32 * k,
        2 * logits,
        of("student_grad")["instructions_a_logit"] * rows * vocab / 32,
    )
    return found


def main() -> None:
    report = json.loads(COMPILED.read_text())
    print(f"Triton {report['triton']}, sm_90\n")
    print("| kernel | logits | k | warps | registers | shared, bytes | instructions a logit |")
    print("|---|---|---|---|---|---|---|")
    for x in report["kernels"]:
        if x["target"] == "sm_90" and not x["variant"]:
            print(
                f"| `{x['kernel']}` | {x['dtype']} | {x['k']} | {x['warps']} | {x['registers']} | "
                f"{x['shared_bytes']:,} | {x['instructions_a_logit'] or ''} |"
            )
    print()
    print("| op | rows x V | k | MB moved | beyond the least | memory, ms | issue, ms |")
    print("|---|---|---|---|---|---|---|")
    for rows, vocab, dtype, k in SHAPES:
        for op, cost in costs(report["kernels"], rows, vocab, dtype, k).items():
            print(
                f"| {op} | {rows} x {vocab:,} {dtype} | {k} | {cost.moved / 1e6:,.0f} | "
                f"{cost.moved / cost.needed - 1:.1%} | {cost.memory_ms:.2f} | {cost.issue_ms:.2f} |"
            )


if __name__ == "__main__":
    main()
