"""The ways to a student's values on its sets, and the choice among them.

``gather``  k head rows a position: where nothing needs the normaliser, and k is small against V.
``batch``   the columns of the batch vocabulary: where an estimate of the normaliser is asked for.
``exact``   all columns, a chunk of rows at a time; everything else.

The bounds are where the measured costs cross. On CPU `tdkd bench --suite routes` measures them; on
GPUs they are arithmetic from the memory that is read (not measured on a GPU yet).
"""

from __future__ import annotations

from typing import Literal

Route = Literal["gather", "batch", "exact"]

GATHER_BELOW = {"cpu": 0.1, "cuda": 0.005}
"""k / V below which k head rows a position cost less than all."""
BATCH_BELOW = {"cpu": 0.8, "cuda": 0.8}
"""M / V below which M gathered columns cost less than all."""


def gathers(device: str, k: int, columns: int) -> bool:
    """Whether k of the head's rows a position are to be gathered, or all multiplied."""
    return k < GATHER_BELOW.get(device, GATHER_BELOW["cuda"]) * columns


def pays(device: str, held: int, columns: int) -> bool:
    """Whether a vocabulary that holds so many of the columns is to be used, or all of them."""
    return held < BATCH_BELOW.get(device, BATCH_BELOW["cuda"]) * columns


def route(device: str, k: int, columns: int, *, normaliser: str | None) -> Route:
    """The way of :func:`tdkd.ops.linear_td_loss`; ``normaliser`` is None where none is needed.

    ``batch`` becomes ``exact`` in a batch whose vocabulary does not pay.
    """
    if normaliser is None:
        return "gather" if gathers(device, k, columns) else "exact"
    return "batch" if normaliser == "batch" else "exact"


def describe(device: str) -> str:
    """The rule in words."""
    gather, batch = GATHER_BELOW[device], BATCH_BELOW[device]
    return f"gather if k < {gather:g} V; batch if M < {batch:g} V; exact otherwise"
