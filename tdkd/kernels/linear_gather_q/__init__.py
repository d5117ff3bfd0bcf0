"""linear_gather_q: schema, fake, autograd, and the call of the kernel.

The kernel makes the products of hidden states with k head rows each; what a head does to its
products (softcap, temperature) is arithmetic on ``[N, k]`` and stays in PyTorch. Where k is large
against V, products with the whole head, a chunk at a time, are the faster way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels import backends, head
from tdkd.kernels.backends import LIBRARY, fake, on_gpu, once_differentiable
from tdkd.kernels.gather_q.reference import scaled
from tdkd.types import Scale

LIBRARY.define("head_products(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids) -> Tensor")
LIBRARY.define(
    "head_products_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor ids, bool of_head) "
    "-> (Tensor, Tensor, Tensor)"
)


def _fake_products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=torch.float32)


fake("head_products", _fake_products)


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, of_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.shape[0] if of_head else 0
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty((rows, weight.shape[1])),
        hidden.new_empty(rows, dtype=torch.float32),
    )


fake("head_products_backward", _fake_backward)
on_gpu(__name__, "head_products", "head_products_backward")


class _HeadProducts(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        return torch.ops.tdkd.head_products(hidden, weight, bias, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, ids = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(hidden, weight, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        of_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        by_hidden, by_weight, by_bias = torch.ops.tdkd.head_products_backward(
            grad, hidden, weight, ids, of_head
        )
        return (
            by_hidden,
            by_weight if ctx.needs_input_grad[1] else None,
            by_bias if ctx.biased and ctx.needs_input_grad[2] else None,
            None,
        )


class _DenseProducts(torch.autograd.Function):
    """The same from all products, a tile at a time; backward has no need of them."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, factors: torch.dtype
    ) -> Tensor:
        wide = head.Head(weight, bias, factors)
        products = hidden.new_zeros(ids.shape, dtype=torch.float32)
        for rows, columns in head.tiles(hidden, weight):
            place = head.within(ids[rows], columns, weight.shape[0]).long()
            found = wide.logits(hidden[rows], columns).gather(-1, place.clamp(min=0))
            products[rows] = torch.where(place < 0, products[rows], found)
        return products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.factors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        wide = head.Head(weight, bias, ctx.factors)
        grads = head.Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for rows, columns in head.tiles(hidden, weight):
            place = head.within(ids[rows], columns, weight.shape[0]).long()
            zeros = grad.new_zeros(place.shape[0], columns.stop - columns.start)
            some = torch.where(place < 0, 0.0, grad[rows])
            zeros.scatter_add_(-1, place.clamp(min=0), some)
            grads.add(zeros, hidden, wide, rows, columns)
            del zeros  # before the next ones are made
        return *grads.result(hidden, weight, bias), None, None


def linear_gather_q(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    *,
    dense: bool = False,
) -> Tensor:
    """As in the reference; float32, bfloat16 or float16. Backward is no graph of its own.

    ``dense`` multiplies with the whole head.
    """
    if dense and weight.shape[0]:
        z = _DenseProducts.apply(hidden, weight, bias, ids, head.factor_dtype(hidden, weight))
    else:
        bias = None if bias is None else bias.float()
        z = _HeadProducts.apply(as_read(hidden), weight, bias, ids)
    return values_of(z, ids, scale)


def as_read(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype in which the kernels of this device read them."""
    return hidden if hidden.device.type in backends.TRITON else hidden.float()


def values_of(products: Tensor, ids: Tensor, scale: Scale) -> Tensor:
    """What a head makes of its products ``[N, k]``; -inf where padded."""
    return torch.where(ids < 0, -torch.inf, scaled(products, scale))
