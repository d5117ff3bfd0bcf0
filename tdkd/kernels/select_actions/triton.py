"""select_actions on GPUs: a row is read once, as contiguous groups.

A stream over the vocabulary leaves each group's maximum and the sum of exponentials. The top k of a
row, ties by lowest id included, lie in the k groups with the largest maxima (ties: the first),
since an element outside is beaten by one of each of them. The second kernel, one warp a row, finds
those groups, reads them again, and sorts the few elements that reach the k-th largest maximum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels import tuning
from tdkd.kernels.rows import (
    LOG2E,
    LOWEST,
    keep_largest,
    kth_largest,
    logit_rows,
    numbers,
    on_device,
    ordered,
    row_base,
    scaled,
    split,
)
from tdkd.types import Scale

_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
_REACHED = 1.0 - 1e-5  # as in the reference: a prefix reaches top_p within this factor


@triton.jit
def _below(x, top, slope, inner, outer, CAPPED: tl.constexpr):
    """Scaled logits less the row's reference, before a temperature can round their level."""
    if CAPPED:
        return scaled(x, slope, inner, outer, CAPPED) - top
    return (x - top) * slope


@triton.jit
def _add_tile(x, level, total, slope_log2e, inner, outer, CAPPED: tl.constexpr):
    """One tile ``[groups, GROUP]`` onto sums that are relative to a level a group slot."""
    maxima = tl.max(x, 1)
    if CAPPED:
        # a cap would make +inf an ordinary logit
        x = tl.where(x == float("inf"), float("nan"), scaled(x, 1.0, inner, outer, CAPPED))
        top = tl.max(x, 1)
    else:
        top = maxima
    raised = tl.maximum(level, top)
    total = total * tl.exp2((level - raised) * slope_log2e)[:, None]
    total += tl.exp2((x - raised[:, None]) * slope_log2e)
    return maxima, raised, total


