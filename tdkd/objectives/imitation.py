"""Behaviour cloning on the action set: divergences of the student from the teacher, state by state.

p is the teacher, q the student. Without ``tail`` both are renormalised on the set, and nothing
keeps the student's mass there. With it, one bucket more holds the mass outside the set, of both: a
lower bound of the divergence over the full vocabulary, exact where the set is all of it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdkd.objectives.base import Objective, number_in, one_of
from tdkd.types import Rows


class _OnTheSet(Objective):
    """Shared by the divergences: the two distributions, with or without the tail bucket."""

    rowwise = True
    successors = False

    def __init__(self, *, tail: bool = False) -> None:
        one_of("tail", tail, (False, True))
        self.tail = tail

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return self.tail

    def _distributions(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities, ``[N, k]`` or ``[N, k + 1]`` with the tail last."""
        # of a set that the student excludes as a whole, -inf - -inf would be NaN
        policy = torch.where(rows.q == -torch.inf, -torch.inf, rows.q - rows.value.unsqueeze(-1))
        if not self.tail:
            return rows.teacher_policy, policy
        assert rows.log_mass is not None
        assert rows.log_tail is not None
        rest = -torch.expm1(rows.teacher_log_mass)
        # float32 knows 1 - mass to its epsilon, and a student without a tail has none to compare
        rest = rest.clamp(min=torch.finfo(rest.dtype).eps).log()
        rest = torch.where(rows.log_tail == -torch.inf, -torch.inf, rest)
        teacher = torch.cat([rows.log_probs, rest.unsqueeze(-1)], -1)
        student = torch.cat([policy + rows.log_mass.unsqueeze(-1), rows.log_tail.unsqueeze(-1)], -1)
        return teacher, student


class ForwardKL(_OnTheSet):
    """``KL(p || q) = sum_a p (log p - log q)``, nats a row: classical distillation.

    Of Hinton et al. (arXiv 1503.02531), on the set; with ``tail`` it is the first choice here.
    Infinite where the student excludes (logit -inf) a token that the teacher does not.

    Args:
        tail: add one bucket that holds the mass outside the set, of both. Without it nothing keeps
            the student's mass on the set.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=ForwardKL(tail=True), **options)
    >>> round(out.loss.item(), 4)
    0.2597
    """

    def __call__(self, rows: Rows) -> Tensor:
        return _kl(*self._distributions(rows))


class ReverseKL(_OnTheSet):
    """``KL(q || p) = sum_a q (log q - log p)``, nats a row (MiniLLM, arXiv 2306.08543).

    It seeks a mode of the teacher, where the forward KL covers all of it. Infinite where the
    student gives mass to a member that the teacher excludes (logit -inf).

    Args:
        tail: as in :class:`ForwardKL`.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=ReverseKL(), **options)
    >>> round(out.loss.item(), 4)
    0.2724
    """

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = self._distributions(rows)
        return _kl(student, teacher)


class JSD(_OnTheSet):
    """Generalised Jensen-Shannon divergence, nats a row (GKD, arXiv 2306.13649).

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``. Divided by beta
    it tends to KL(p || q) as beta goes to 0, divided by 1 - beta to KL(q || p) as beta goes to 1.
    At the ends themselves it is 0; there the two limits stand in its place.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1].
        tail: as in :class:`ForwardKL`.
    Raises:
        ValueError: ``beta`` is outside [0, 1].

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=JSD(0.5, tail=True), **options)
    >>> round(out.loss.item(), 4)
    0.0635
    """

    def __init__(self, beta: float = 0.5, *, tail: bool = False) -> None:
        number_in("beta", beta, 0.0, 1.0, "[0, 1]")
        super().__init__(tail=tail)
        self.beta = beta

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = self._distributions(rows)
        if self.beta == 0:
            return _kl(teacher, student)
        if self.beta == 1:
            return _kl(student, teacher)
        middle = _mixture(teacher, student, self.beta)
        return self.beta * _kl(teacher, middle) + (1 - self.beta) * _kl(student, middle)


class SkewKL(_OnTheSet):
    """KL to a mixture that holds some of the first argument (DistiLLM, arXiv 2402.03898).

    ``KL(p || alpha p + (1 - alpha) q)``, or with ``reverse`` ``KL(q || (1 - alpha) p + alpha q)``,
    nats a row. Never above -log alpha, whatever the two exclude; alpha = 0 is the plain KL.

    Args:
        alpha: share of the first argument in the mixture, in [0, 1).
        reverse: from the student to the mixture.
        tail: as in :class:`ForwardKL`.
    Raises:
        ValueError: ``alpha`` is outside [0, 1).

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=SkewKL(0.1, reverse=True), **options)
    >>> round(out.loss.item(), 4)
    0.2135
    """

    def __init__(self, alpha: float = 0.1, *, reverse: bool = False, tail: bool = False) -> None:
        number_in("alpha", alpha, 0.0, 1.0, "[0, 1)")
        one_of("reverse", reverse, (False, True))
        super().__init__(tail=tail)
        self.alpha = alpha
        self.reverse = reverse

    def __call__(self, rows: Rows) -> Tensor:
        first, second = self._distributions(rows)
        if self.reverse:
            first, second = second, first
        return _kl(first, _mixture(first, second, self.alpha) if self.alpha else second)


