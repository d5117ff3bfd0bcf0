"""Pictures of what a run logged: ``curves.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdkd import records

Log = Sequence[Mapping[str, Any]]

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "lm_loss", "eval_loss"),
    "TD error, median and 5 to 95 %": ("td_error_p50",),
    "Q(a), V, nats": ("q", "value", "state_value"),
    "mass on the sets": ("student_mass", "teacher_mass"),
    "KL on the sets, V - V*, entropy gap, nats": ("set_kl", "value_gap", "entropy_gap"),
    "set size": ("set_size",),
    "kappa, nats": ("kappa",),
}
"""The fields of the log that share axes, by title."""


def panel(axis: Any, log: Log, title: str, fields: Sequence[str]) -> None:
    """Fields of a log by step on the axes of a figure, those that it has."""
    drawn = [name for name in fields if any(name in entry for entry in log)]
    for name in drawn:
        entries = [entry for entry in log if name in entry]
        steps = [entry["step"] for entry in entries]
        # one entry alone makes no line
        axis.plot(steps, [entry[name] for entry in entries], marker=".", label=name)
        if name == "td_error_p50":
            low, high = ([entry[f"td_error_{p}"] for entry in entries] for p in ("p05", "p95"))
            axis.fill_between(steps, low, high, alpha=0.3)
    if len(drawn) > 1:
        axis.legend()
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)


def draw(path: Path, log: Log) -> bool:
    """Draws every panel of which the log has a field; nothing, and False, where it has none."""
    from matplotlib.figure import Figure

    logged = {name for entry in log for name in entry}
    shown = {title: fields for title, fields in PANELS.items() if logged & set(fields)}
    if not shown:
        return False
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.7 * columns, 3.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, fields) in zip(axes, shown.items(), strict=False):
        panel(axis, log, title, fields)
    records.write_figure(path, figure)
    return True
