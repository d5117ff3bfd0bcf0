"""The ways to a student's values on its sets, and the choice among them.

``gather``  k head rows a position where nothing needs the normaliser; products with the whole head
            where k is large against V.
``batch``   the columns of the batch vocabulary: where an estimate of the normaliser is asked for.
``exact``   all columns, a chunk of rows at a time; everything else.

The bounds are where the measured costs cross. On CPU `tdkd bench --suite routes` measures them; on
GPUs they are arithmetic from the memory that is read (not measured on a GPU yet).
"""

from __future__ import annotations

from typing import Literal

Route = Literal["gather", "batch", "exact"]

BATCH_BELOW = {"cpu": 0.8, "cuda": 0.8}
"""M / V below which M gathered columns cost less than all."""


def gather_below(device: str, columns: int, width: int) -> float:
    """k / V below which k head rows a position cost less than products with the whole head.

    On a CPU the bound falls with the square root of the head's size, since a small one stays in
    the caches, which is where rows that are picked differ most from rows in order.
    """
    if device == "cpu":
        return min(0.25, 0.3 * ((1 << 20) / max(1, columns * width)) ** 0.5)
    return 0.005


def gathers(device: str, k: int, columns: int, width: int) -> bool:
    """Whether k of the head's rows a position are to be gathered, or all multiplied."""
    return k < gather_below(device, columns, width) * columns


def pays(device: str, held: int, columns: int) -> bool:
    """Whether a vocabulary that holds so many of the columns is to be used, or all of them."""
    return held < BATCH_BELOW.get(device, BATCH_BELOW["cuda"]) * columns


def route(normaliser: str | None) -> Route:
    """The way of :func:`tdkd.ops.linear_td_loss`; ``normaliser`` is None where none is needed.

    ``batch`` becomes ``exact`` in a batch whose vocabulary does not pay, and ``gather`` multiplies
    with the whole head where that costs less.
    """
    if normaliser is None:
        return "gather"
    return "batch" if normaliser == "batch" else "exact"


def describe(device: str) -> str:
    """The rule in words, at the size of a small model."""
    columns, width = 49_152, 576
    gather = gather_below(device, columns, width) * columns
    return (
        f"no normaliser: k head rows if k < {gather:,.0f} (V = {columns:,}, H = {width}), else "
        f"all; batch: M columns if M < {BATCH_BELOW[device]:g} V, else all; exact: all"
    )
