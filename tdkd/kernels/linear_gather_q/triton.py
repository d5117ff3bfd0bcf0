"""linear_gather_q on GPUs: k head rows a position, and nothing else of the head.

The gradient of the head is summed over slots that lie sorted by id, in tiles of ``TILE``. A tile's
program takes the segments (slots of one id) that begin in it, and follows the last one into the
next tile if it ends there. Where it does not, every tile that it fills has a program of its own,
the parts go to a room of one row a tile, and ``_join`` adds them in order. So no program has more
than two tiles to read, however often an id occurs, and every sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import on_device

TILE = 128
"""Sorted slots of a program: few enough to fill a GPU, so many that the room stays small."""
SLOTS, PRODUCT_SLOTS = 8, 4
"""Head rows that a program holds at once: they are loaded together."""
_BYTES = 2048
"""Of a row, in one program: 16 a thread. Then a thread holds the same columns of all rows, and no
sum over rows, nor a change of layout, goes through shared memory."""
WARPS = 4


@triton.jit
def _products(
    h_ptr,
    h_stride,
    w_ptr,
    w_stride,
    bias_ptr,
    ids_ptr,
    z_ptr,
    V,
    H,
    k,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    groups = tl.cdiv(k, SLOTS)
    row = (tl.program_id(0) // groups).to(tl.int64)
    j = tl.program_id(0) % groups * SLOTS + tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + row * k + j, mask=j < k, other=-1).to(tl.int64)
    member = (ids >= 0) & (ids < V)
    # an id that is no row of the head has no product
    z = tl.where(ids < V, 0.0, float("nan"))
    if HAS_BIAS:
        z += tl.load(bias_ptr + ids, mask=member, other=0.0)
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    columns = tl.arange(0, COLUMNS)
    width = tl.where(tl.max(member.to(tl.int32), 0) > 0, H, 0)  # slots that pad cost nothing
    for first in range(0, width, COLUMNS):
        here = first + columns
        h = tl.load(h_ptr + row * h_stride + here, mask=here < H, other=0.0)
        w = tl.load(
            w_ptr + ids[:, None] * w_stride + here[None, :],
            mask=member[:, None] & (here < H)[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * h.to(tl.float32)[None, :]
    tl.store(z_ptr + row * k + j, z + tl.sum(total, 1), mask=j < k)


@triton.jit
def _by_hidden(
    grad_ptr,
    w_ptr,
    w_stride,
    ids_ptr,
    out_ptr,
    V,
    H,
    k,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # programs of one row lie side by side, so that head rows are read whole
    blocks = tl.cdiv(H, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    here = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    slots = tl.arange(0, SLOTS)
    for first in range(0, k, SLOTS):
        j = first + slots
        ids = tl.load(ids_ptr + row * k + j, mask=j < k, other=-1).to(tl.int64)
        member = (ids >= 0) & (ids < V)
        if tl.max(member.to(tl.int32), 0) > 0:
            g = tl.load(grad_ptr + row * k + j, mask=member, other=0.0)
            w = tl.load(
                w_ptr + ids[:, None] * w_stride + here[None, :],
                mask=member[:, None] & (here < H)[None, :],
                other=0.0,
            )
            total += tl.sum(w.to(tl.float32) * g[:, None], 0)
    tl.store(out_ptr + row * H + here, total.to(out_ptr.dtype.element_ty), mask=here < H)


@triton.jit
def _lay_out(
    ids_ptr,
    slot_ptr,
    grad_ptr,
    row_ptr,
    g_ptr,
    begin_ptr,
    slots,
    k,
    TILE: tl.constexpr,
):
    """Row and gradient of each sorted slot, and where in its tile the first segment begins: TILE
    where the one from the tile before fills it. One tile more than there are begins at 0."""
    tile = tl.program_id(0)
    j = tl.arange(0, TILE)
    at = tile.to(tl.int64) * TILE + j
    inside = at < slots
    id = tl.load(ids_ptr + at, mask=inside, other=-1)
    before = tl.load(ids_ptr + at - 1, mask=inside & (at > 0), other=-1)
    begins = (id != before) | (at == 0) | (at >= slots)
    tl.store(begin_ptr + tile, tl.min(tl.where(begins, j, TILE), 0))
    slot = tl.load(slot_ptr + at, mask=inside, other=0)
    tl.store(row_ptr + at, (slot // k).to(tl.int32), mask=inside)
    tl.store(g_ptr + at, tl.load(grad_ptr + slot, mask=inside, other=0.0), mask=inside)


@triton.jit
def _finish(total, bias, id, weight_ptr, bias_ptr, V, H, here):
    """Writes the row of an id that is one."""
    if (id >= 0) & (id < V):
        value = total.to(weight_ptr.dtype.element_ty)
        # not read again here, unlike the hidden states, which are to stay in the cache
        to = weight_ptr + id.to(tl.int64) * H + here
        tl.store(to, value, mask=here < H, eviction_policy="evict_first")
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + id, bias)


@triton.jit
def _add(total, bias, id, following, g, h, weight_ptr, bias_ptr, V, H, here):
    """One slot more; the row before is written if the slot is of another id."""
    if following != id:
        _finish(total, bias, id, weight_ptr, bias_ptr, V, H, here)
        total = tl.zeros_like(total)
        bias = 0.0
    return total + g * h.to(tl.float32), bias + g, following


@triton.jit
def _by_head(
    ids_ptr,
    row_ptr,
    g_ptr,
    begin_ptr,
    h_ptr,
    h_stride,
    weight_ptr,
    bias_ptr,
    room_ptr,
    bias_room_ptr,
    slots,
    V,
    H,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_ptr + tile)
    end = tl.load(begin_ptr + tile + 1)
    # the last segment has parts in more than one tile
    parted = (begin == TILE) | (end == TILE)
    at = tile * TILE + begin % TILE
    n = (tl.minimum((tile + 1) * TILE + end % TILE, slots) - at).to(tl.int32)
    ids_ptr += at
    row_ptr += at
    g_ptr += at
    id = tl.load(ids_ptr, mask=n > 0, other=-1)
    last = tl.load(ids_ptr + n - 1, mask=n > 0, other=-1)
    if (last >= 0) & (id < V):
        here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = here < H
        total = tl.zeros([COLUMNS], tl.float32)
        bias = 0.0
        # four rows are on their way at a time; past the end it is the last one, of no weight
        for j in range(0, n, 4):
            j1, j2, j3 = (
                tl.minimum(j + 1, n - 1),
                tl.minimum(j + 2, n - 1),
                tl.minimum(j + 3, n - 1),
            )
            r0 = tl.load(row_ptr + j).to(tl.int64)
            r1 = tl.load(row_ptr + j1).to(tl.int64)
            r2 = tl.load(row_ptr + j2).to(tl.int64)
            r3 = tl.load(row_ptr + j3).to(tl.int64)
            h0 = tl.load(h_ptr + r0 * h_stride + here, mask=inside, other=0.0)
            h1 = tl.load(h_ptr + r1 * h_stride + here, mask=inside, other=0.0)
            h2 = tl.load(h_ptr + r2 * h_stride + here, mask=inside, other=0.0)
            h3 = tl.load(h_ptr + r3 * h_stride + here, mask=inside, other=0.0)
            i0 = tl.load(ids_ptr + j)
            i1 = tl.load(ids_ptr + j1)
            i2 = tl.load(ids_ptr + j2)
            i3 = tl.load(ids_ptr + j3)
            g0 = tl.load(g_ptr + j)
            g1 = tl.load(g_ptr + j1, mask=j + 1 < n, other=0.0)
            g2 = tl.load(g_ptr + j2, mask=j + 2 < n, other=0.0)
            g3 = tl.load(g_ptr + j3, mask=j + 3 < n, other=0.0)
            total, bias, id = _add(total, bias, id, i0, g0, h0, weight_ptr, bias_ptr, V, H, here)
            total, bias, id = _add(total, bias, id, i1, g1, h1, weight_ptr, bias_ptr, V, H, here)
            total, bias, id = _add(total, bias, id, i2, g2, h2, weight_ptr, bias_ptr, V, H, here)
            total, bias, id = _add(total, bias, id, i3, g3, h3, weight_ptr, bias_ptr, V, H, here)
        if parted:
            tl.store(room_ptr + tile * H + here, total, mask=inside)
            if tl.program_id(1) == 0:
                tl.store(bias_room_ptr + tile, bias)
        else:
            _finish(total, bias, id, weight_ptr, bias_ptr, V, H, here)


@triton.jit
def _join(
    ids_ptr,
    begin_ptr,
    room_ptr,
    bias_room_ptr,
    weight_ptr,
    bias_ptr,
    V,
    H,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The program of the tile in which a parted segment begins adds its parts."""
    tile = tl.program_id(0).to(tl.int64)
    if (tl.load(begin_ptr + tile) < TILE) & (tl.load(begin_ptr + tile + 1) == TILE):
        id = tl.load(ids_ptr + (tile + 1) * TILE - 1)
        if (id >= 0) & (id < V):
            here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.load(room_ptr + tile * H + here, mask=here < H, other=0.0)
            bias = tl.load(bias_room_ptr + tile)
            tile += 1
            while tl.load(begin_ptr + tile) == TILE:
                total += tl.load(room_ptr + tile * H + here, mask=here < H, other=0.0)
                bias += tl.load(bias_room_ptr + tile)
                tile += 1
            _finish(total, bias, id, weight_ptr, bias_ptr, V, H, here)


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def columns_of(dtype: torch.dtype) -> int:
    """Of a row of that dtype, in one program."""
    return _BYTES // dtype.itemsize


