"""gather_q: schema, fake, autograd, and the call of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu, once_differentiable
from tdkd.types import Scale

LIBRARY.define(
    "gather_q(Tensor logits, Tensor ids, float temperature, float? softcap, float logit_scale) "
    "-> Tensor"
)
LIBRARY.define(
    "gather_q_backward(Tensor grad, Tensor logits, Tensor ids, float temperature, "
    "float? softcap, float logit_scale) -> Tensor"
)
fake(
    "gather_q",
    lambda logits, ids, temperature, softcap, logit_scale: logits.new_empty(
        ids.shape, dtype=torch.float32
    ),
)
fake(
    "gather_q_backward",
    lambda grad, logits, ids, temperature, softcap, logit_scale: logits.new_empty(logits.shape),
)
on_gpu(__name__, "gather_q", "gather_q_backward")


class _GatherQ(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, ids: Tensor, scale: Scale) -> Tensor:
        return torch.ops.tdkd.gather_q(logits, ids, *scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ids, ctx.scale = inputs
        ctx.save_for_backward(logits, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids = ctx.saved_tensors
        return torch.ops.tdkd.gather_q_backward(grad, logits, ids, *ctx.scale), None, None


def gather_q(logits: Tensor, ids: Tensor, scale: Scale) -> Tensor:
    """As in the reference; float32, bfloat16 or float16. Backward is no graph of its own."""
    return _GatherQ.apply(logits, ids, scale)
