"""linear_select_actions on the kernel: never more than one chunk of logits.

On CPU a chunk is all columns of few rows no longer, but few columns of many rows, which products
are faster at: the library lays a head's columns out anew in each product, for all rows at once.
"""

import torch
from torch import Tensor

from tdkd.kernels import backends, head
from tdkd.kernels.chunks import runs
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
    parts = []
    if hidden.device.type in backends.BY_PANELS:
        for rows in runs(hidden.shape[0], head.TILE_ROWS):
            panels = Panels(hidden[rows], weight.shape[0], k)
            options = top_p, scale, _of(include, rows), _of(state, rows)
            for columns in head.panels(hidden[rows], weight):
                panels.add(wide.logits(hidden[rows], columns), columns.start, *options)
            parts.append(panels.actions)
    else:
        for rows in head.chunks(hidden, weight):
            options = top_p, scale, _of(include, rows), _of(state, rows)
            parts.append(select_actions(wide.logits(hidden[rows]), k, *options))
    return ActionSet(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