def head_products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    (rows, width), k = hidden.shape, ids.shape[-1]
    z = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    if z.numel():
        hidden, weight = _rows_of(hidden), _rows_of(weight)
        with on_device(hidden):
            _products[(rows * triton.cdiv(k, PRODUCT_SLOTS),)](
                hidden,
                hidden.stride(0),
                weight,
                weight.stride(0),
                z if bias is None else bias.contiguous(),
                ids.contiguous(),
                z,
                weight.shape[0],
                width,
                k,
                HAS_BIAS=bias is not None,
                SLOTS=PRODUCT_SLOTS,
                COLUMNS=columns_of(weight.dtype),
                num_warps=WARPS,
            )
    return z


def head_products_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, of_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums are float32; the gradients of hidden states and head are rounded to their dtypes."""
    (rows, width), k, device = hidden.shape, ids.shape[-1], hidden.device
    vocab = weight.shape[0] if of_head else 0
    by_weight = torch.zeros((vocab, width), dtype=weight.dtype, device=device)
    by_bias = torch.zeros(vocab, dtype=torch.float32, device=device)
    slots = ids.numel()
    if not slots or not width:
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format), by_weight, by_bias
    by_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=device)
    grad, hidden, weight = grad.contiguous(), _rows_of(hidden), _rows_of(weight)
    columns = columns_of(weight.dtype)
    with on_device(hidden):
        _by_hidden[(rows * triton.cdiv(width, columns),)](
            grad,
            weight,
            weight.stride(0),
            ids.contiguous(),
            by_hidden,
            weight.shape[0],
            width,
            k,
            SLOTS=SLOTS,
            COLUMNS=columns,
            num_warps=WARPS,
        )
        if not of_head:
            return by_hidden, by_weight, by_bias
        ordered, slot = ids.reshape(-1).sort(stable=True)
        tiles = triton.cdiv(slots, TILE)
        row = torch.empty(slots, dtype=torch.int32, device=device)
        g = torch.empty(slots, dtype=torch.float32, device=device)
        begin = torch.empty(tiles + 1, dtype=torch.int32, device=device)
        room = torch.empty((tiles, width), dtype=torch.float32, device=device)
        bias_room = torch.empty(tiles, dtype=torch.float32, device=device)
        _lay_out[(tiles + 1,)](
            ordered, slot, grad, row, g, begin, slots, k, TILE=TILE, num_warps=WARPS
        )
        columns = columns_of(hidden.dtype)
        grid = tiles, triton.cdiv(width, columns)
        _by_head[grid](
            ordered,
            row,
            g,
            begin,
            hidden,
            hidden.stride(0),
            by_weight,
            by_bias,
            room,
            bias_room,
            slots,
            vocab,
            width,
            TILE=TILE,
            COLUMNS=columns,
            num_warps=WARPS,
        )
        _join[grid](
            ordered,
            begin,
            room,
            bias_room,
            by_weight,
            by_bias,
            vocab,
            width,
            TILE=TILE,
            COLUMNS=columns,
            num_warps=WARPS,
        )
    return by_hidden, by_weight, by_bias
