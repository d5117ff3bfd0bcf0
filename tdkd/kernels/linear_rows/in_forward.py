"""A TD loss over the rows of a head whose gradients are made in forward, chunk by chunk.

Backward of :func:`linear_rows` makes the logits of every chunk a second time: four products with
the head. Here a chunk's logits become their gradient while they are there, and three products do;
backward only multiplies by the gradient of the loss. It takes the loss itself, not its parts, and
rows that know each other through their successors alone: a chunk needs ``log Z`` of the rows that
are linked with its own, and the few that come in a later chunk are computed beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels import head, routes
from tdkd.kernels.backends import once_differentiable
from tdkd.kernels.linear_rows import row_loss, rows_backward, rows_of
from tdkd.kernels.linear_rows.reference import on_vocabulary
from tdkd.kernels.student_rows import gradient_of_logits
from tdkd.td_rows import RowTerms, TDRows
from tdkd.types import Scale, Vocabulary


def links(rows: TDRows, hidden: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Rows ``(from, to)`` of different chunks of which one is the other's successor.

    None where they are so many that gradients in forward do not pay. A host sync where rows are
    linked.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=hidden.device)
    if not rows.linked:
        return nothing, nothing
    step = head.chunk_rows(hidden.device, columns)
    start = torch.arange(hidden.shape[0], device=hidden.device)
    crossing = (rows.successor >= 0) & (rows.successor // step != start // step)
    start = crossing.nonzero().squeeze(-1)
    if not routes.few(start.numel(), hidden.shape[0]):
        return None
    return start, rows.successor[start]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: Scale,
        log_weight: Tensor | None,
        rows: TDRows,
        linked: tuple[Tensor, Tensor],
        divisor: Tensor | float,
        factors: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        wide = head.Head(weight, bias, factors)
        wanted = ctx.needs_input_grad[:3]
        grads = head.Gradients(hidden, weight, bias, wanted, scaled_later=True)
        count, step = hidden.shape[0], head.chunk_rows(hidden.device, weight.shape[0])
        z = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        rest = torch.empty(count, dtype=torch.float64, device=hidden.device)
        start, end = linked
        if start.numel():
            early = torch.maximum(start, end).unique()
            options = scale, log_weight, factors
            z[early], rest[early] = rows_of(hidden[early], weight, bias, ids[early], *options)
        made = []
        fused = routes.row_kernel(rows, hidden)
        factor = torch.ones((), device=hidden.device) / divisor if fused else None
        for chunk in head.chunks(hidden, weight):
            logits = wide.logits(hidden[chunk])
            z[chunk], rest[chunk] = torch.ops.tdkd.student_rows(
                logits, ids[chunk], *scale, log_weight, None
            )
            if rows.linked:
                number = chunk.start // step
                others = torch.cat([start[end // step == number], end[start // step == number]])
                inside = torch.arange(chunk.start, chunk.stop, device=hidden.device)
                index = torch.cat([inside, others.unique()])
                part, given = rows.take(index), (z[index], rest[index])
            else:
                part = rows if chunk.stop - chunk.start == count else rows.run(chunk)
                given = z[chunk], rest[chunk]
            if factor is not None:
                terms, by_z, by_rest = row_loss.kernel(part, *given, factor)
            else:
                terms, by_z, by_rest = _gradients(part, chunk.stop - chunk.start, *given, divisor)
            made.append(terms)
            grad = gradient_of_logits(
                by_z,
                by_rest,
                logits,
                ids[chunk],
                rest[chunk],
                scale,
                log_weight,
                grads.takes(wide),
            )
            grads.add(grad, hidden, wide, chunk)
            del grad  # before the next one is made
        terms = _joined(made)
        if fused or len(made) > 1:
            terms = row_loss.with_td_error(rows, terms)
        ctx.save_for_backward(hidden, weight, bias, ids, log_weight, z, rest)
        # float32 until the gradient of the loss is there, which may be a scale against underflow
        ctx.made = grads
        ctx.rows, ctx.scale, ctx.divisor, ctx.factors = rows, scale, divisor, factors
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms.entropy, terms.log_mass)
        return terms.loss.sum() / divisor, *terms[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor | None, *by_terms: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, ids, log_weight, z, rest = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is not None and by_loss is not None and all(x is None for x in by_terms):
            return *made.result(hidden, weight, bias, factor=by_loss), *[None] * 7
        # a second backward, or one of q, value or td_error
        given = ctx.rows, z, rest, ctx.divisor
        of_z, of_rest = row_loss.gradients_of(*given, by_loss, by_terms)
        grads = rows_backward(
            of_z,
            of_rest,
            hidden,
            weight,
            bias,
            ids,
            rest,
            ctx.scale,
            log_weight,
            ctx.factors,
            ctx.needs_input_grad[:3],
        )
        return *grads.result(hidden, weight, bias), *[None] * 7


def _gradients(
    part: TDRows, inside: int, z: Tensor, rest: Tensor, divisor: Tensor | float
) -> tuple[RowTerms, Tensor, Tensor]:
    """The terms of the first ``inside`` rows, and what the loss wants of their ``z`` and ``rest``;
    the others are their predecessors, whose loss counts too, and their successors."""
    with torch.enable_grad():
        z, rest = z.detach().requires_grad_(), rest.detach().requires_grad_()
        terms = part(z, rest)
        loss = terms.loss
        if z.shape[0] > inside:
            mine = torch.arange(z.shape[0], device=z.device) < inside
            mine |= (part.successor >= 0) & (part.successor < inside)
            loss = torch.where(mine, loss, 0.0)
        by_z, by_rest = torch.autograd.grad(loss.sum() / divisor, (z, rest), materialize_grads=True)
    own = [None if x is None else x.detach()[:inside] for x in terms]
    return RowTerms(*own), by_z[:inside], by_rest[:inside]  # type: ignore[arg-type]


def _joined(parts: list[RowTerms]) -> RowTerms:
    """Of all chunks, in order."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowTerms(*[None if x[0] is None else torch.cat(x) for x in columns])  # type: ignore[arg-type]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Scale,
    vocabulary: Vocabulary | None,
    rows: TDRows,
    divisor: Tensor | float,
) -> RowTerms | None:
    """The sum of the rows' losses over ``divisor``, and their other terms; differentiable.

    None where gradients in forward do not pay: rows of many chunks are linked.
    """
    ids, log_weight = rows.ids, None
    if vocabulary is not None:
        weight, bias, ids, log_weight = on_vocabulary(vocabulary, weight, bias, ids)
    linked = links(rows, hidden, weight.shape[0])
    if linked is None:
        return None
    factors = head.factor_dtype(hidden, weight)
    return RowTerms(
        *_Loss.apply(hidden, weight, bias, ids, scale, log_weight, rows, linked, divisor, factors)
    )
