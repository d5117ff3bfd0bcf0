"""student_rows: schema, fake, autograd, and the call of the kernel.

All that TD losses need of a student's row of logits: its values on the set, and the log of the mass
outside it. The row is read once forward; backward reads it again and writes the one dense gradient.
That log is float64 up to here, since exp(z - log_rest) of backward would carry its rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu, once_differentiable
from tdkd.types import Scale, StudentRows

_OPTIONS = "float temperature, float? softcap, float logit_scale, Tensor? log_weight, Tensor? state"
LIBRARY.define(f"student_rows(Tensor logits, Tensor ids, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "student_rows_backward(Tensor grad_z, Tensor grad_rest, Tensor logits, Tensor ids, "
    f"Tensor log_rest, {_OPTIONS}) -> Tensor"
)
LIBRARY.define(
    "student_rows_backward_(Tensor grad_z, Tensor grad_rest, Tensor(a!) logits, Tensor ids, "
    f"Tensor log_rest, {_OPTIONS}) -> ()"
)
LIBRARY.define(
    "student_rows_backward_as(Tensor grad_z, Tensor grad_rest, Tensor logits, Tensor ids, "
    f"Tensor log_rest, {_OPTIONS}, ScalarType dtype) -> Tensor"
)
fake(
    "student_rows",
    lambda logits, ids, *options: (
        logits.new_empty(ids.shape, dtype=torch.float32),
        logits.new_empty(logits.shape[:-1], dtype=torch.float64),
    ),
)
fake(
    "student_rows_backward",
    lambda grad_z, grad_rest, logits, ids, log_rest, *options: logits.new_empty(logits.shape),
)
fake("student_rows_backward_", lambda *arguments: None)
fake(
    "student_rows_backward_as",
    lambda grad_z, grad_rest, logits, *rest: logits.new_empty(logits.shape, dtype=rest[-1]),
)
on_gpu(
    __name__,
    "student_rows",
    "student_rows_backward",
    "student_rows_backward_",
    "student_rows_backward_as",
)


class _StudentRows(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        ids: Tensor,
        scale: Scale,
        log_weight: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.tdkd.student_rows(logits, ids, *scale, log_weight, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, ids, ctx.scale, log_weight, state = inputs
        ctx.save_for_backward(logits, ids, output[1], log_weight, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, log_rest, log_weight, state = ctx.saved_tensors
        grad = torch.ops.tdkd.student_rows_backward(
            grad_z, grad_rest, logits, ids, log_rest, *ctx.scale, log_weight, state
        )
        return grad, None, None, None, None


def student_rows(
    logits: Tensor,
    ids: Tensor,
    scale: Scale,
    *,
    log_weight: Tensor | None = None,
    state: Tensor | None = None,
) -> StudentRows:
    """As in the reference; float32, bfloat16 or float16. Backward is no graph of its own."""
    z, log_rest = _StudentRows.apply(logits, ids, scale, log_weight, state)
    return StudentRows(z, log_rest)


def gradient_of_logits(
    grad_z: Tensor,
    grad_rest: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_rest: Tensor,
    scale: Scale,
    log_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Of contiguous float32 ``logits`` that nobody needs any more: in their place, or in a tensor
    of its own where a GPU is to write it in fewer bits."""
    options = grad_z, grad_rest, logits, ids, log_rest, *scale, log_weight, None
    if logits.is_cuda and dtype != logits.dtype:
        return torch.ops.tdkd.student_rows_backward_as(*options, dtype)
    torch.ops.tdkd.student_rows_backward_(*options)
    return logits
