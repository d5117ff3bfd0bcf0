"""linear_rows on the kernels: products of chunks of rows with a head, reduced by ``student_rows``.

Backward makes the logits of a chunk again, turns them into their gradient in one pass, and
multiplies twice. Head gradients add up in float32 over the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdkd.kernels import head
from tdkd.kernels.linear_rows.reference import on_vocabulary
from tdkd.types import Scale, StudentRows, Vocabulary


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: Scale,
        log_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = head.factor(weight, hidden)
        parts = []
        for rows in head.chunks(hidden, weight):
            logits = head.logits_of(hidden[rows], wide, bias)
            parts.append(torch.ops.tdkd.student_rows(logits, ids[rows], *scale, log_weight, None))
            del logits  # before the next ones are made
        z, log_rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return z, log_rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, ids, ctx.scale, log_weight = inputs
        ctx.save_for_backward(hidden, weight, bias, ids, log_weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_weight, log_rest = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = head.factor(weight, hidden)
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        by_bias = torch.zeros_like(bias) if wants_bias else None
        for rows in head.chunks(hidden, weight):
            logits = head.logits_of(hidden[rows], wide, bias)
            grad = torch.ops.tdkd.student_rows_backward(
                grad_z[rows],
                grad_rest[rows],
                logits,
                ids[rows],
                log_rest[rows],
                *ctx.scale,
                log_weight,
                None,
            )
            del logits
            if by_bias is not None:
                by_bias += grad.sum(0)
            grad = grad.to(wide.dtype)
            if by_hidden is not None:
                by_hidden[rows] = head.product(grad, wide).to(hidden.dtype)
            if by_weight is not None:
                given = hidden[rows].to(wide.dtype)
                if wide.dtype == torch.float32:
                    by_weight.addmm_(grad.T, given)
                else:
                    by_weight += head.product(grad.T, given)
        by_head = None if by_weight is None else by_weight.to(weight.dtype)
        return by_hidden, by_head, by_bias, None, None, None


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    vocabulary: Vocabulary | None = None,
) -> StudentRows:
    """As in the reference; float32, bfloat16 or float16. Backward is no graph of its own."""
    log_weight = None
    if vocabulary is not None:
        weight, bias, ids, log_weight = on_vocabulary(vocabulary, weight, bias, ids)
    bias = None if bias is None else bias.float()
    z, log_rest = _LinearRows.apply(hidden, weight, bias, ids, scale, log_weight)
    return StudentRows(z, log_rest.float())
