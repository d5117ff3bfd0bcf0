"""select_actions: schema, fake, and the call of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu
from tdkd.types import ActionSet, Scale

LIBRARY.define(
    "select_actions(Tensor logits, int k, float top_p, float temperature, float? softcap, "
    "float logit_scale, Tensor? include, Tensor? state) -> (Tensor, Tensor, Tensor)"
)


def _fake(
    logits: Tensor,
    k: int,
    top_p: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    include: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = logits.shape[:-1]
    return (
        logits.new_empty((*lead, k), dtype=torch.int32),
        logits.new_empty((*lead, k), dtype=torch.float32),
        logits.new_empty(lead, dtype=torch.int32),
    )


fake("select_actions", _fake)
on_gpu(__name__, "select_actions")


def select_actions(
    logits: Tensor,
    k: int,
    top_p: float,
    scale: Scale,
    include: Tensor | None,
    state: Tensor | None = None,
) -> ActionSet:
    """As in the reference; float32, bfloat16 or float16."""
    return ActionSet(
        *torch.ops.tdkd.select_actions(logits.detach(), k, top_p, *scale, include, state)
    )
