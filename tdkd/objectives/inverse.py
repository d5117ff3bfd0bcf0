"""Inverse reinforcement learning on the action set: the reward is what Q implies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdkd.objectives.base import Objective, one_of, positive
from tdkd.types import Rows

Phi = Literal["chi2", "reverse_kl", "forward_kl", "hellinger", "js", "tv", "identity"]

STEEPEST = 10.0
"""Slope at which a phi that is undefined, or grows exponentially, below some point goes on as its
tangent."""


# no tuple: torch 2.10 compiles no call of one
@dataclass(frozen=True)
class Concave:
    """A phi: ``phi(0) = 0``, ``phi'(0) = 1``, concave and finite on all reals."""

    function: Callable[[Tensor], Tensor]
    """phi from ``knee`` on."""
    knee: float = -math.inf
    """below it phi is its tangent there, of slope ``STEEPEST``."""
    height: float = 0.0
    """``phi(knee)``."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.knee == -math.inf:
            return self.function(x)
        tangent = self.height + STEEPEST * (x - self.knee)
        # at the knee too: releases of torch differ in what clamp gives back at its bound
        return torch.where(x <= self.knee, tangent, self.function(x.clamp(min=self.knee)))


def _with_tangent(function: Callable[[Tensor], Tensor], knee: float) -> Concave:
    return Concave(function, knee, float(function(torch.tensor(knee, dtype=torch.float64))))


PHIS: dict[str, Concave] = {
    "chi2": Concave(lambda x: x - x.square() / 4),
    "reverse_kl": _with_tangent(lambda x: -torch.expm1(-x), -math.log(STEEPEST)),
    "forward_kl": _with_tangent(torch.log1p, 1 / STEEPEST - 1),
    "hellinger": _with_tangent(lambda x: x / (1 + x), STEEPEST**-0.5 - 1),
    "js": _with_tangent(lambda x: torch.log1p(-torch.expm1(-x)), math.log((1 + 1 / STEEPEST) / 2)),
    "tv": Concave(lambda x: x.clamp(max=0.5)),
    "identity": Concave(lambda x: x),
}
"""``phi(x) = -f*(-x)``, f* the convex conjugate of the f of an f-divergence with ``f'(1) = 0``."""


