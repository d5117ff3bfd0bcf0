"""linear_select_actions on the kernel: never more than one chunk of logits."""

import torch
from torch import Tensor

from tdkd.kernels import head
from tdkd.kernels.select_actions import select_actions
from tdkd.types import ActionSet, Scale


def linear_select_actions(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    top_p: float,
    scale: Scale,
    include: Tensor | None,
    state: Tensor | None = None,
) -> ActionSet:
    """As in the reference; float32, bfloat16 or float16."""
    hidden, weight = hidden.detach(), weight.detach()
    factors = head.factor_dtype(hidden, weight)
    wide = head.Head(weight, None if bias is None else bias.detach(), factors)
    parts = [
        select_actions(
            wide.logits(hidden[rows]),
            k,
            top_p,
            scale,
            None if include is None else include[rows],
            None if state is None else state[rows],
        )
        for rows in head.chunks(hidden, weight)
    ]
    return ActionSet(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
