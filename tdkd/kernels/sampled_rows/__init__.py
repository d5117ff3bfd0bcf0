"""sampled_rows on the kernels: k head rows a position, and one product with the sampled columns.

Both give a gradient to the head, in one tensor of its dtype: the kernel of ``linear_gather_q``
writes the rows of the sets, and those of the columns are added. In half precision a row that is
both is rounded a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels import head
from tdkd.kernels.backends import once_differentiable
from tdkd.kernels.linear_gather_q import as_read, values_of
from tdkd.kernels.linear_rows import of_products, rows_backward, rows_of
from tdkd.kernels.linear_rows.reference import position_in
from tdkd.types import Scale, StudentRows, Vocabulary


class _SampledRows(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        places: Tensor,
        columns: Tensor,
        log_weight: Tensor,
        scale: Scale,
        factors: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """``places``: where ``ids`` stand among the columns, int64 ``[N, k]``; negative: nowhere.
        ``columns``: int64 ``[M]``."""
        products = torch.ops.tdkd.head_products(
            as_read(hidden), weight, None if bias is None else bias.float(), ids
        )
        part = _rows_at(columns, weight, bias)
        _, log_rest = rows_of(hidden, *part, places, scale, log_weight, factors)
        return values_of(products, ids, scale), log_rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.factors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, places, columns, log_weight, z, log_rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        sampled = rows_backward(
            torch.zeros_like(grad_z),
            grad_rest,
            hidden,
            *_rows_at(columns, weight, bias),
            places,
            log_rest,
            ctx.scale,
            log_weight,
            ctx.factors,
            wanted,
        )
        by_hidden, by_weight, by_bias = torch.ops.tdkd.head_products_backward(
            of_products(grad_z, z, ctx.scale), as_read(hidden), weight, ids, wanted[1] or wanted[2]
        )
        grads: list[Tensor | None] = [None] * 3
        if sampled.hidden is not None:
            grads[0] = sampled.hidden.add_(by_hidden).to(hidden.dtype)
        if sampled.weight is not None:
            grads[1] = by_weight.index_add_(0, columns, sampled.weight.to(by_weight.dtype))
        if bias is not None and sampled.bias is not None:
            grads[2] = by_bias.index_add_(0, columns, sampled.bias).to(bias.dtype)
        return *grads, *[None] * 6


def _rows_at(columns: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head of some columns."""
    return weight.index_select(0, columns), None if bias is None else bias.index_select(0, columns)


def sampled_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    vocabulary: Vocabulary,
) -> StudentRows:
    """As in the reference; float32, bfloat16 or float16. Backward is no graph of its own."""
    places = position_in(vocabulary, ids, weight.shape[0])
    columns = vocabulary.ids.long().clamp(min=0)
    given = hidden, weight, bias, ids, places, columns, vocabulary.log_weight
    z, log_rest = _SampledRows.apply(*given, scale, head.factor_dtype(hidden, weight))
    return StudentRows(z, log_rest)
