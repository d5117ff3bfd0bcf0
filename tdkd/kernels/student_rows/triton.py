"""student_rows on GPUs: one read of the row forward, one read and one dense write backward.

The stream leaves a logsumexp of each contiguous group of 64 columns. The second kernel repeats it
for the few groups that hold members of the set, without those, and joins them all: nothing is ever
subtracted, so the mass outside the set is exact where the set holds nearly all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels import tuning
from tdkd.kernels.rows import (
    LOG2E,
    Numbers,
    logit_rows,
    numbers,
    on_device,
    row_base,
    scaled,
    scatter_rows,
    split,
    tanh,
)
from tdkd.types import Scale

GROUP = 64  # columns a group: the bits of an int64


@triton.jit
def _levels(
    x, weight_ptr, mask, slope, inner, outer, CAPPED: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """What sums are taken of: z and its weight, or x, whose slope is left to the exponent."""
    if CAPPED or HAS_WEIGHT:
        x = scaled(x, slope, inner, outer, CAPPED)
    if HAS_WEIGHT:
        x += tl.load(weight_ptr, mask=mask, other=0.0)
    return x


@triton.jit
def _group_sums(v, slope_log2e):
    """logsumexp over axis 1 in the units of v; -inf where all are. In float64, since the rounding
    of a level of 1000 would be an error of 3e-5 in every weight, and relative to no element: any
    one may be a large negative number that suppresses its token."""
    top = tl.max(v, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((v - top[:, None]) * slope_log2e), 1)
    above = tl.log2(total) * (1.0 / slope_log2e)
    return tl.where(total == 0.0, float("-inf"), top.to(tl.float64) + above.to(tl.float64))


@triton.jit
def _stream(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    weight_ptr,
    state_ptr,
    sums_ptr,
    V,
    splits,
    chunk,
    groups,
    slope,
    slope_log2e,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE: tl.constexpr = BLOCK // GROUP
    program = tl.program_id(0)
    row = program // splits
    begin = (program % splits) * chunk
    end = tl.minimum(begin + chunk, V)
    if HAS_STATE:
        end = tl.where(tl.load(state_ptr + row) != 0, end, begin)
    x_ptr += row_base(row, inner_rows, outer_stride, stride)
    sums_ptr += row.to(tl.int64) * groups
    columns = tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tile = tl.arange(0, TILE)

    whole = begin + (end - begin) // BLOCK * BLOCK
    for first in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        v = tl.load(x_ptr + first + columns).to(tl.float32)
        weights = weight_ptr + first + columns
        v = _levels(v, weights, first + columns < end, slope, inner, outer, CAPPED, HAS_WEIGHT)
        tl.store(sums_ptr + first // GROUP + tile, _group_sums(v, slope_log2e))
    if whole < end:
        inside = whole + columns < end
        v = tl.load(x_ptr + whole + columns, mask=inside, other=float("-inf")).to(tl.float32)
        weights = weight_ptr + whole + columns
        v = _levels(v, weights, inside, slope, inner, outer, CAPPED, HAS_WEIGHT)
        here = whole // GROUP + tile
        tl.store(sums_ptr + here, _group_sums(v, slope_log2e), mask=here < groups)


@triton.jit
def _join(group_a, bits_a, group_b, bits_b):
    """Bits of one run of a group, gathered at its end."""
    return group_b, bits_b | tl.where(group_a == group_b, bits_a, 0)


@triton.jit
def _finish(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    weight_ptr,
    state_ptr,
    ids_ptr,
    order_ptr,
    members_ptr,
    sums_ptr,
    z_ptr,
    log_rest_ptr,
    V,
    groups,
    k,
    slope,
    slope_log2e,
    unit,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    x_ptr += row_base(row, inner_rows, outer_stride, stride)
    sums_ptr += wide * groups
    order_ptr += wide * K
    members_ptr += wide * K

    j = tl.arange(0, K)
    slots = k
    if HAS_STATE:
        live = tl.load(state_ptr + row) != 0
        slots = tl.where(live, slots, 0)
        groups = tl.where(live, groups, 0)
    ids = tl.load(ids_ptr + wide * k + j, mask=j < slots, other=-1).to(tl.int64)
    x = tl.load(x_ptr + ids, mask=(ids >= 0) & (ids < V), other=float("nan")).to(tl.float32)
    z = tl.where(ids < 0, float("-inf"), scaled(x, slope, inner, outer, CAPPED))
    tl.store(z_ptr + wide * k + j, z, mask=j < k)

    # members by id: those of a group lie side by side, and the last of them knows all
    NONE: tl.constexpr = 0x7FFFFFFF
    order = tl.sort(tl.where((ids >= 0) & (ids < V), ids, NONE).to(tl.int32))
    group = order // GROUP
    bit = tl.full([K], 1, tl.int64) << (order % GROUP).to(tl.int64)
    _, members = tl.associative_scan((group, bit), 0, _join)
    tl.store(order_ptr + j, group)
    tl.store(members_ptr + j, members)
    used = tl.sum((order < NONE).to(tl.int32), 0)
    tl.debug_barrier()
    lane = tl.arange(0, GROUP)[None, :]
    for first in range(0, used, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        here = tl.load(order_ptr + slot)
        inside = tl.load(members_ptr + slot)
        following = tl.load(order_ptr + slot + 1, mask=slot + 1 < K, other=-1)
        last = (slot < used) & (following != here)
        column = here[:, None] * GROUP + lane
        outside = ((inside[:, None] >> lane.to(tl.int64)) & 1) == 0
        wanted = last[:, None] & outside & (column < V)
        v = tl.load(x_ptr + column, mask=wanted, other=float("-inf")).to(tl.float32)
        weights = weight_ptr + column
        v = _levels(v, weights, wanted, slope, inner, outer, CAPPED, HAS_WEIGHT)
        tl.store(sums_ptr + here, _group_sums(v, slope_log2e), mask=last)
    tl.debug_barrier()

    g = tl.arange(0, GROUPS)
    sums = tl.load(sums_ptr + g, mask=g < groups, other=float("-inf"))
    top = tl.max(sums, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((sums - top).to(tl.float32) * slope_log2e), 0)
    log_rest = top * unit + tl.log(total.to(tl.float64))
    tl.store(log_rest_ptr + row, tl.where(total == 0.0, float("-inf"), log_rest))


@triton.jit
def _gradient_of(
    x,
    weight_ptr,
    mask,
    center,
    factor,
    slope,
    slope_log2e,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    v = _levels(x, weight_ptr, mask, slope, inner, outer, CAPPED, HAS_WEIGHT)
    if CAPPED:
        t = tanh(x * inner)
        factor = factor * (1.0 - t * t)
    # a member may overflow here; its own gradient takes this one's place
    return tl.where(v == float("-inf"), 0.0, factor * tl.exp2((v - center) * slope_log2e))


@triton.jit
def _gradient(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    weight_ptr,
    state_ptr,
    log_rest_ptr,
    grad_rest_ptr,
    grad_ptr,
    V,
    splits,
    chunk,
    slope,
    slope_log2e,
    unit,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // splits
    begin = (program % splits) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row_base(row, inner_rows, outer_stride, stride)
    grad_ptr += row.to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    log_rest = tl.load(log_rest_ptr + row)
    grad_rest = tl.load(grad_rest_ptr + row).to(tl.float32)
    live = (grad_rest != 0.0) & (log_rest != float("-inf"))
    if HAS_STATE:
        live = live & (tl.load(state_ptr + row) != 0)
    whole = begin + (end - begin) // BLOCK * BLOCK
    if live:
        # exp(z - log_rest) from a rounded centre; what rounding it left goes into the factor
        center = (log_rest / unit).to(tl.float32)
        factor = grad_rest * slope * tl.exp(center.to(tl.float64) * unit - log_rest).to(tl.float32)
        for first in tl.range(begin, whole, BLOCK, num_stages=STAGES):
            x = tl.load(x_ptr + first + columns).to(tl.float32)
            grad = _gradient_of(
                x,
                weight_ptr + first + columns,
                first + columns < end,
                center,
                factor,
                slope,
                slope_log2e,
                inner,
                outer,
                CAPPED,
                HAS_WEIGHT,
            )
            tl.store(grad_ptr + first + columns, grad.to(grad_ptr.dtype.element_ty))
        if whole < end:
            inside = whole + columns < end
            x = tl.load(x_ptr + whole + columns, mask=inside, other=float("-inf")).to(tl.float32)
            grad = _gradient_of(
                x,
                weight_ptr + whole + columns,
                inside,
                center,
                factor,
                slope,
                slope_log2e,
                inner,
                outer,
                CAPPED,
                HAS_WEIGHT,
            )
            tl.store(grad_ptr + whole + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        for first in tl.range(begin, end, BLOCK):
            zero = tl.zeros([BLOCK], grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + first + columns, zero, mask=first + columns < end)


def student_rows(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    log_weight: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = logit_rows(logits)
    n, vocab, k, device = rows.count, rows.columns, ids.shape[-1], logits.device
    z = torch.empty(ids.shape, dtype=torch.float32, device=device)
    log_rest = torch.empty(logits.shape[:-1], dtype=torch.float64, device=device)
    if not n:
        return z, log_rest
    if not vocab:
        return z.fill_(-torch.inf), log_rest.fill_(-torch.inf)

    scale = numbers(Scale(temperature, softcap, logit_scale))
    unit = _unit(scale, log_weight)
    heavy = scale.capped or log_weight is not None or not rows.aligned
    launch = tuning.config("student_stream", device, heavy)
    splits, chunk = split(n, vocab, launch.block, device)
    groups = triton.cdiv(vocab, GROUP)
    block_k = triton.next_power_of_2(max(k, 16))
    sums = torch.empty(n, groups, dtype=torch.float64, device=device)
    order = torch.empty(n, block_k, dtype=torch.int32, device=device)
    members = torch.empty(n, block_k, dtype=torch.int64, device=device)
    weight = sums if log_weight is None else log_weight.contiguous()
    live = ids if state is None else state.contiguous()
    block_groups = triton.next_power_of_2(max(groups, 16))
    with on_device(logits):
        _stream[(n * splits,)](
            rows.data,
            *rows.layout,
            weight,
            live,
            sums,
            vocab,
            splits,
            chunk,
            groups,
            scale.slope,
            unit * LOG2E.value,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            HAS_WEIGHT=log_weight is not None,
            HAS_STATE=state is not None,
            BLOCK=launch.block,
            GROUP=GROUP,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
        _finish[(n,)](
            rows.data,
            *rows.layout,
            weight,
            live,
            ids.contiguous(),
            order,
            members,
            sums,
            z,
            log_rest,
            vocab,
            groups,
            k,
            scale.slope,
            unit * LOG2E.value,
            unit,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            HAS_WEIGHT=log_weight is not None,
            HAS_STATE=state is not None,
            K=block_k,
            SLOTS=16,
            GROUP=GROUP,
            GROUPS=block_groups,
            num_warps=finish_warps(block_k, block_groups),
        )
    return z, log_rest


def finish_warps(block_k: int, block_groups: int) -> int:
    """Warps such that a thread holds at most 16 groups and 4 ids."""
    return max(1, min(16, max(4 * block_k, block_groups) // 512))


def student_rows_backward(
    grad_z: Tensor, grad_rest: Tensor, logits: Tensor, *options: Any
) -> Tensor:
    given = grad_z, grad_rest, logits, *options, logits.dtype
    return student_rows_backward_as(*given)


def student_rows_backward_as(
    grad_z: Tensor,
    grad_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_rest: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    log_weight: Tensor | None,
    state: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    scale = numbers(Scale(temperature, softcap, logit_scale))
    _write_gradient(grad, grad_z, grad_rest, logits, ids, log_rest, scale, log_weight, state)
    return grad


def student_rows_backward_(
    grad_z: Tensor,
    grad_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_rest: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    log_weight: Tensor | None,
    state: Tensor | None,
) -> None:
    scale = numbers(Scale(temperature, softcap, logit_scale))
    if scale.capped and logits.numel():
        # the slope at the members is read from logits that will be gone
        x = logits.gather(-1, ids.long().clamp(0, logits.shape[-1] - 1)).float()
        grad_z = grad_z * (1.0 - torch.tanh(x * scale.inner).square())
    _write_gradient(logits, grad_z, grad_rest, logits, ids, log_rest, scale, log_weight, state)


def _write_gradient(
    grad: Tensor,
    grad_z: Tensor,
    grad_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_rest: Tensor,
    scale: Numbers,
    log_weight: Tensor | None,
    state: Tensor | None,
) -> None:
    """Into contiguous ``grad``, which may be ``logits``: a tile is read before it is written, and
    ``grad_z`` then holds the slope of a softcap already."""
    rows = logit_rows(logits)
    n, vocab, device = rows.count, rows.columns, logits.device
    if not grad.numel():
        return
    unit = _unit(scale, log_weight)
    heavy = scale.capped or log_weight is not None or not rows.aligned
    launch = tuning.config("student_grad", device, heavy)
    splits, chunk = split(n, vocab, launch.block, device)
    with on_device(logits):
        _gradient[(n * splits,)](
            rows.data,
            *rows.layout,
            grad if log_weight is None else log_weight.contiguous(),
            ids if state is None else state.contiguous(),
            log_rest,
            grad_rest.contiguous(),
            grad,
            vocab,
            splits,
            chunk,
            scale.slope,
            unit * LOG2E.value,
            unit,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            HAS_WEIGHT=log_weight is not None,
            HAS_STATE=state is not None,
            BLOCK=launch.block,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
        members = scale._replace(capped=scale.capped and grad is not logits)
        scatter_rows(grad, grad_z, ids, rows, members, state)


def _unit(scale: Numbers, log_weight: Tensor | None) -> float:
    """What sums count in: x where its slope can wait, z where a cap or a weight comes between."""
    return 1.0 if scale.capped or log_weight is not None else scale.slope
