"""soft_value: schema, fake, autograd, and the call of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu, once_differentiable

LIBRARY.define("soft_value(Tensor q) -> Tensor")
LIBRARY.define("soft_value_backward(Tensor grad, Tensor q) -> Tensor")
fake("soft_value", lambda q: q.new_empty(q.shape[:-1]))
fake("soft_value_backward", lambda grad, q: q.new_empty(q.shape))
on_gpu(__name__, "soft_value", "soft_value_backward")


class _SoftValue(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor) -> Tensor:
        return torch.ops.tdkd.soft_value(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.tdkd.soft_value_backward(grad, *ctx.saved_tensors)


def soft_value(q: Tensor) -> Tensor:
    """As in the reference; float32. Backward is no graph of its own."""
    return _SoftValue.apply(q)
