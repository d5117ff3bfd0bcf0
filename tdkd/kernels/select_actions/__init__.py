"""select_actions: schema, fake, and the call of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkd.kernels.backends import LIBRARY, fake, on_gpu
from tdkd.types import ActionSet, Scale

_OPTIONS = (
    "int k, float top_p, float temperature, float? softcap, float logit_scale, "
    "Tensor? include, Tensor? state"
)
LIBRARY.define(f"select_actions(Tensor logits, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"select_panel_(Tensor logits, int first, int columns, {_OPTIONS}, Tensor(a!) ids, "
    "Tensor(b!) log_probs, Tensor(c!) count, Tensor(d!) carry) -> ()"
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
fake("select_panel_", lambda *arguments: None)
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


class Panels:
    """The selection from rows whose logits come a panel of columns at a time, on CPU."""

    def __init__(self, like: Tensor, columns: int, k: int) -> None:
        """``like``: a tensor ``[N, ...]``, for as many rows of ``columns`` logits."""
        rows = like.shape[0]
        self._columns = columns
        self._carry = like.new_empty((rows, 2), dtype=torch.float64)
        self.actions = ActionSet(
            like.new_empty((rows, k), dtype=torch.int32),
            like.new_empty((rows, k), dtype=torch.float32),
            like.new_empty(rows, dtype=torch.int32),
        )
        """The sets, once all columns have come."""

    def add(
        self,
        logits: Tensor,
        rows: slice,
        first: int,
        top_p: float,
        scale: Scale,
        include: Tensor | None,
        state: Tensor | None,
    ) -> None:
        """Takes the columns from ``first`` on of some rows, whose columns come in order."""
        torch.ops.tdkd.select_panel_(
            logits,
            first,
            self._columns,
            self.actions.ids.shape[-1],
            top_p,
            *scale,
            None if include is None else include[rows],
            None if state is None else state[rows],
            *[x[rows] for x in (*self.actions, self._carry)],
        )
