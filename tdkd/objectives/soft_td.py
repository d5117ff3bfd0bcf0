"""Soft TD regression on the reward that the teacher's own logits imply."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkd.kernels.td_target.reference import td_target
from tdkd.objectives.base import Objective, number_in, one_of, positive
from tdkd.types import Rows


class SoftTD(Objective):
    """The student's soft Bellman error under the reward that the teacher's logits imply.

    The inverse soft Bellman operator (IQ-Learn, arXiv 2106.12142) gives that reward:
    ``r = Q* - gamma V*'`` with ``Q* = log pi*(a)``, and V* the log of the teacher's mass on the set
    (0 after the end). One step: ``L = (Q - r - gamma V')^2``. Such rewards telescope along a
    response: with ``D = V - V*``, ``L = (Q - Q* - gamma D')^2``, and what stands for D' is

    - with n steps ``gamma^(n-1) D``, n states ahead;
    - with TD(lambda) the recursion ``G = (1 - lam) D + lam gamma G'``, as in
      :func:`tdkd.ops.td_target`;
    - 0 past the end of a response, and D of the last state where it was cut off.

    These are the soft returns of the teacher, whose entropy bonus ``-log pi*(a)`` is known. With
    ``lam=1`` on responses that end Q* alone is left: regression on the teacher's log-probabilities.
    A student that equals the teacher has no error, whatever n and lambda (with ``q="log_prob"``;
    raw logits must come down to that level first).

    Over the whole vocabulary V and V* are 0 (``q="log_prob"``), and the error is ``log pi(a) - log
    pi*(a)``, whatever gamma, n and lambda. Of a teacher that tells the log-probability of the taken
    token and no others, ``gamma=0`` makes it so on sets of that token; there it belongs beside
    ``CrossEntropy(tail=True)`` (``docs/quality.md``).

    With a target network (``target_value`` of :func:`tdkd.ops.td_loss`) V in D is its.

    A token that the teacher excludes (logit -inf) has no reward, and its row gives 0.

    Args:
        steps: n >= 1.
        lam: lambda in [0, 1] for TD(lambda); then ``steps`` must be 1.
        stop_gradient: ``"next"``: none through D', so that targets are constants; None: the
            gradient of the whole square, which lowers the error by moving V' too.
        huber: from where on ``|error|`` counts linearly, > 0; None never.
    Raises:
        TypeError: ``steps`` is no int.
        ValueError: an option is out of range, or both ``steps`` and ``lam`` are given.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0, "successor": torch.tensor([1, -1])}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=SoftTD(steps=2), **options)
    >>> round(out.loss.item(), 4)
    0.5486
    """

    bootstraps = True
    successors = False

    def __init__(
        self,
        steps: int = 1,
        *,
        lam: float | None = None,
        stop_gradient: Literal["next"] | None = "next",
        huber: float | None = None,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
        if steps < 1:
            raise ValueError(f"steps: expected an int >= 1, got {steps}")
        if lam is not None:
            number_in("lam", lam, 0.0, 1.0, "[0, 1]")
            if steps != 1:
                raise ValueError(f"steps: expected 1 with lam={lam}, got {steps}")
        one_of("stop_gradient", stop_gradient, (None, "next"))
        if huber is not None:
            positive("huber", huber)
        self.steps = steps
        self.lam = lam
        self.stop_gradient = stop_gradient
        self.huber = huber

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return self.steps == 1 and not self.lam

    def __call__(self, rows: Rows) -> Tensor:
        ahead = self._ahead(rows)
        if self.stop_gradient == "next":
            ahead = ahead.detach()
        wanted = rows.taken(rows.log_probs)
        usable = wanted > -torch.inf
        wanted = torch.where(usable, wanted, 0.0)
        error = torch.where(usable, rows.taken(rows.q) - wanted - ahead, 0.0)
        if self.huber is None:
            return error.square()
        return 2 * F.huber_loss(error, torch.zeros_like(error), "none", self.huber)

    def _ahead(self, rows: Rows) -> Tensor:
        """``gamma D'``, ``[N]``."""
        if not rows.gamma:
            return torch.zeros_like(rows.value)
        value = rows.value if rows.target_value is None else rows.target_value
        theirs = rows.teacher_log_mass
        theirs = torch.where(theirs > -torch.inf, theirs, value.detach())
        if self.rowwise:
            return rows.gamma * (rows.next_value - rows.following(theirs))
        ahead = value - theirs
        for _ in range(self.steps):
            ahead = td_target(ahead, rows.successor, None, gamma=rows.gamma, lam=self.lam)
        return ahead
