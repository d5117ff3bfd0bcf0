"""gather_q on GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import logit_rows, numbers, on_device, row_base, scaled, scatter_rows
from tdkd.types import Scale


@triton.jit
def _gather(
    x_ptr,
    inner_rows,
    outer_stride,
    stride,
    ids_ptr,
    z_ptr,
    k,
    V,
    slope,
    inner,
    outer,
    CAPPED: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.program_id(1) * K + tl.arange(0, K)
    live = j < k
    at = row.to(tl.int64) * k + j
    ids = tl.load(ids_ptr + at, mask=live, other=-1).to(tl.int64)
    # padding is -inf, and an id that is no column NaN
    x = tl.load(
        x_ptr + row_base(row, inner_rows, outer_stride, stride) + ids,
        mask=(ids >= 0) & (ids < V),
        other=float("nan"),
    ).to(tl.float32)
    z = scaled(x, slope, inner, outer, CAPPED)
    tl.store(z_ptr + at, tl.where(ids < 0, float("-inf"), z), mask=live)


def gather_q(
    logits: Tensor, ids: Tensor, temperature: float, softcap: float | None, logit_scale: float
) -> Tensor:
    rows = logit_rows(logits)
    k = ids.shape[-1]
    z = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    if not z.numel():
        return z
    scale = numbers(Scale(temperature, softcap, logit_scale))
    block = min(triton.next_power_of_2(k), 1024)
    with on_device(logits):
        _gather[(rows.count, triton.cdiv(k, block))](
            rows.data,
            *rows.layout,
            ids.contiguous(),
            z,
            k,
            rows.columns,
            scale.slope,
            scale.inner,
            scale.outer,
            CAPPED=scale.capped,
            K=block,
            num_warps=max(1, min(4, block // 64)),
        )
    return z


def gather_q_backward(
    grad: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    scale = numbers(Scale(temperature, softcap, logit_scale))
    with on_device(logits):
        scatter_rows(out, grad, ids, logit_rows(logits), scale)
    return out
