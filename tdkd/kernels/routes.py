"""Where the ways to a student's values on its sets cross.

Where nothing needs the normaliser, a position takes k head rows, or all of them if k is large
against V. ``normaliser="batch"`` takes the columns of the batch vocabulary, or all of them if it
holds most; ``"sampled"`` k head rows and a sample of the columns, or all if these cost more;
``"exact"`` takes all, a chunk of rows at a time. Gradients of a loss over all columns or a batch
vocabulary are made in forward, three products with the head in place of four, unless rows of many
chunks are linked.

The bounds are where the measured costs cross. On CPU `tdkd bench --suite routes` measures them, and
takes the ways that they reject as well. Beside products of float32, k head rows cost an Intel Xeon
up to 2.4 times what they cost an AMD EPYC: that bound is between the two. On GPUs the bounds are
arithmetic from the memory that is read; suite `gpu-routes` would measure them, and has not yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tdkd.kernels.batch_vocabulary.reference import LAW_ROWS
from tdkd.kernels.head import factor_dtype, factors_of
from tdkd.objectives import ForwardKL

if TYPE_CHECKING:
    from tdkd.td_rows import TDRows

Way = Literal["gather", "products", "batch", "sampled", "exact"]

BATCH_ROWS = {"cpu": 140, "cpu bfloat16": 300, "cuda": 300}
"""Rows whose products cost as much as gathering a column, and spreading its gradient, does; on CPUs
that multiply bfloat16 in that too. Other accelerators count as a GPU of CUDA, unmeasured."""
BATCH_BELOW = 0.4
"""M / V below which M gathered columns cost less than all, however few the rows."""
BOUND_BELOW = 0.25
"""M / V up to which a GPU takes a bound on M in its place, which spares it a host sync."""
CAPACITY_STEP = 1024
"""Batch vocabularies that are padded have a multiple of it as their size."""
SAMPLE_STEP = 16
"""The same for samples, which nothing but alignment asks for."""
SAMPLED_COST = 2.0
"""What a sampled column costs beside one of the batch vocabulary: a fourth product, and the small
operators around it."""
LAW_COST = 0.8
"""What the law of a student costs beside a loss over all columns, where it takes all rows: with few
of them both read the head, which one of them writes a gradient of besides."""
MOST_LINKS = 1 / 16
"""Share of the rows, computed beforehand, above which a fourth product is the better way."""

_forced: Way | None = None


@contextmanager
def forced(way: Way) -> Iterator[None]:
    """Takes ``way`` wherever the rule has to choose, so that what it rejects can be measured."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def gather_below(
    device: str, columns: int, width: int, rows: int, factors: torch.dtype = torch.float32
) -> float:
    """k / V below which k head rows a position cost less than products with the whole head.

    On a CPU the bound falls with the square root of the head's size, as long as a part of it stays
    in the caches, which is where rows that are picked differ most from rows in order. With few rows
    products are little beside the head itself, which they read and whose gradient they write. Where
    the CPU multiplies bfloat16, products cost less than half and rows what they did.
    """
    if device != "cpu":
        return 0.005
    if factors == torch.bfloat16:
        return min(0.25, 0.029 * (1 + 90 / max(1, rows)))
    bound = max(0.062, 0.2 * ((1 << 20) / max(1, columns * width)) ** 0.5)
    return min(0.25, bound * (1 + 8 / max(1, rows)))


def gathers(
    device: str,
    k: int,
    columns: int,
    width: int,
    rows: int,
    factors: torch.dtype = torch.float32,
) -> bool:
    """Whether k of the head's rows a position are to be gathered, or all multiplied, by products
    that take ``factors``."""
    if _forced in ("gather", "products"):
        return _forced == "gather"
    return k < gather_below(device, columns, width, rows, factors) * columns


def batch_below(device: str, rows: int, factors: torch.dtype = torch.float32) -> float:
    """M / V below which M gathered columns cost less than all of them."""
    if device == "cpu" and factors == torch.bfloat16:
        device = "cpu bfloat16"
    return max(BATCH_BELOW, rows / (rows + BATCH_ROWS.get(device, BATCH_ROWS["cuda"])))


def pays(
    device: str, held: int, columns: int, rows: int, factors: torch.dtype = torch.float32
) -> bool:
    """Whether a vocabulary that holds so many of the columns is to be used, or all of them, by
    products that take ``factors``."""
    if _forced in ("batch", "exact"):
        return _forced == "batch"
    return held < batch_below(device, rows, factors) * columns


