"""linear_rows on the kernels: tiles of the products with a head, reduced by ``student_rows``.

Backward makes the logits of a tile again, turns them into their gradient in one pass, and
multiplies twice. Gradients add up in float32 over the tiles. A head that learns nothing needs
its logits once: what the mass outside a set gives back to a hidden state is one mean of the head's
rows, whatever the loss is, and is made in forward; the set gives back its k rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels import head, routes
from tdkd.kernels.backends import once_differentiable
from tdkd.kernels.linear_rows.reference import on_vocabulary
from tdkd.kernels.student_rows import gradient_of_logits
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
        factors: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return rows_of(hidden, weight, bias, ids, scale, log_weight, factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, ids, ctx.scale, log_weight, ctx.factors = inputs
        ctx.save_for_backward(hidden, weight, bias, ids, log_weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_weight, log_rest = ctx.saved_tensors
        grads = rows_backward(
            grad_z,
            grad_rest,
            hidden,
            weight,
            bias,
            ids,
            log_rest,
            ctx.scale,
            log_weight,
            ctx.factors,
            ctx.needs_input_grad[:3],
        )
        return *grads.result(hidden, weight, bias), None, None, None, None


class _FrozenHead(torch.autograd.Function):
    """The third result is the gradient of ``log_rest`` by hidden states, float32 ``[N, H]``."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``others``: as :func:`rows_of` has them."""
        return rows_and_mean(hidden, weight, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, _, ids, ctx.scale, _, _ = inputs
        z, log_rest, mean = output
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(mean)
        ctx.save_for_backward(weight, ids, z, log_rest, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor, _: Tensor) -> tuple[Any, ...]:
        weight, ids, z, log_rest, mean = ctx.saved_tensors
        grad = of_products(grad_z, z, ctx.scale)
        by_hidden, _, _ = torch.ops.tdkd.head_products_backward(grad, mean, weight, ids, False)
        without = (grad_rest == 0) | (log_rest == -torch.inf)
        of_rest = grad_rest.float().unsqueeze(-1) * mean
        by_hidden += torch.where(without.unsqueeze(-1), 0.0, of_rest)
        return by_hidden.to(ctx.dtype), *[None] * 6


def of_products(grad_z: Tensor, z: Tensor, scale: Scale) -> Tensor:
    """The gradient of a head's products, from that of the ``z`` that ``scale`` makes of them."""
    slope: Tensor | float = scale.logit_scale / scale.temperature
    if scale.softcap is not None:
        capped = z.double() * (scale.temperature / scale.softcap)
        slope = (slope * (1 - capped.square())).float()
    return torch.where(grad_z == 0, 0.0, grad_z * slope)


def rows_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    log_weight: Tensor | None,
    factors: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``z`` float32 ``[N, k]`` and ``log_rest`` float64 ``[N]``, without a graph."""
    wide = head.Head(weight, bias, factors)
    z = hidden.new_empty(ids.shape, dtype=torch.float32)
    log_rest = hidden.new_empty(ids.shape[:1], dtype=torch.float64)
    for rows, columns in head.tiles(hidden, weight):
        of_set, of_rest = torch.ops.tdkd.student_rows(
            wide.logits(hidden[rows], columns),
            head.within(ids[rows], columns, weight.shape[0]),
            *scale,
            None if log_weight is None else log_weight[columns],
            None,
        )
        if columns.start:
            of_set = torch.maximum(of_set, z[rows])
            of_rest = torch.logaddexp(of_rest, log_rest[rows])
        z[rows], log_rest[rows] = of_set, of_rest
    return z, log_rest


def rows_and_mean(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    log_weight: Tensor | None,
    factors: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the gradient of ``log_rest`` by hidden states, float32 ``[N, H]``."""
    wide = head.Head(weight, bias, factors)
    mean = head.Gradients(hidden, weight, None, (True, False, False))
    parts = []
    for rows in head.chunks(hidden, weight):
        logits, some = wide.logits(hidden[rows]), ids[rows]
        z, log_rest = torch.ops.tdkd.student_rows(logits, some, *scale, log_weight, None)
        parts.append((z, log_rest))
        grad = gradient_of_logits(
            torch.zeros_like(z),
            torch.ones_like(log_rest),
            logits,
            some,
            log_rest,
            scale,
            log_weight,
            mean.takes(wide),
        )
        mean.add(grad, hidden, wide, rows)
        del grad  # before the next one is made
    z, log_rest = (torch.cat(column) for column in zip(*parts, strict=True))
    assert mean.hidden is not None
    return z, log_rest, mean.hidden


def rows_backward(
    grad_z: Tensor,
    grad_rest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    log_rest: Tensor,
    scale: Scale,
    log_weight: Tensor | None,
    factors: torch.dtype,
    wanted: tuple[bool, ...],
) -> head.Gradients:
    """Gradients of hidden, weight and bias, where wanted, from logits that are made again."""
    wide = head.Head(weight, bias, factors)
    grads = head.Gradients(hidden, weight, bias, wanted)
    for rows, columns in head.tiles(hidden, weight):
        grad = gradient_of_logits(
            grad_z[rows],
            grad_rest[rows],
            wide.logits(hidden[rows], columns),
            head.within(ids[rows], columns, weight.shape[0]),
            log_rest[rows],
            scale,
            None if log_weight is None else log_weight[columns],
            grads.takes(wide),
        )
        grads.add(grad, hidden, wide, rows, columns)
        del grad  # before the next one is made
    return grads


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
    given = hidden, weight, bias, ids, scale, log_weight, head.factor_dtype(hidden, weight)
    if routes.head_is_frozen(hidden, weight, bias, ids.shape[-1]):
        z, log_rest, _ = _FrozenHead.apply(*given)
    else:
        z, log_rest = _LinearRows.apply(*given)
    return StudentRows(z, log_rest)
