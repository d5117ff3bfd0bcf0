"""What log Z costs on the sets that the trainer takes by default.

    make demo                          # makes the teacher and the answers
    python benchmarks/default_sets.py [--models runs/demo] [--rows 2048] [--rounds 10]

The sets of `tdkd bench --suite linear` are a teacher's at p = 0.8; TDConfig takes all 64 members
(p = 1) and samples the columns beside them by the student's law. Both are timed here in turns, on
the same positions, beside sampled columns without the union of the sets, the exact form, the dense
loss and the three products. The sets that are made are not kept:
benchmarks/results/default_sets.json tells their sizes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from real_sets import K, states_of, write_sets

from tdkd import ops, records
from tdkd.benchmark import linear, measure, report
from tdkd.benchmark.cases import Case, Run
from tdkd.benchmark.rivals import Rival

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
GROWTH = 2
"""The sets' sizes are told of so many doublings of the rows too."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/demo"), help="what the demo made")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/default_sets.json"
    )
    options = parser.parse_args(arguments)
    records.check_at_least(1, rows=options.rows, rounds=options.rounds)
    records.check_directory(options.output.parent, "output")
    with tempfile.TemporaryDirectory() as scratch:
        kept, sizes, vocab, hidden = sets_of(options.models, options.rows, Path(scratch))
        case = Case("linear_td_loss", options.rows, vocab, k=K, hidden=hidden, sets="both")
        rivals = rivals_of(kept)
        results = measure.measure(
            case, rivals, rounds=options.rounds, tell=lambda name: print(name, file=sys.stderr)
        )
    run = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        **report.environment(),
        "sets": sizes,
        "case": case._asdict(),
        "rivals": [result._asdict() for result in results],
    }
    print(report.table(report.Measured(case, results)))
    print(sizes)
    records.write_whole(options.output, run)
    return run


def rivals_of(kept: dict[float, Path]) -> list[Rival]:
    def on(top_p: float, prepare: Any) -> Any:
        def prepared(case: Case) -> Run:
            run: Run = prepare(case._replace(sets=str(kept[top_p])))
            return run

        return prepared

    def batch(**options: Any) -> Any:
        return linear.td_loss(linear.NORMALISED, normaliser="batch", **options)

    def sampled(extra: int) -> Any:
        return linear.td_loss(linear.NORMALISED, normaliser="sampled", extra=extra)

    return [
        Rival("three products", linear.three_products),
        Rival("tdkd", on(1.0, linear.td_loss(linear.NORMALISED))),
        Rival("batch, p = 0.8, uniform", on(0.8, batch())),
        Rival("batch, p = 0.8, student", on(0.8, batch(law="student"))),
        Rival("batch, p = 1, uniform", on(1.0, batch())),
        Rival("batch, p = 1, student", on(1.0, batch(law="student"))),
        Rival("sampled 1024, p = 1", on(1.0, sampled(1024))),
        Rival("sampled 2048, p = 1", on(1.0, sampled(2048))),
        Rival("dense", on(1.0, linear.dense_loss())),
    ]


def sets_of(
    models: Path, rows: int, scratch: Path
) -> tuple[dict[float, Path], list[dict[str, Any]], int, int]:
    """Files of the teacher's sets by p, as `benchmarks/real_sets.py` writes them; what they hold;
    the teacher's V and H."""
    hidden, taken, weight = states_of(models, rows, rows << GROWTH)
    kept, sizes = {}, []
    for top_p in (0.8, 1.0):
        ids = ops.linear_select_actions(hidden, weight, K, top_p, include=taken).ids
        kept[top_p] = scratch / f"{top_p}.npz"
        write_sets(kept[top_p], ids[:rows], taken[:rows])
        for some in sorted({min(rows << i, len(ids)) for i in range(GROWTH + 1)}):
            part = ids[:some][ids[:some] >= 0]
            sizes.append(
                {
                    "top_p": top_p,
                    "k": K,
                    "rows": some,
                    "mean_members": round(part.numel() / some, 1),
                    "distinct_tokens": part.unique().numel(),
                }
            )
    return kept, sizes, weight.shape[0], weight.shape[1]


if __name__ == "__main__":
    main()