@triton.jit
def _stream(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    state_ptr,
    group_ptr,
    level_ptr,
    total_ptr,
    V,
    splits,
    chunk,
    groups,
    slope_log2e,
    inner,
    outer,
    CAPPED: tl.constexpr,
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
    group_ptr += row.to(tl.int64) * groups
    columns = tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tile = tl.arange(0, TILE)

    level = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE, GROUP], tl.float32)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for first in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        x = tl.load(x_ptr + first + columns).to(tl.float32)
        maxima, level, total = _add_tile(x, level, total, slope_log2e, inner, outer, CAPPED)
        tl.store(group_ptr + first // GROUP + tile, maxima.to(group_ptr.dtype.element_ty))
    if whole < end:
        x = tl.load(x_ptr + whole + columns, mask=whole + columns < end, other=float("-inf"))
        maxima, level, total = _add_tile(
            x.to(tl.float32), level, total, slope_log2e, inner, outer, CAPPED
        )
        here = whole // GROUP + tile
        tl.store(group_ptr + here, maxima.to(group_ptr.dtype.element_ty), mask=here < groups)
    # slots that saw nothing are left out, and a NaN stays one
    slot_total = tl.sum(total, 1)
    top = tl.max(level, 0)
    tl.store(level_ptr + program, top)
    tl.store(total_ptr + program, tl.sum(slot_total * tl.exp2((level - top) * slope_log2e), 0))


@triton.jit
def _candidates(x_ptr, list_ptr, first, n, V, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Values and columns of candidates first <= i < n, CHUNK of them: elements of x, or, where
    GROUP > 1, of the groups in a list; -inf where there are no more."""
    if GROUP > 1:
        g = first // GROUP + tl.arange(0, CHUNK // GROUP)
        live = g < n // GROUP
        group = tl.load(list_ptr + g, mask=live, other=0)
        tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(x_ptr + tile, mask=live[:, None] & (tile < V), other=float("-inf"))
        column = tl.reshape(tile, [CHUNK])
        x = tl.reshape(x, [CHUNK])
    else:
        column = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + column, mask=column < n, other=float("-inf"))
    return x.to(tl.float32), column


@triton.jit
def _float_of(key, SHIFT: tl.constexpr):
    """The least float whose key is no smaller, of those that are logits: not -inf."""
    bits = key << SHIFT
    x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(x >= LOWEST, x, LOWEST)


@triton.jit
def _filter(
    x_ptr,
    list_ptr,
    n,
    V,
    least,
    found_ptr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Stores the columns of the first CAP candidates x >= least, in order; returns how many there
    are."""
    count = 0
    for first in range(0, n, CHUNK):
        x, column = _candidates(x_ptr, list_ptr, first, n, V, CHUNK, GROUP)
        hit = x >= least
        flags = hit.to(tl.int32)
        upto = tl.cumsum(flags, 0)
        place = count + upto - flags
        tl.store(found_ptr + place, column, mask=hit & (place < CAP))
        count += tl.max(upto, 0)
    return count


@triton.jit
def _filter_ties(
    x_ptr,
    list_ptr,
    n,
    V,
    t,
    room,
    found_ptr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The same of candidates with keys above t and, of those that equal it, the first ``room``."""
    kept_before = 0
    equal_before = 0
    for first in range(0, n, CHUNK):
        x, column = _candidates(x_ptr, list_ptr, first, n, V, CHUNK, GROUP)
        key = ordered(x, SHIFT)
        eligible = x > float("-inf")
        above = eligible & (key > t)
        equal = eligible & (key == t)
        # both counts in one scan and one sum: a chunk is shorter than 2^15
        flags = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(flags, 0) - flags
        space = tl.maximum(room - equal_before, 0)
        rank = before >> 16
        place = kept_before + (before & 0xFFFF) + tl.minimum(rank, space)
        stored = (above | (equal & (rank < space))) & (place < CAP)
        tl.store(found_ptr + place, column, mask=stored)
        counts = tl.sum(flags, 0)
        kept_before += (counts & 0xFFFF) + tl.minimum(counts >> 16, space)
        equal_before += counts >> 16
    return kept_before


@triton.jit
def _count(
    x_ptr, list_ptr, n, V, least, CHUNK: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr
):
    """Candidates with keys >= least."""
    count = tl.zeros([CHUNK], tl.int32)
    for first in range(0, n, CHUNK):
        x, _ = _candidates(x_ptr, list_ptr, first, n, V, CHUNK, GROUP)
        count += ((x > float("-inf")) & (ordered(x, SHIFT) >= least)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _search(
    x_ptr, list_ptr, n, V, k, CHUNK: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr
):
    """kth_largest over candidates in memory, and how many of those that equal it are wanted."""
    count = _count(x_ptr, list_ptr, n, V, 0, CHUNK, GROUP, SHIFT)
    t = tl.where(count >= k, 0, -(1 << (31 - SHIFT)))
    for b in range(31 - SHIFT):
        candidate = t + (1 << (30 - SHIFT - b))
        count = _count(x_ptr, list_ptr, n, V, candidate, CHUNK, GROUP, SHIFT)
        t = tl.where(count >= k, candidate, t)
    return t, k - _count(x_ptr, list_ptr, n, V, t + 1, CHUNK, GROUP, SHIFT)


@triton.jit
def _reach(
    x_ptr,
    list_ptr,
    n,
    V,
    t,
    k,
    found_ptr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Stores the columns of candidates with keys >= t, a bound from below on the k-th largest:
    enough for the k largest (ties: the first), and at most CAP; returns how many there are."""
    found = _filter(x_ptr, list_ptr, n, V, _float_of(t, SHIFT), found_ptr, CHUNK, CAP, GROUP)
    if found > CAP:  # many that are equal, or a bound that is far off
        tl.debug_barrier()
        found = _filter_ties(x_ptr, list_ptr, n, V, t, k, found_ptr, CHUNK, CAP, GROUP, SHIFT)
        if found > CAP:
            t, room = _search(x_ptr, list_ptr, n, V, k, CHUNK, GROUP, SHIFT)
            tl.debug_barrier()
            found = _filter_ties(
                x_ptr, list_ptr, n, V, t, room, found_ptr, CHUNK, CAP, GROUP, SHIFT
            )
    tl.debug_barrier()
    return found


@triton.jit
def _select(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    state_ptr,
    taken_ptr,
    group_ptr,
    level_ptr,
    total_ptr,
    list_ptr,
    found_ptr,
    ids_ptr,
    log_probs_ptr,
    count_ptr,
    V,
    splits,
    groups,
    k,
    reach,
    slope,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_TAKEN: tl.constexpr,
    CAP: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    x_ptr += row_base(row, inner_rows, outer_stride, stride)
    group_ptr += wide * groups
    list_ptr += wide * CAP
    found_ptr += wide * CAP

    s = tl.arange(0, SPLITS)
    level = tl.load(level_ptr + wide * splits + s, mask=s < splits, other=LOWEST)
    total = tl.load(total_ptr + wide * splits + s, mask=s < splits, other=0.0)
    c = LOG2E if CAPPED else slope * LOG2E
    top = tl.max(level, 0)
    whole = tl.sum(total * tl.exp2((level - top) * c), 0)
    log_whole = tl.log(whole)
    usable = whole > 0.0  # not so where the sum is NaN
    if HAS_STATE:
        usable = usable & (tl.load(state_ptr + row) != 0)
    groups = tl.where(usable, groups, 0)

    # the k-th largest of maxima over several groups each is no larger than that over all groups
    i = tl.arange(0, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    for first in range(0, groups, CHUNK):
        maxima = tl.load(group_ptr + first + i, mask=first + i < groups, other=float("-inf"))
        best = tl.maximum(best, maxima.to(tl.float32))
    t = kth_largest(ordered(best, SHIFT), k, SHIFT)

    # the k groups with the largest maxima, in order
    n = _reach(group_ptr, list_ptr, groups, groups, t, k, found_ptr, CHUNK, CAP, 1, SHIFT)
    m = tl.arange(0, CAP)
    group = tl.load(found_ptr + m, mask=m < n, other=0)
    maxima = tl.load(group_ptr + group, mask=m < n, other=float("-inf")).to(tl.float32)
    key = ordered(maxima, SHIFT)
    t = kth_largest(key, k, SHIFT)
    kept, place = keep_largest(key, m < n, t, k)
    tl.store(list_ptr + place, group, mask=kept)
    looked = tl.sum(kept.to(tl.int32), 0) * GROUP
    tl.debug_barrier()

    # their elements that reach the k-th largest maximum, by key descending, then id ascending
    n = _reach(x_ptr, list_ptr, looked, V, t, k, found_ptr, CHUNK, CAP, GROUP, SHIFT)
    ids = tl.load(found_ptr + m, mask=m < n, other=0)
    x = tl.load(x_ptr + ids, mask=m < n, other=float("-inf")).to(tl.float32)
    packed = ((~ordered(x, SHIFT)).to(tl.int64) << 32) | ids.to(tl.int64)
    packed = tl.sort(tl.where(m < n, packed, 0x7FFFFFFFFFFFFFFF))
    ids = (packed & 0xFFFFFFFF).to(tl.int32)
    n = tl.minimum(n, k)
    x = tl.load(x_ptr + ids, mask=m < n, other=float("-inf")).to(tl.float32)
    log_probs = _below(x, top, slope, inner, outer, CAPPED) - log_whole
    probs = tl.where(m < n, tl.exp(log_probs), 0.0)
    before = tl.cumsum(probs, 0) - probs
    n = tl.minimum(n, tl.min(tl.where(before < reach, CAP, m), 0))
    ids = tl.where(m < n, ids, -1)
    log_probs = tl.where(m < n, log_probs, float("-inf"))
    if HAS_TAKEN:
        taken = tl.load(taken_ptr + row)
        has = tl.sum((ids == taken).to(tl.int32), 0) > 0
        added = usable & (taken >= 0) & (has == 0)
        slot = tl.where(added, tl.minimum(n, k - 1), -1)
        # an id that is no column has no probability
        x_taken = tl.load(x_ptr + taken, mask=added & (taken < V), other=float("nan"))
        z_taken = _below(x_taken.to(tl.float32), top, slope, inner, outer, CAPPED)
        ids = tl.where(m == slot, taken.to(tl.int32), ids)
        log_probs = tl.where(m == slot, z_taken - log_whole, log_probs)
        n = tl.where(added, slot + 1, n)
    tl.store(ids_ptr + wide * k + m, ids, mask=m < k)
    tl.store(log_probs_ptr + wide * k + m, log_probs, mask=m < k)
    tl.store(count_ptr + row, n)


def group_size(vocab: int, k: int) -> int:
    """Logits a group, such that a row's groups and the k that are read again are few together."""

    def held(group: int) -> int:
        return triton.cdiv(vocab, group) + k * group

    return min((128, 64, 32, 16), key=held)


class Blocks(NamedTuple):
    """Sizes of what the second kernel holds for a k."""

    cap: int
    """candidates that are sorted; more of them are searched first."""
    chunk: int
    """elements looked at together: maxima of so many sets of groups bound the k-th from below."""
    warps: int


def blocks(k: int) -> Blocks:
    cap = 2 * triton.next_power_of_2(max(k, 32))
    chunk = 2 * cap
    return Blocks(cap, chunk, max(1, min(16, chunk // 256)))


def select_actions(
    logits: Tensor,
    k: int,
    top_p: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    include: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logit_rows(logits)
    n, vocab, device = rows.count, rows.columns, logits.device
    lead = logits.shape[:-1]
    ids = torch.empty((*lead, k), dtype=torch.int32, device=device)
    log_probs = torch.empty((*lead, k), dtype=torch.float32, device=device)
    count = torch.empty(lead, dtype=torch.int32, device=device)
    if not n:
        return ids, log_probs, count
    if not vocab:
        return ids.fill_(-1), log_probs.fill_(-torch.inf), count.zero_()

    scale = numbers(Scale(temperature, softcap, logit_scale))
    held = blocks(k)
    group = group_size(vocab, k)
    launch = tuning.config("select_stream", device, scale.capped or not rows.aligned)
    # a multiple of 16, so that a row's maxima can be read 16 bytes at once; the last tile writes
    # those beyond the vocabulary, which are -inf
    multiple = min(16, launch.block // group)
    groups = triton.cdiv(triton.cdiv(vocab, group), multiple) * multiple
    splits, chunk = split(n, vocab, launch.block, device)
    maxima = torch.empty(n, groups, dtype=logits.dtype, device=device)
    listed, found = torch.empty(2, n, held.cap, dtype=torch.int32, device=device)
    live = count if state is None else state.contiguous()
    taken = count if include is None else include.contiguous()
    level, total = torch.empty(2, n, splits, dtype=torch.float32, device=device)
    with on_device(logits):
        _stream[(n * splits,)](
            rows.data,
            *rows.layout,
            live,
            maxima,
            level,
            total,
            vocab,
            splits,
            chunk,
            groups,
            (1.0 if scale.capped else scale.slope) * LOG2E.value,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            HAS_STATE=state is not None,
            BLOCK=launch.block,
            GROUP=group,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
        _select[(n,)](
            rows.data,
            *rows.layout,
            live,
            taken,
            maxima,
            level,
            total,
            listed,
            found,
            ids,
            log_probs,
            count,
            vocab,
            splits,
            groups,
            k,
            top_p * _REACHED if top_p < 1.0 else 2.0,
            scale.slope,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            HAS_STATE=state is not None,
            HAS_TAKEN=include is not None,
            CAP=held.cap,
            CHUNK=held.chunk,
            GROUP=group,
            SPLITS=triton.next_power_of_2(splits),
            SHIFT=_SHIFT[logits.dtype],
            num_warps=held.warps,
        )
    return ids, log_probs, count
