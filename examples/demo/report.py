"""metrics.json, curves.png and report.md of the demo, from what its stages left behind."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import tdkd
from tdkd import curves, records

WHEN = ("before", "warm", "after")
SHOWN = (
    "td_error", "q", "value", "value_gap", "set_size", "teacher_mass", "student_mass", "set_kl",
    "kappa", "entropy_gap",
)  # fmt: skip
WHY = """\
What was picked, and why. Prototypes on this teacher, not this run, showed that the level of the
raw logits wanders from token to token, and that IQ-Learn with the paper's constants (raw logits,
alpha 0.1, gradients through V') undoes the warm start. So Q is the student's log-probability
(`q_level: log_prob`), normalised over the batch vocabulary; the TD term is small (weight
{td_weight}), mild (alpha {td_alpha}), takes the teacher's own token, and stops the gradient into
the next state's value, which it would otherwise lower by emptying that state's set; and it stands
beside a normalised imitation term, the KL to the teacher on its action set with one bucket for the
rest, which keeps the student's mass where the teacher's is. The LM loss is off in phase 2: the tail
bucket does its work without a vocabulary-sized product. Most answers are cut at their longest
length, so terminal states are few here; the last state of an answer that was cut has no known
successor and gives no TD term."""


def write_report(out: Path) -> None:
    evaluated = {when: json.loads((out / f"{when}.json").read_text()) for when in WHEN}
    stages = {p.stem: json.loads(p.read_text()) for p in sorted((out / "stages").glob("*.json"))}
    metrics: dict[str, Any] = {
        when: {name: result[name] for name in ("kl", "top1", "acceptance", "rouge_l", "perplexity")}
        for when, result in evaluated.items()
    }
    metrics["stages"] = {
        name: {key: stage[key] for key in ("seconds", "peak_memory_mib")}
        for name, stage in stages.items()
    }
    metrics["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tdkd": tdkd.__version__,
        "date": date.today().isoformat(),
    }
    records.write_whole(out / "metrics.json", metrics)
    logs = {name: json.loads((out / name / "log.json").read_text()) for name in ("warm", "td")}
    draw(out / "curves.png", logs, metrics)
    (out / "report.md").write_text(text(metrics, evaluated, logs), encoding="utf-8")


def draw(path: Path, logs: dict[str, list[dict[str, Any]]], metrics: dict[str, Any]) -> None:
    figure = Figure(figsize=(18.5, 7), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    curves.panel(axes[0], logs["warm"], "phase 1: cross-entropy", ["loss"])
    panels = [title for title in curves.PANELS if title != "Q(a), V, nats"]
    for axis, title in zip(axes[1:], panels, strict=False):
        curves.panel(axis, logs["td"], f"phase 2: {title}", curves.PANELS[title])
    axis, kl = axes[-1], [metrics[when]["kl"] for when in WHEN]
    axis.bar(WHEN, kl, color=["#999999", "#6699cc", "#225588"])
    axis.set_title("held-out KL(teacher || student), nats a token")
    axis.margins(y=0.12)
    for i, value in enumerate(kl):
        axis.text(i, value, f"{value:.2f}", ha="center", va="bottom")
    records.write_figure(path, figure)


def text(
    metrics: dict[str, Any],
    evaluated: dict[str, dict[str, Any]],
    logs: dict[str, list[dict[str, Any]]],
) -> str:
    before, after = evaluated["before"], evaluated["after"]
    config = (Path(__file__).parent / "td.yaml").read_text()
    settings = dict(
        line.split(": ", 1) for line in config.splitlines() if ": " in line and line[0] != "#"
    )
    lines = [
        "# A student learned from its teacher",
        "",
        f"On {after['examples']} held-out answers ({after['positions']} positions) the KL to the "
        f"teacher went from {before['kl']:.2f} to {after['kl']:.2f} nats a token, top-1 agreement "
        f"from {before['top1']:.3f} to {after['top1']:.3f}.",
        "",
        "| | KL | top-1 | acceptance | Rouge-L | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for when in WHEN:
        m = metrics[when]
        lines.append(
            f"| {when} | {m['kl']:.3f} | {m['top1']:.3f} | {m['acceptance']:.3f} | "
            f"{m['rouge_l']:.3f} | {m['perplexity']:.1f} |"
        )
    lines += [
        "",
        "`before` is the teacher with 20 of its 30 layers taken out, `warm` the same after "
        "supervised training on the teacher's answers, `after` the same after the TD phase.",
        "",
        "![curves](curves.png)",
        "",
        "## What the TD phase minimised",
        "",
        WHY.format(td_weight=settings["td_weight"], td_alpha=settings["td_alpha"]),
        "",
        "```yaml",
        config.rstrip(),
        "```",
        "",
        "The last step of the TD phase: "
        + ", ".join(
            f"{name} {value:.3f}"
            for name, value in next(e for e in reversed(logs["td"]) if "td_error" in e).items()
            if name in SHOWN
        )
        + ".",
        "",
        "## Three answers",
    ]
    for i, sample in enumerate(evaluated["after"]["samples"]):
        lines += ["", f"**{sample['prompt'].strip()}**", ""]
        answers = {
            "before": evaluated["before"]["samples"][i]["answer"],
            "warm": evaluated["warm"]["samples"][i]["answer"],
            "after": sample["answer"],
            "teacher": sample["reference"],
        }
        lines += [f"- {who}: {' '.join(answer.split())}" for who, answer in answers.items()]
    lines += ["", "## Time and memory", "", "| stage | seconds | peak MiB |", "|---|---|---|"]
    for name, stage in metrics["stages"].items():
        lines.append(f"| {name} | {stage['seconds']} | {stage['peak_memory_mib']} |")
    total = sum(stage["seconds"] for stage in metrics["stages"].values())
    machine = metrics["machine"]
    lines += [
        f"| all | {total:.0f} | |",
        "",
        f"{machine['threads']} threads, torch {machine['torch']}, tdkd {machine['tdkd']}, "
        f"{machine['date']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    write_report(Path("runs/demo"))