def samples(
    device: str,
    k: int,
    extra: int,
    columns: int,
    width: int,
    rows: int,
    factors: torch.dtype = torch.float32,
    law_rows: int = 0,
) -> bool:
    """Whether k head rows a position and ``extra`` columns together are to be used, or all columns.

    Each costs its share of what all do, up to its bound, and so do the products of the rows by
    whose law the columns are sampled.
    """
    if _forced in ("sampled", "exact"):
        return _forced == "sampled"
    share = k / max(1.0, gather_below(device, columns, width, rows, factors) * columns)
    share += SAMPLED_COST * extra / max(1.0, batch_below(device, rows, factors) * columns)
    return share + LAW_COST * min(law_rows, rows) / max(1, rows) < 1


def sample_capacity(extra: int, columns: int) -> int:
    """Room for a sample of ``extra``, which may be one more, and another by rounding: the same at
    every call, and aligned."""
    return min(columns, -(-(extra + 2) // SAMPLE_STEP) * SAMPLE_STEP)


def capacity(given: int | None, ids: Tensor, extra: int, columns: int) -> int | None:
    """Room for a batch vocabulary. On GPUs, where its true size costs a host sync, the bound on it
    will do if that is small."""
    if given is not None or not ids.is_cuda:
        return given
    bound = -(-(ids.numel() + extra + 1) // CAPACITY_STEP) * CAPACITY_STEP
    return bound if bound <= BOUND_BELOW * columns else None


def in_forward(rows: TDRows, hidden: Tensor, weight: Tensor) -> bool:
    """Whether gradients can be made in forward: a chunk's loss must be a matter of its own rows
    and their neighbours, and to look at these a GPU would have to wait for its host. There products
    of float16 would also lose what a loss scale, which comes in backward, is there to keep."""
    return (
        rows.objective.rowwise
        and rows.state_value is None
        and learns(hidden, weight)
        and not torch.compiler.is_compiling()
        and not (hidden.is_cuda and rows.linked)
        and factor_dtype(hidden, weight) != torch.float16
    )


def head_is_frozen(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> bool:
    """Whether hidden states alone learn, whose gradient needs the logits once, and k head rows a
    position in backward. Factors of float16 wait for the loss scale."""
    learns_nothing = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    factors = factor_dtype(hidden, weight)
    if not (learns_nothing and torch.is_grad_enabled() and hidden.requires_grad):
        return False
    (columns, width), rows = weight.shape, hidden.shape[0]
    return factors != torch.float16 and gathers(
        weight.device.type, k, columns, width, rows, factors
    )


def row_kernel(rows: TDRows, hidden: Tensor) -> bool:
    """Whether one launch makes the loss of rows and its gradient, in place of a graph of small
    operators, each of which a GPU's host takes longer to launch than the GPU to compute."""
    return (
        hidden.is_cuda
        and type(rows.objective) is ForwardKL
        and rows.level in ("log_prob", "logit")
        and rows.state_value is None
    )


def learns(hidden: Tensor, weight: Tensor) -> bool:
    """Whether there is to be a backward pass."""
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def few(links: int, rows: int) -> bool:
    """Whether so many links between chunks of rows leave gradients in forward the better way."""
    return links <= MOST_LINKS * rows + 1


def describe(device: str, columns: int, width: int, rows: int = 2048) -> str:
    """The rule in words, at the size of a head and of a batch."""
    size = columns, width, rows
    gather = f"{gather_below(device, *size) * columns:,.0f}"
    share = f"k / {gather} + M / {batch_below(device, rows) * columns / SAMPLED_COST:,.0f}"
    limit = f"{1 - LAW_COST * min(LAW_ROWS, rows) / max(1, rows):.2f}"
    batch = f"{batch_below(device, rows):.2g}"
    low = factors_of(device, torch.bfloat16, torch.bfloat16, None)
    if device == "cpu" and low == torch.bfloat16:
        gather += f" ({gather_below(device, *size, low) * columns:,.0f} in bfloat16)"
        batch += f" ({batch_below(device, rows, low):.2g})"
    return (
        f"no normaliser: k head rows if k < {gather}, else all; batch: M columns if M < "
        f"{batch} V, else all; sampled: k head rows and M columns if {share} < {limit}, else all "
        f"(V = {columns:,}, H = {width}, {rows:,} rows); exact: all"
    )
