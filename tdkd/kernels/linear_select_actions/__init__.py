"""linear_select_actions on the kernel: never more than one chunk of logits."""

import torch
from torch import Tensor

from tdkd.kernels import backends, head
from tdkd.kernels.select_actions import Panels, select_actions
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
    if hidden.device.type not in backends.TRITON:
        panels = Panels(hidden, weight.shape[0], k)
        for rows, columns in head.tiles(hidden, weight):
            logits = wide.logits(hidden[rows], columns)
            panels.add(logits, rows, columns.start, top_p, scale, include, state)
        return panels.actions
    parts = []
    for rows in head.chunks(hidden, weight):
        options = top_p, scale, _of(include, rows), _of(state, rows)
        parts.append(select_actions(wide.logits(hidden[rows]), k, *options))
    return ActionSet(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
