"""Where the ways to a student's values on its sets cross.

Where nothing needs the normaliser, a position takes k head rows, or all of them if k is large
against V. ``normaliser="batch"`` takes the columns of the batch vocabulary, or all of them if it
holds most; ``"exact"`` takes all, a chunk of rows at a time.

The bounds are where the measured costs cross. On CPU `tdkd bench --suite routes` measures them; on
GPUs they are arithmetic from the memory that is read (not measured on a GPU yet).
"""

from __future__ import annotations

BATCH_BELOW = 0.8
"""M / V below which M gathered columns cost less than all."""


def gather_below(device: str, columns: int, width: int) -> float:
    """k / V below which k head rows a position cost less than products with the whole head.

    On a CPU the bound falls with the square root of the head's size, since a small one stays in
    the caches, which is where rows that are picked differ most from rows in order.
    """
    if device == "cpu":
        return min(0.25, 0.24 * ((1 << 20) / max(1, columns * width)) ** 0.5)
    return 0.005


def gathers(device: str, k: int, columns: int, width: int) -> bool:
    """Whether k of the head's rows a position are to be gathered, or all multiplied."""
    return k < gather_below(device, columns, width) * columns


def pays(held: int, columns: int) -> bool:
    """Whether a vocabulary that holds so many of the columns is to be used, or all of them."""
    return held < BATCH_BELOW * columns


def describe(device: str) -> str:
    """The rule in words, at the size of a small model."""
    columns, width = 49_152, 576
    gather = gather_below(device, columns, width) * columns
    return (
        f"no normaliser: k head rows if k < {gather:,.0f} (V = {columns:,}, H = {width}), else "
        f"all; batch: M columns if M < {BATCH_BELOW:g} V, else all; exact: all"
    )
