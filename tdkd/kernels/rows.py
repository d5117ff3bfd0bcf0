"""What the Triton kernels share: rows of logits, and mathematics on them.

Kernels address rows in 64 bits. The functions that launch them take any strides: rows may lie in a
batch of sequences that was sliced, without being copied.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.types import Scale

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the level of sums that hold nothing yet


class LogitRows(NamedTuple):
    """``[..., V]`` as rows: row r begins at (r // inner) * outer_stride + (r % inner) * stride."""

    data: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count
    columns: int
    inner: int
    outer_stride: int
    stride: int

    @property
    def aligned(self) -> bool:
        """Whether all rows begin at a multiple of 16 elements, so that loads can be wide."""
        return not (self.columns % 16 or self.outer_stride % 16 or self.stride % 16)

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.inner, self.outer_stride, self.stride


def logit_rows(x: Tensor) -> LogitRows:
    """Rows of ``x``, in place where at most two strides tell where they are."""
    columns, count = x.shape[-1], x.shape[:-1].numel()
    lead = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in lead:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2 or (columns > 1 and x.stride(-1) != 1):
        return logit_rows(x.contiguous())
    if len(merged) == 2:
        (_, outer), (inner, stride) = merged
        return LogitRows(x, count, columns, inner, outer, stride)
    stride = merged[0][1] if merged else columns
    return LogitRows(x, count, columns, max(count, 1), 0, stride)


class Numbers(NamedTuple):
    """A Scale as kernels take it: z = slope x, or z = outer tanh(inner x)."""

    slope: float
    inner: float
    outer: float
    capped: bool


def numbers(scale: Scale) -> Numbers:
    slope = scale.logit_scale / scale.temperature
    if scale.softcap is None:
        return Numbers(slope, 1.0, 1.0, False)
    return Numbers(
        slope, scale.logit_scale / scale.softcap, scale.softcap / scale.temperature, True
    )


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the one of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter, so that rows are split there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(rows: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """Programs a row, and columns of each (a multiple of ``block``): few rows are split."""
    tiles = max(1, triton.cdiv(columns, block))
    wanted = triton.cdiv(4 * processors(device), max(rows, 1))
    chunk = triton.cdiv(tiles, min(wanted, tiles)) * block
    return max(1, triton.cdiv(columns, chunk)), chunk


@triton.jit
def row_base(row, inner, outer_stride, stride):
    """Offset of a row, 64 bits."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * stride


@triton.jit
def tanh(x):
    """To 2e-7 relative: a softcap that is large against its logits multiplies small ones."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    # x + x^3 p(x^2) below 5/8, least maximal relative error in degree 4: 4e-9
    s = x * x
    p = ((-0.0057049785 * s + 0.020639079) * s - 0.053739712) * s + 0.13331442
    small = x + x * s * (p * s - 0.33333284)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -t, t))


@triton.jit
def scaled(x, slope, inner, outer, CAPPED: tl.constexpr):
    """Logits that a head means; -inf stays."""
    if CAPPED:
        return tl.where(x == float("-inf"), x, outer * tanh(x * inner))
    else:
        return x * slope


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """int32 in the order of floats, -0 and +0 alike; the low SHIFT bits, which the type of x never
    sets, are dropped."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def kth_largest(key, k, SHIFT: tl.constexpr):
    """The largest t with count(key >= t) >= k, of keys with 32 - SHIFT bits; the least key of that
    width where there are fewer than k. One bit a pass."""
    at_least_zero = tl.sum((key >= 0).to(tl.int32), 0)
    t = tl.where(at_least_zero >= k, 0, -(1 << (31 - SHIFT)))
    for i in range(31 - SHIFT):
        candidate = t + (1 << (30 - SHIFT - i))
        count = tl.sum((key >= candidate).to(tl.int32), 0)
        t = tl.where(count >= k, candidate, t)
    return t


@triton.jit
def keep_largest(key, eligible, t, k):
    """Which k elements have the largest keys (ties: the first), and each one's place among them; t
    is the k-th largest key."""
    above = eligible & (key > t)
    equal = (eligible & (key == t)).to(tl.int32)
    rank = tl.cumsum(equal, 0) - equal
    kept = above | ((equal > 0) & (rank < k - tl.sum(above.to(tl.int32), 0)))
    flag = kept.to(tl.int32)
    return kept, tl.cumsum(flag, 0) - flag


@triton.jit
def _add(id_a, value_a, id_b, value_b):
    return id_b, tl.where(id_a == id_b, value_a + value_b, value_b)


@triton.jit
def _scatter_rows(
    grad_z_ptr,
    ids_ptr,
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    state_ptr,
    order_ptr,
    grad_ptr,
    k,
    V,
    slope,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    j = tl.arange(0, K)
    slots = k
    if HAS_STATE:
        slots = tl.where(tl.load(state_ptr + row) != 0, slots, 0)
    ids = tl.load(ids_ptr + wide * k + j, mask=j < slots, other=-1).to(tl.int64)
    # slots of one id come to lie side by side, in the order of slots, and the last holds their sum
    ids = tl.where((ids >= 0) & (ids < V), ids, 0x7FFFFFFF)
    packed = tl.sort((ids << 32) | j)
    ids = packed >> 32
    slot = packed & 0xFFFFFFFF
    used = ids < V
    g = tl.load(grad_z_ptr + wide * k + slot, mask=used, other=0.0)
    _, total = tl.associative_scan((ids, g), 0, _add)
    tl.store(order_ptr + wide * K + j, ids)
    tl.debug_barrier()
    following = tl.load(order_ptr + wide * K + j + 1, mask=j + 1 < K, other=-1)
    last = used & (following != ids)
    if CAPPED:
        x = tl.load(x_ptr + row_base(row, inner_rows, outer_stride, stride) + ids, mask=last).to(
            tl.float32
        )
        t = tanh(x * inner)
        slope = slope * (1.0 - t * t)
    # a masked logit has no gradient, and 0 * inf would be NaN
    value = tl.where(total == 0.0, 0.0, total * slope)
    tl.store(grad_ptr + wide * V + ids, value.to(grad_ptr.dtype.element_ty), mask=last)


def scatter_rows(
    grad: Tensor,
    grad_z: Tensor,
    ids: Tensor,
    logits: LogitRows,
    scale: Numbers,
    state: Tensor | None = None,
) -> None:
    """``grad[r, id] = dz/dx sum of grad_z[r, j] over the slots j with that id``, contiguous."""
    k = ids.shape[-1]
    if not k or not logits.count:
        return
    block = triton.next_power_of_2(max(k, 16))
    order = torch.empty(logits.count, block, dtype=torch.int64, device=grad.device)
    _scatter_rows[(logits.count,)](
        grad_z.contiguous(),
        ids.contiguous(),
        logits.data,
        *logits.layout,
        ids if state is None else state.contiguous(),
        order,
        grad,
        k,
        logits.columns,
        scale.slope,
        scale.inner,
        scale.outer,
        CAPPED=scale.capped,
        HAS_STATE=state is not None,
        K=block,
        num_warps=slot_warps(block),
    )


def slot_warps(block: int) -> int:
    """Warps such that a thread holds at most 4 slots."""
    return max(1, min(8, block // 128))
