"""Modules over the ops: the options of a TD loss, kept once, for a training loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdkd import ops
from tdkd.objectives import IQLearn, ObjectiveLike
from tdkd.types import TDOutput


class TDLoss(nn.Module):
    """:func:`tdkd.ops.td_loss` with its options bound; no parameters.

    Args:
        objective: what to minimise; None is ``IQLearn()``, which alone undoes a student: see the
            warning of the op.
        options: keyword arguments of the op (``k``, ``top_p``, ``gamma``, ``q``, ...).

    >>> import torch
    >>> from tdkd.objectives import ForwardKL
    >>> td_loss = TDLoss(ForwardKL(tail=True), k=8, top_p=1.0)
    >>> loss = td_loss(torch.randn(4, 32), torch.randn(4, 32), torch.tensor([1, 2, 3, 4])).loss
    """

    def __init__(self, objective: ObjectiveLike | None = None, **options: Any) -> None:
        super().__init__()
        self.objective = IQLearn() if objective is None else objective
        self.options = options

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, **call: Any
    ) -> TDOutput:
        """Arguments as in the op; keyword arguments of one call win over the bound ones."""
        options = {"objective": self.objective, **self.options, **call}
        return ops.td_loss(student_logits, teacher_logits, tokens, **options)

    def extra_repr(self) -> str:
        bound = [f"{name}={value!r}" for name, value in self.options.items()]
        return ", ".join([repr(self.objective), *bound])


class LinearTDLoss(TDLoss):
    """:func:`tdkd.ops.linear_td_loss` with its options bound; no parameters.

    The heads are given at each call, since they belong to the models.
    """

    def forward(  # type: ignore[override]
        self, student_hidden: Tensor, student_weight: Tensor, tokens: Tensor, **call: Any
    ) -> TDOutput:
        """Arguments as in the op; keyword arguments of one call win over the bound ones."""
        options = {"objective": self.objective, **self.options, **call}
        return ops.linear_td_loss(student_hidden, student_weight, tokens, **options)