class TotalVariation(_OnTheSet):
    """``sum_a |p - q| / 2 = 1 - sum_a min(p, q)``, in [0, 1].

    One minus the chance that the teacher accepts a draft of the student (arXiv 2211.17192). Its
    gradient vanishes where the two have little in common: begin with another, or take :class:`LK`.

    Args:
        tail: as in :class:`ForwardKL`.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=TotalVariation(tail=True), **options)
    >>> round(out.loss.item(), 4)
    0.3157
    """

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = self._distributions(rows)
        return (teacher.exp() - student.exp()).abs().sum(-1) / 2


class LK(_OnTheSet):
    """The acceptance rate of a draft model as a loss (LK losses, arXiv 2602.23881).

    A draft of the student is accepted with the chance ``A = sum_a min(p, q)``. ``"log"`` is
    ``-log A``: the gradient of the total variation over A, which does not vanish where A is small.
    ``"hybrid"`` is ``w KL(p || q) + (1 - w) (1 - A)`` with ``w = exp(-eta A)``, no gradient through
    w: at first the KL, later the total variation.

    ``"log"`` is infinite where the two have no token in common (logits of -inf), and 0 where the
    teacher excludes every member of a set without ``tail``; neither has a gradient.

    Of the paper the abstract was read; the two forms and eta = 3 are as its public implementations
    have them (SpecForge, speculators). There w may come from the batch's mean of A, here from A of
    the row.

    Args:
        form: ``"log"`` or ``"hybrid"``.
        eta: for ``"hybrid"``, how fast the KL goes as A grows, >= 0.
        tail: as in :class:`ForwardKL`.
    Raises:
        ValueError: ``form`` is unknown or ``eta`` is negative.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=LK(tail=True), **options)
    >>> round(out.loss.item(), 4)
    0.3912
    """

    def __init__(
        self, form: Literal["log", "hybrid"] = "log", *, eta: float = 3.0, tail: bool = False
    ) -> None:
        one_of("form", form, ("log", "hybrid"))
        number_in("eta", eta, 0.0, math.inf, "[0, inf)")
        super().__init__(tail=tail)
        self.form = form
        self.eta = eta

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = self._distributions(rows)
        if self.form == "hybrid":
            distance = (teacher.exp() - student.exp()).abs().sum(-1) / 2
            weight = (-self.eta * (1 - distance)).exp().detach()
            return weight * _kl(teacher, student) + (1 - weight) * distance
        overlap = torch.minimum(teacher, student)
        common = (overlap > -torch.inf).any(-1)
        # in logarithms, where a small overlap does not underflow
        log_rate = torch.where(common.unsqueeze(-1), overlap, 0.0).logsumexp(-1)
        nothing = torch.where((teacher > -torch.inf).any(-1), torch.inf, 0.0)
        return torch.where(common, -log_rate, nothing.to(log_rate.dtype))


class CrossEntropy(_OnTheSet):
    """Negative log-likelihood of the taken token, nats a row: behaviour cloning.

    On the teacher's answers it is sequence-level distillation (SeqKD, arXiv 1606.07947). Tokens of
    the student's own (``Rows.expert_weight`` 0) are nothing to clone.

    Args:
        tail: normalise over the full vocabulary (``F.cross_entropy``); without it over the set.

    >>> from tdkd import ops
    >>> student, teacher = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[2.0, 0, 1], [0, 2, 0]]])
    >>> options = {"k": 2, "top_p": 1.0}
    >>> tokens = torch.tensor([0, 1])
    >>> out = ops.td_loss(student, teacher, tokens, objective=CrossEntropy(tail=True), **options)
    >>> round(out.loss.item(), 4)
    0.9795
    """

    demonstrations = True

    def __call__(self, rows: Rows) -> Tensor:
        taken = rows.taken(rows.q)
        log_likelihood = torch.where(taken == -torch.inf, -torch.inf, taken - rows.value)
        if self.tail:
            assert rows.log_mass is not None
            log_likelihood = log_likelihood + rows.log_mass
        return -rows.expert(log_likelihood)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``sum_a e^p (p - q)`` over the last dim; slots where p is -inf count nothing."""
    held = p > -torch.inf
    p = torch.where(held, p, 0.0)
    return torch.where(held, p.exp() * (p - torch.where(held, q, 0.0)), 0.0).sum(-1)


def _mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """``log(weight e^p + (1 - weight) e^q)``; -inf, without gradient, where both are."""
    held = (p > -torch.inf) | (q > -torch.inf)
    p, q = torch.where(held, p, 0.0), torch.where(held, q, 0.0)
    mixed = torch.logaddexp(p + math.log(weight), q + math.log1p(-weight))
    return torch.where(held, mixed, -torch.inf)
