"""td_target: schema, fake, autograd, and the call of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu, once_differentiable

LIBRARY.define(
    "td_target(Tensor value, Tensor successor, Tensor? reward, float gamma, float? lam) -> Tensor"
)
LIBRARY.define(
    "td_target_backward(Tensor grad, Tensor successor, float gamma, float? lam) -> (Tensor, Tensor)"
)
fake("td_target", lambda value, successor, reward, gamma, lam: value.new_empty(value.shape))
fake(
    "td_target_backward",
    lambda grad, successor, gamma, lam: (grad.new_empty(grad.shape), grad.new_empty(grad.shape)),
)
on_gpu(__name__, "td_target", "td_target_backward")


class _TDTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        value: Tensor, successor: Tensor, reward: Tensor | None, gamma: float, lam: float | None
    ) -> Tensor:
        return torch.ops.tdkd.td_target(value, successor, reward, gamma, lam)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, successor, reward, ctx.gamma, ctx.lam = inputs
        ctx.rewarded = reward is not None
        ctx.save_for_backward(successor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (successor,) = ctx.saved_tensors
        value, reward = torch.ops.tdkd.td_target_backward(grad, successor, ctx.gamma, ctx.lam)
        return value, None, reward if ctx.rewarded else None, None, None


def td_target(
    value: Tensor, successor: Tensor, reward: Tensor | None, *, gamma: float, lam: float | None
) -> Tensor:
    """As in the reference; float32. Backward is no graph of its own.

    Raises:
        RuntimeError: a chain of successors does not end, or a successor is no row.
    """
    return _TDTarget.apply(value, successor, reward, gamma, lam)