class IQLearn(Objective):
    """Inverse soft Q-learning on the action set, the objective of arXiv 2505.20335.

    ``L = -E_{a ~ w}[phi_alpha(Q(a) - gamma V')] + V - gamma V'`` with
    ``phi_alpha(x) = alpha phi(x / alpha)``. ``Q - gamma V'`` is the reward that Q implies. phi is
    the regulariser of IQ-Learn (arXiv 2106.12142), which makes the loss that of a divergence
    ``D_f(student || teacher)`` of what they visit, ``phi(x) = -f*(-x)``:

    =================  =====================  =============  ===============================
    ``phi``            ``phi(x)``             tangent below  ``f(t)``, t = student / teacher
    =================  =====================  =============  ===============================
    ``"chi2"``         ``x - x^2 / 4``                       ``(t - 1)^2``
    ``"reverse_kl"``   ``1 - exp(-x)``        ``-2.303``     ``t log t``
    ``"forward_kl"``   ``log(1 + x)``         ``-0.9``       ``-log t``
    ``"hellinger"``    ``x / (1 + x)``        ``-0.684``     ``(sqrt t - 1)^2``
    ``"js"``           ``log(2 - exp(-x))``   ``-0.598``     ``t log t - (1+t) log((1+t)/2)``
    ``"tv"``           ``min(x, 1/2)``        ``-0.5``       ``|t - 1| / 2``
    ``"identity"``     ``x``                                 none: gamma cancels row by row
    =================  =====================  =============  ===============================

    The paper and its code write some of them at another origin (``-exp(-x - 1)``, ``1 + log x``),
    for the same divergence; here all have ``phi(0) = 0`` and ``phi'(0) = 1``. Below the point in
    the third column, where phi is undefined or explodes, it goes on as its tangent, of slope 10
    (for ``"tv"``, whose own phi is -inf there, of slope 1). So each is finite and concave
    everywhere, and smooth but for the kink of ``"tv"`` at 1/2.

    Args:
        phi: one of the above.
        alpha: strength, > 0; the smaller, the stronger. The paper's is 0.1, which is violent on
            log-probabilities: begin near 1.
        expectation: w is the taken token (``"token"``) or the teacher renormalised on the set
            (``"teacher"``). V' is that of the taken token's successor for every action, since no
            other successor was visited: only a linear phi does not mind (there V' cancels), and a
            curved one is not the paper's expectation, which has a V' of each action's own.
        stop_gradient: ``"next"`` keeps gradients out of V'; without it they lower the error by
            emptying the next state's set.
        value: ``"expert"``: V - gamma V' on every state of the teacher, as above. ``"initial"``:
            the same as seen from the first state of each response: the row t states into it weighs
            gamma^t, times what makes the weights of its T rows sum to T (``Rows.occupancy``). Under
            that discounted occupancy, and only there, V - gamma V' telescopes: its sum is V(s_0),
            less gamma^T V(s_T) where the response was cut off, times
            T (1 - gamma) / (1 - gamma^T): the ``(1 - gamma) V(s_0)`` of IQ-Learn, exact for each
            response. Responses much longer than 1 / (1 - gamma) teach by their beginnings. The
            student's own (``Rows.expert_weight`` 0) have a first state too, and no phi.
            ``"mixed"``: V - gamma V' on every state, also on those that the student's own answers
            visited: the online form of IQ-Learn, ``-E_teacher[phi] + E_all[V - gamma V']``; where
            every state is the teacher's, this is ``"expert"``.
    Raises:
        ValueError: an option is not one of the above, or ``"initial"`` meets
            ``stop_gradient="next"``, under which gradients do not telescope. For the same reason
            the ops refuse a target network beside it.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0, "successor": torch.tensor([1, -1])}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=IQLearn("js", alpha=1.0), **options)
    >>> round(out.loss.item(), 4)
    4.3393
    """

    bootstraps = True
    rowwise = True
    successors = False
    demonstrations = True

    def __init__(
        self,
        phi: Phi = "chi2",
        *,
        alpha: float = 0.1,
        expectation: Literal["token", "teacher"] = "token",
        stop_gradient: Literal["next"] | None = None,
        value: Literal["expert", "initial", "mixed"] = "expert",
    ) -> None:
        one_of("phi", phi, tuple(PHIS))
        positive("alpha", alpha)
        one_of("expectation", expectation, ("token", "teacher"))
        one_of("stop_gradient", stop_gradient, (None, "next"))
        one_of("value", value, ("expert", "initial", "mixed"))
        if value == "initial" and stop_gradient is not None:
            raise ValueError(
                'stop_gradient: expected None with value="initial", since gradients telescope to '
                f"that of V(s_0) through V' alone, got {stop_gradient!r}"
            )
        self.phi = phi
        self.alpha = alpha
        self.expectation = expectation
        self.stop_gradient = stop_gradient
        self.value = value

    @property
    def starts(self) -> bool:  # type: ignore[override]
        return self.value == "initial"

    def __call__(self, rows: Rows) -> Tensor:
        future = _future(rows, self.stop_gradient)
        if self.expectation == "token":
            expected = self._phi(rows.taken(rows.q) - future)
        else:
            weights = rows.teacher_weights
            # a slot without weight may hold -inf, which phi would turn into 0 * inf
            q = torch.where(weights > 0, rows.q, 0.0)
            expected = (weights * self._phi(q - future.unsqueeze(-1))).sum(-1)
        value = rows.value - future
        if self.value == "expert":
            return rows.expert(value - expected)
        loss = value - rows.expert(expected)
        if self.value == "mixed":
            return loss
        assert rows.occupancy is not None
        return rows.occupancy * loss

    def _phi(self, x: Tensor) -> Tensor:
        return self.alpha * PHIS[self.phi](x / self.alpha)


