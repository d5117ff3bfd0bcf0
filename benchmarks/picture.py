"""Draws docs/results.png, the picture of the README, from what is in benchmarks/results.

    python benchmarks/picture.py

Left: the student's side of a step (``linear-amx.json``). Right: what equal minutes teach
(``quality.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tdkd import records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WAYS = {
    "dense": "dense logits",
    "torch.compile": "dense, compiled",
    "tdkd": "tdkd exact",
    "tdkd batch": "tdkd batch vocabulary",
    "tdkd sampled": "tdkd sampled columns",
}
METHODS = {
    "sft": "cross-entropy on\nits answers (SeqKD)",
    "kl-full": "KL, all tokens,\nlive teacher (KD)",
    "kl-p1": "tdkd: KL, top 64 + tail,\nsets from a cache",
}
OURS, THEIRS = "#1f5a92", "#9a9a9a"


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def draw_speed(axes: Axes, case: dict[str, Any]) -> None:
    """Seconds and memory of one case, one bar a way."""
    measured = {rival["rival"]: rival for rival in case["rivals"]}
    gradients = 4 * case["hidden"] * (case["vocab"] + case["rows"])
    ways = [way for way in WAYS if way in measured and measured[way]["median_s"] is not None]
    for y, way in enumerate(ways):
        seconds = measured[way]["median_s"]
        extra = (measured[way]["peak_extra_bytes"] - gradients) / 1e6
        axes.barh(y, seconds, color=OURS if way.startswith("tdkd") else THEIRS)
        axes.text(seconds, y, f"  {seconds:.2f} s, {extra:,.0f} MB", va="center")
    axes.set_yticks(range(len(ways)), [WAYS[way] for way in ways])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(measured[way]["median_s"] for way in ways))
    axes.set_title(
        f"Student's side of a step: {case['rows']:,} rows, V = {case['vocab']:,}\n"
        "(seconds, forward and backward; memory beyond gradients)",
        loc="left",
    )


def draw_quality(axes: Axes, scores: list[dict[str, Any]]) -> None:
    """Held-out KL of the methods after equal minutes, the mean and deviation over seeds."""

    def kl_of(*run: str | float) -> dict[str, float]:
        keys = ("method", "start", "rate", "length")
        (found,) = (s["kl"] for s in scores if tuple(s[key] for key in keys) == run)
        return dict(found)

    before = kl_of("warm", "cold", 1e-3, "80 steps")["mean"]
    axes.axhline(before, color="black", linestyle=":", linewidth=1)
    axes.text(2.45, before + 0.06, f"all begin at {before:.2f}", ha="right")
    for x, method in enumerate(METHODS):
        kl = kl_of(method, "warm", 1e-3, 3.6)
        axes.bar(
            x, kl["mean"], yerr=kl["sd"], width=0.6, color=OURS if method == "kl-p1" else THEIRS
        )
        axes.text(x, kl["mean"] - 0.2, f"{kl['mean']:.2f}", ha="center", color="white")
    axes.set_xticks(range(len(METHODS)), list(METHODS.values()))
    axes.set_ylim(0, 3.4)
    axes.set_title("Held-out KL to the teacher after 3.6 minutes\n(nats a token)", loc="left")


def main() -> None:
    run, quality = load("linear-amx"), load("quality")
    case = next(c for c in run["cases"] if (c["op"], c["sets"]) == ("linear_td_loss", "real"))
    figure = Figure(figsize=(12, 3.6))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    draw_speed(left, case)
    draw_quality(right, quality["over_seeds"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    records.write_figure(ROOT / "docs" / "results.png", figure, dpi=130)


if __name__ == "__main__":
    main()
