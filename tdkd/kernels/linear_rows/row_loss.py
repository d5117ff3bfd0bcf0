"""The loss of rows whose gradients one launch makes in forward, in place of a graph of operators.

For rows whose ``z`` and ``log_rest`` are all there, where :func:`tdkd.kernels.routes.row_kernel`
says so; ``in_forward.py`` calls the kernel itself, chunk by chunk.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tdkd.kernels.backends import once_differentiable
from tdkd.td_rows import RowTerms, TDRows


def kernel(
    rows: TDRows, z: Tensor, rest: Tensor, factor: Tensor
) -> tuple[RowTerms, Tensor, Tensor]:
    """The terms of rows, and what ``factor`` times their loss wants of ``z`` and ``rest``."""
    module = importlib.import_module("tdkd.kernels.linear_rows.triton")
    terms, by_z, by_rest = module.forward_kl(rows, z, rest, factor)
    return terms, by_z, by_rest


def with_td_error(rows: TDRows, terms: RowTerms) -> RowTerms:
    """Terms of all rows, whose successors a chunk or the kernel does not know."""
    return terms._replace(td_error=rows.td_error(terms.q, rows.next_value(terms.value)))


def gradients_of(
    rows: TDRows,
    z: Tensor,
    rest: Tensor,
    divisor: Tensor | float | None,
    by_loss: Tensor | None,
    by_terms: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """What the gradients of the outputs want of ``z`` and ``rest``, by the graph of operators.

    ``divisor``: of the sum that the loss is; None where it is one a row.
    """
    with torch.enable_grad():
        leaves = z.detach().requires_grad_(), rest.detach().requires_grad_()
        terms = rows(*leaves)
        loss = terms.loss if divisor is None else terms.loss.sum() / divisor
        pairs = zip((loss, *terms[1:]), (by_loss, *by_terms), strict=True)
        wanted = [(x, grad) for x, grad in pairs if x is not None and grad is not None]
        of_z, of_rest = torch.autograd.grad(
            [output for output, _ in wanted],
            leaves,
            [grad for _, grad in wanted],
            materialize_grads=True,
        )
    return of_z, of_rest


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, rest: Tensor, rows: TDRows) -> tuple[Tensor | None, ...]:
        terms, by_z, by_rest = kernel(rows, z, rest, torch.ones((), device=z.device))
        terms = with_td_error(rows, terms)
        ctx.rows = rows
        ctx.save_for_backward(z, rest, by_z, by_rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms.entropy, terms.log_mass)
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor | None, *by_terms: Tensor | None) -> tuple[Any, ...]:
        z, rest, by_z, by_rest = ctx.saved_tensors
        if by_loss is None or any(x is not None for x in by_terms):
            return *gradients_of(ctx.rows, z, rest, None, by_loss, by_terms), None
        # 0 times the NaN of a row that nothing is wanted of would be NaN
        none = by_loss == 0
        by_z = torch.where(none.unsqueeze(-1), 0.0, by_loss.unsqueeze(-1) * by_z)
        return by_z, torch.where(none, 0.0, by_loss * by_rest), None


def row_loss(rows: TDRows, z: Tensor, log_rest: Tensor) -> RowTerms:
    """As ``rows(z, log_rest)``; backward is no graph of its own."""
    return RowTerms(*_RowLoss.apply(z, log_rest, rows))