class LSIQ(Objective):
    """Least squares inverse Q-learning (LS-IQ, arXiv 2303.00599) on the teacher's states.

    With the rewards ``x = Q(a) - gamma V'`` of the teacher's token and ``v = V - gamma V'`` of the
    student's policy: ``L = -x + v + c/2 (x^2 + v^2)``, which is
    ``c/2 ((x - 1/c)^2 + (v + 1/c)^2) - 1/c``: two squared soft Bellman errors, with the rewards 1/c
    and -1/c. It is IQ-Learn with the squared reward as regulariser, under the mixture of teacher
    and student; the chi-squared divergence of the teacher to that mixture is bounded.

    Q must be free to grow to 1/(c (1 - gamma)), 200 nats with the defaults: use ``q="logit"`` or a
    value head. A log-probability is never above 0, and there this loss is little more than
    cross-entropy on the set, with ``"fixed"`` of the weight 1/(1 - gamma). V' = 0 after the end is
    low beside such values: as :class:`SQIL` it favours not to end.

    Read were the abstract and the authors' code (robfiras/ls-iq). There the student's half comes
    from states that the policy visits; here it is taken on every state at hand, the teacher's and
    those of the student's own answers (``Rows.expert_weight`` 0), which have no part in the first.

    Args:
        c: strength of the regulariser, > 0.
        expert: ``"bootstrap"`` as above; ``"fixed"``: the teacher's half is
            ``c/2 (Q(a) - 1/(c (1 - gamma)))^2``, Q's greatest value, which no V' can spoil
            (gamma < 1).
        clip: keep V' within ``+-1/(c (1 - gamma))``, the values that such rewards can have.
        stop_gradient: ``"next"`` keeps gradients out of V'.
    Raises:
        ValueError: an option is not one of the above, or ``"fixed"`` meets gamma = 1.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0, "successor": torch.tensor([1, -1])}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=LSIQ(0.5), **options)
    >>> round(out.loss.item(), 4)
    1.0325
    """

    bootstraps = True
    rowwise = True
    successors = False
    free_level = True
    demonstrations = True

    def __init__(
        self,
        c: float = 0.5,
        *,
        expert: Literal["bootstrap", "fixed"] = "bootstrap",
        clip: bool = True,
        stop_gradient: Literal["next"] | None = "next",
    ) -> None:
        positive("c", c)
        one_of("expert", expert, ("bootstrap", "fixed"))
        one_of("clip", clip, (False, True))
        one_of("stop_gradient", stop_gradient, (None, "next"))
        self.c = c
        self.expert = expert
        self.clip = clip
        self.stop_gradient = stop_gradient

    def __call__(self, rows: Rows) -> Tensor:
        greatest = 1 / (self.c * (1 - rows.gamma)) if rows.gamma < 1 else math.inf
        future = _future(rows, self.stop_gradient)
        if self.clip:
            future = future.clamp(-rows.gamma * greatest, rows.gamma * greatest)
        q, v = rows.taken(rows.q), rows.value - future
        students = v + self.c / 2 * v.square()
        if self.expert == "bootstrap":
            x = q - future
            return students - rows.expert(x) + rows.expert(self.c / 2 * x.square())
        if greatest == math.inf:
            raise ValueError(f'gamma: expected a number < 1 with expert="fixed", got {rows.gamma}')
        return students + self.c / 2 * rows.expert((q - greatest).square())


class SQIL(Objective):
    """Soft Q imitation learning: a squared soft Bellman error (SQIL, arXiv 1905.11108).

    ``(Q(a) - r - gamma V')^2`` with r = 1 on what the teacher did, and r = 0 on what the student's
    own answers did (``Rows.expert_weight`` 0). The paper takes as many of the one as of the other.

    Q must be free to grow to 1 / (1 - gamma): use ``q="logit"``. A log-probability is never above
    0, and there this loss is little more than cross-entropy.

    A positive reward a token favours not to end: V' = 0 after the end, so that the teacher's EOS
    gets Q = 1 where a token that goes on gets 1 + gamma V', up to 1 / (1 - gamma). A ``reward`` of
    1 / (1 - gamma) where ``rows.successor`` is -1 makes the end as good as going on.

    Args:
        reward: r of the teacher's rows, or a function of ``Rows`` that returns r of all, ``[N]``.
        stop_gradient: ``"next"`` keeps gradients out of V'.
    Raises:
        TypeError: ``reward`` is neither a number nor a function.
        ValueError: ``stop_gradient`` is not one of the above.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0, "successor": torch.tensor([1, -1]), "q": "logit"}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=SQIL(), **options)
    >>> round(out.loss.item(), 4)
    0.8452
    """

    bootstraps = True
    free_level = True
    demonstrations = True

    def __init__(
        self,
        *,
        reward: float | Callable[[Rows], Tensor] = 1.0,
        stop_gradient: Literal["next"] | None = "next",
    ) -> None:
        if not callable(reward) and not isinstance(reward, int | float):
            raise TypeError(
                f"reward: expected a number or a function of Rows, got {type(reward).__name__}"
            )
        one_of("stop_gradient", stop_gradient, (None, "next"))
        self.reward = reward
        self.stop_gradient = stop_gradient

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return not callable(self.reward)  # a function may read other rows, and learn

    @property
    def successors(self) -> bool:  # type: ignore[override]
        return callable(self.reward)

    def __call__(self, rows: Rows) -> Tensor:
        if callable(self.reward):
            reward: float | Tensor = self.reward(rows)
        elif rows.expert_weight is None:
            reward = self.reward
        else:
            reward = self.reward * (rows.expert_weight > 0)
        return (rows.taken(rows.q) - reward - _future(rows, self.stop_gradient)).square()


def _future(rows: Rows, stop_gradient: str | None) -> Tensor:
    """``gamma V'``."""
    future = rows.gamma * rows.next_value
    return future.detach() if stop_gradient == "next" else future
