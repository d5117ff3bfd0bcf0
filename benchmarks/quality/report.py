"""Table and picture of what the methods taught."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from judge import POSITIONS

from tdkd import records
from tdkd.benchmark.report import environment

SHOWN = {
    "kl": "KL",
    "top1": "top-1",
    "acceptance": "acceptance",
    "perplexity": "perplexity",
    "own_kl": "own KL",
    "own_reverse_kl": "own reverse KL",
    "own_acceptance": "own acceptance",
}


def one_line(scores: dict[str, Any]) -> str:
    shown = [f"{label} {scores[name]:.4g}" for name, label in SHOWN.items()]
    rouge = scores["rouge_l"]
    return ", ".join([*shown, f"Rouge-L {rouge['mean']:.4f} +- {half(rouge):.4f}"])


def half(rouge: dict[str, float]) -> float:
    """Half the width of a confidence interval."""
    return (rouge["high"] - rouge["low"]) / 2


def results(work: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(work.glob("runs/*/result.json"))]


def write(work: Path, output: Path, earlier: Path | None = None) -> None:
    """``output``.json and .png, and a Markdown table on stdout.

    ``earlier``: a JSON file that this function wrote. Its runs are told as well, each once, and its
    times where ``work`` has none.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    before = {"times": None, "runs": []} if earlier is None else json.loads(earlier.read_text())
    runs = results(work)
    runs += [run for run in before["runs"] if run not in runs]
    runs.sort(key=lambda r: (r["start"], r["scores"]["kl"] if r["scores"] else math.inf))
    times = work / "times.json"
    seconds = json.loads(times.read_text()) if times.exists() else before["times"]
    told = {"times": seconds, "runs": runs, "over_seeds": over_seeds(runs)}
    records.write_whole(output.with_suffix(".json"), {**environment(), **told})
    given = ("method", "teacher", "start", "rate", "seed", "minutes", "steps")
    head = [*given, *SHOWN.values(), "Rouge-L"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for run in runs:
        settings = ["" if run[name] is None else str(run[name]) for name in given]
        scores = run["scores"]
        if scores is None:
            print("| " + " | ".join([*settings, "diverged"]) + " |")
            continue
        values = [f"{scores[name]:.3f}" for name in SHOWN]
        rouge = f"{scores['rouge_l']['mean']:.3f} ± {half(scores['rouge_l']):.3f}"
        row = [*settings, *values, rouge]
        print("| " + " | ".join(row) + " |")
    table_over_seeds(over_seeds(runs))
    picture(runs, output.with_suffix(".png"), seconds["seconds"] if seconds else {})


def over_seeds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every score, of what was run with two seeds or more."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        length = run["minutes"] or f"{run['steps']} steps"
        key = run["method"], run["teacher"], run["start"], run["rate"], length
        groups.setdefault(key, []).append(run)
    made = []
    for key, found in groups.items():
        if len(found) < 2 or any(run["scores"] is None for run in found):
            continue
        scores = {name: [run["scores"][name] for run in found] for name in SHOWN}
        scores["rouge_l"] = [run["scores"]["rouge_l"]["mean"] for run in found]
        made.append(
            {
                **dict(zip(("method", "teacher", "start", "rate", "length"), key, strict=True)),
                "seeds": sorted(run["seed"] for run in found),
                **{name: {"mean": mean(x), "sd": stdev(x)} for name, x in scores.items()},
            }
        )
    return made


def table_over_seeds(groups: list[dict[str, Any]]) -> None:
    """On stdout, as Markdown: means, and standard deviations over seeds."""
    if not groups:
        return
    given = ("method", "teacher", "start", "rate", "length", "seeds")
    shown = {**SHOWN, "rouge_l": "Rouge-L"}
    print("\n| " + " | ".join([*given, *shown.values()]) + " |")
    print("|" + "---|" * (len(given) + len(shown)))
    for group in groups:
        told = [str(group[name]) for name in given]
        values = [f"{group[name]['mean']:.3f} ± {group[name]['sd']:.3f}" for name in shown]
        print("| " + " | ".join([*told, *values]) + " |")


def picture(runs: list[dict[str, Any]], path: Path, seconds: dict[str, Any]) -> None:
    """KL by wall-clock and by tokens, KL by position on the student's own states, and scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = of_interest(runs)
    palette = plt.get_cmap("tab20")
    colours = {_label(run): palette(i % 20) for i, run in enumerate(chosen)}
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    start = next((run["scores"]["kl"] for run in runs if run["method"] == "warm"), None)
    for run in chosen:
        points = run.get("curve") or []
        if not points or run["start"] != "warm":
            continue
        kl = [start, *(point["kl"] for point in points)]
        way = "cache" if run["teacher"] == "cache" else "live"
        each = seconds.get(run["method"], {}).get(way)
        look = {"marker": ".", "color": colours[_label(run)], "label": _label(run)}
        if each is not None:
            axes[0, 0].plot([0, *(point["step"] * each for point in points)], kl, **look)
        axes[0, 1].plot([0, *(point["tokens"] for point in points)], kl, **look)
    axes[0, 0].set(title="KL on the teacher's answers, by wall-clock", xlabel="s", ylabel="nats")
    axes[0, 1].set(title="the same by tokens", xlabel="tokens of answers", ylabel="nats")
    middle = [(low + high) / 2 for low, high in POSITIONS]
    for run in chosen:
        by_position = run["scores"]["own_kl_by_position"]
        shown = [(x, y) for x, y in zip(middle, by_position, strict=True) if y is not None]
        axes[0, 2].plot(
            *zip(*shown, strict=True), marker=".", label=_label(run), color=colours[_label(run)]
        )
    axes[0, 2].set(
        title="KL(teacher || student) on the student's own states",
        xlabel="token of the answer",
        ylabel="nats",
    )
    names = [_label(run) for run in chosen]
    bars = {"color": [colours[name] for name in names]}
    axes[1, 0].barh(names, [run["scores"]["acceptance"] for run in chosen], **bars)
    axes[1, 0].set(title="acceptance on the teacher's answers")
    axes[1, 1].barh(names, [run["scores"]["own_kl"] for run in chosen], **bars)
    axes[1, 1].set(title="KL on the student's own states")
    rouge = [run["scores"]["rouge_l"] for run in chosen]
    axes[1, 2].barh(names, [r["mean"] for r in rouge], xerr=[half(r) for r in rouge], **bars)
    axes[1, 2].set(title="Rouge-L, sampled at temperature 1 (95 %)")
    for axis in axes[1]:
        axis.tick_params(labelsize=7)
    for axis in axes[1, 1:]:
        axis.set_yticklabels([])
    records.write_figure(path, figure)
    plt.close(figure)


def of_interest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A warm student, and of each method the run of the first seed at its best rate, rather one
    that was looked at on its way; at equal wall-clock, where there are such."""
    warm = [run for run in runs if run["start"] == "warm" and run["scores"]]
    equal = [run for run in warm if run["minutes"]] or warm
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(equal, key=lambda r: (not r.get("curve"), r["seed"], r["scores"]["kl"])):
        best.setdefault((run["method"], run["teacher"]), run)
    return [*[run for run in runs if run["method"] == "warm"][:1], *best.values()]


def _label(run: dict[str, Any]) -> str:
    if run["method"] == "warm":
        return "warm student"
    return f"{run['method']}, {run['steps']} steps, {run['teacher']} teacher"
