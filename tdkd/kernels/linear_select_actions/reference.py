"""linear_select_actions: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.kernels.linear_rows.reference import head_logits, row_chunks
from tdkd.kernels.select_actions.reference import select_actions
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
    """``select_actions(hidden @ weight.T + bias)`` over ``hidden [N, H]``, chunk by chunk."""
    hidden, weight = hidden.detach(), weight.detach()
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    parts = [
        select_actions(
            head_logits(hidden[rows], weight, bias),
            k,
            top_p,
            scale,
            None if include is None else include[rows],
            None if state is None else state[rows],
        )
        for rows in row_chunks(hidden.shape[0], weight.shape[0])
    ]
    return ActionSet(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
