"""linear_gather_q on GPUs: k head rows a position, and nothing else of the head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import on_device

_SLOTS = 8
_COLUMNS = 256


@triton.jit
def _products(
    h_ptr,
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
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + row * k + j, mask=j < k, other=-1).to(tl.int64)
    member = (ids >= 0) & (ids < V)
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    columns = tl.arange(0, COLUMNS)
    for first in range(0, H, COLUMNS):
        here = first + columns
        h = tl.load(h_ptr + row * H + here, mask=here < H, other=0.0)
        w = tl.load(
            w_ptr + ids[:, None] * w_stride + here[None, :],
            mask=member[:, None] & (here < H)[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * h[None, :]
    z = tl.sum(total, 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + ids, mask=member, other=0.0)
    # an id that is no row of the head has no product
    z = tl.where(ids < V, z, float("nan"))
    tl.store(z_ptr + row * k + j, z, mask=j < k)


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
    row = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    slots = tl.arange(0, SLOTS)
    for first in range(0, k, SLOTS):
        j = first + slots
        ids = tl.load(ids_ptr + row * k + j, mask=j < k, other=-1).to(tl.int64)
        member = (ids >= 0) & (ids < V)
        g = tl.load(grad_ptr + row * k + j, mask=member, other=0.0)
        w = tl.load(
            w_ptr + ids[:, None] * w_stride + here[None, :],
            mask=member[:, None] & (here < H)[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * g[:, None]
    tl.store(out_ptr + row * H + here, tl.sum(total, 0), mask=here < H)


@triton.jit
def _by_head(
    grad_ptr,
    h_ptr,
    ids_ptr,
    slot_ptr,
    weight_ptr,
    bias_ptr,
    slots,
    V,
    H,
    k,
    COLUMNS: tl.constexpr,
):
    """Slots lie sorted by id. The program of an id's first slot sums them all, in order."""
    p = tl.program_id(0)
    id = tl.load(ids_ptr + p).to(tl.int64)
    before = tl.load(ids_ptr + p - 1, mask=p > 0, other=-1).to(tl.int64)
    here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if (id >= 0) & (id < V) & (id != before):
        total = tl.zeros([COLUMNS], tl.float32)
        bias = 0.0
        following = id
        at = p
        while following == id:
            slot = tl.load(slot_ptr + at)
            g = tl.load(grad_ptr + slot)
            total += g * tl.load(h_ptr + slot // k * H + here, mask=here < H, other=0.0)
            bias += g
            at += 1
            following = tl.load(ids_ptr + at, mask=at < slots, other=-1).to(tl.int64)
        tl.store(weight_ptr + id * H + here, total.to(weight_ptr.dtype.element_ty), mask=here < H)
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + id, bias)


def _rows_of(weight: Tensor) -> Tensor:
    return weight if weight.stride(-1) == 1 else weight.contiguous()


def head_products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    (rows, width), k = hidden.shape, ids.shape[-1]
    z = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    if z.numel():
        weight = _rows_of(weight)
        with on_device(hidden):
            _products[(rows, triton.cdiv(k, _SLOTS))](
                hidden.contiguous(),
                weight,
                weight.stride(0),
                z if bias is None else bias.contiguous(),
                ids.contiguous(),
                z,
                weight.shape[0],
                width,
                k,
                HAS_BIAS=bias is not None,
                SLOTS=_SLOTS,
                COLUMNS=_COLUMNS,
            )
    return z


def head_products_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, of_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), k, device = hidden.shape, ids.shape[-1], hidden.device
    vocab = weight.shape[0] if of_head else 0
    by_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=device)
    by_weight = torch.zeros((vocab, width), dtype=weight.dtype, device=device)
    by_bias = torch.zeros(vocab, dtype=torch.float32, device=device)
    if not ids.numel():
        return by_hidden, by_weight, by_bias
    grad, hidden, weight = grad.contiguous(), hidden.contiguous(), _rows_of(weight)
    tiles = triton.cdiv(width, _COLUMNS)
    with on_device(hidden):
        _by_hidden[(rows, tiles)](
            grad,
            weight,
            weight.stride(0),
            ids.contiguous(),
            by_hidden,
            weight.shape[0],
            width,
            k,
            SLOTS=_SLOTS,
            COLUMNS=_COLUMNS,
        )
        if of_head:
            ordered, slot = ids.reshape(-1).sort(stable=True)
            _by_head[(ids.numel(), tiles)](
                grad,
                hidden,
                ordered,
                slot,
                by_weight,
                by_bias,
                ids.numel(),
                vocab,
                width,
                k,
                COLUMNS=_COLUMNS,
            )
    return by_hidden, by_weight, by_bias
