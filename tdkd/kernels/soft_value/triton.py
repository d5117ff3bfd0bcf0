"""soft_value on GPUs: a row of any length, in lanes of which each has its own level."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import LOG2E, LOWEST, logit_rows, on_device, row_base

_BLOCK = 1024


@triton.jit
def _sum(q_ptr, k, K: tl.constexpr):
    """Highest level of a row and the sum above it."""
    level = tl.full([K], LOWEST, tl.float32)
    total = tl.zeros([K], tl.float32)
    j = tl.arange(0, K)
    for first in range(0, k, K):
        q = tl.load(q_ptr + first + j, mask=first + j < k, other=float("-inf"))
        raised = tl.maximum(level, q)
        total = total * tl.exp2((level - raised) * LOG2E) + tl.exp2((q - raised) * LOG2E)
        level = raised
    top = tl.max(level, 0)
    return top, tl.sum(total * tl.exp2((level - top) * LOG2E), 0)


@triton.jit
def _soft_value(q_ptr, inner_rows, outer_stride, stride, value_ptr, k, K: tl.constexpr):
    row = tl.program_id(0)
    top, total = _sum(q_ptr + row_base(row, inner_rows, outer_stride, stride), k, K)
    value = tl.where(total == 0.0, float("-inf"), top + tl.log(total))
    tl.store(value_ptr + row, value)


@triton.jit
def _backward(grad_ptr, q_ptr, inner_rows, outer_stride, stride, out_ptr, k, K: tl.constexpr):
    row = tl.program_id(0)
    q_ptr += row_base(row, inner_rows, outer_stride, stride)
    out_ptr += row.to(tl.int64) * k
    top, total = _sum(q_ptr, k, K)
    share = tl.where(total == 0.0, 0.0, tl.load(grad_ptr + row) / total)
    j = tl.arange(0, K)
    for first in range(0, k, K):
        live = first + j < k
        q = tl.load(q_ptr + first + j, mask=live, other=float("-inf"))
        weight = tl.where(total == 0.0, 0.0, tl.exp2((q - top) * LOG2E))
        tl.store(out_ptr + first + j, share * weight, mask=live)


def _launch(k: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(k, 16)), _BLOCK)
    return {"K": block, "num_warps": max(1, block // 256)}


def soft_value(q: Tensor) -> Tensor:
    rows = logit_rows(q)
    value = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if rows.count:
        with on_device(q):
            _soft_value[(rows.count,)](
                rows.data, *rows.layout, value, rows.columns, **_launch(rows.columns)
            )
    return value


def soft_value_backward(grad: Tensor, q: Tensor) -> Tensor:
    rows = logit_rows(q)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if out.numel():
        with on_device(q):
            _backward[(rows.count,)](
                grad.contiguous(),
                rows.data,
                *rows.layout,
                out,
                rows.columns,
                **_launch(rows.columns),
            )
    return out
