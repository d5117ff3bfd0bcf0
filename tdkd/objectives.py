"""TD objectives and the behaviour-cloning baselines on the same action set.

An objective is a callable from :class:`tdkd.types.Rows` to one loss a row, ``[N]``; a plain
function will do. Three attributes tell the ops what it needs (a function without them is given
everything, and counted as one that bootstraps):

``bootstraps``
    it reads V' of the successor: rows whose response was cut off do not count.
``normalised``
    it reads ``rows.log_mass`` or ``rows.log_tail``: the student's full normaliser is computed.
``rowwise``
    the loss of a row reads that row alone, and V' of its successor, and has no parameters that
    learn: the linear forms then compute it, with its gradient, a chunk of rows at a time, which
    spares them a product with the head.

``ForwardKL(tail=True) + 0.1 * IQLearn()`` is an objective too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tdkd.types import Rows


class Objective:
    """Base of the built-in objectives: gives them ``+`` and ``*`` and a readable ``repr``."""

    bootstraps: bool = False
    normalised: bool = False
    rowwise: bool = False

    @property
    def looks_ahead(self) -> bool:
        """Whether it reads V' at all; the rows of a sum may count without it."""
        return self.bootstraps

    def __call__(self, rows: Rows) -> Tensor:
        """One loss a row, ``[N]``; entries of rows that are no states are ignored."""
        raise NotImplementedError

    def __add__(self, other: Objective) -> Objective:
        return Weighted([*_terms(self), *_terms(other)])

    def __mul__(self, weight: float) -> Objective:
        return Weighted([(weight * w, objective) for w, objective in _terms(self)])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class Weighted(Objective):
    """``sum_j w_j objective_j``; a term that bootstraps gives 0 where V' is unknown.

    Args:
        terms: pairs ``(weight, objective)``.
    """

    def __init__(self, terms: list[tuple[float, Objective]]) -> None:
        self.terms = terms
        self.bootstraps = all(objective.bootstraps for _, objective in terms)
        self.normalised = any(objective.normalised for _, objective in terms)
        self.rowwise = all(objective.rowwise for _, objective in terms)

    @property
    def looks_ahead(self) -> bool:
        return any(objective.looks_ahead for _, objective in self.terms)

    def __call__(self, rows: Rows) -> Tensor:
        total = torch.zeros_like(rows.value)
        for weight, objective in self.terms:
            loss = objective(rows)
            if objective.bootstraps and not self.bootstraps:
                loss = torch.where(rows.bootstrapped, loss, 0.0)
            total = total + weight * loss
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} * {objective!r}" for weight, objective in self.terms)


def _terms(objective: Objective) -> list[tuple[float, Objective]]:
    return objective.terms if isinstance(objective, Weighted) else [(1.0, objective)]


class IQLearn(Objective):
    """Inverse soft Q-learning on the action set, the objective of arXiv 2505.20335.

    ``L = -E_{a ~ w}[phi(Q(a) - gamma V')] + V - gamma V'``, with ``phi(x) = x - x^2 / (4 alpha)``
    for ``"chi2"`` (the chi-squared regulariser of IQ-Learn, arXiv 2106.12142) and ``phi(x) = x``
    for ``"identity"``, where gamma cancels row by row.

    Args:
        phi: ``"chi2"`` or ``"identity"``.
        alpha: strength of chi2, > 0; the smaller, the stronger. The paper's is 0.1, which is
            violent on log-probabilities: begin near 1.
        expectation: w is the taken token (``"token"``) or the teacher renormalised on the set
            (``"teacher"``).
        stop_gradient: ``"next"`` keeps gradients out of V'; without it they lower the error by
            emptying the next state's set.
    Raises:
        ValueError: an option is not one of the above.

    >>> IQLearn(alpha=1.0, stop_gradient="next")
    IQLearn(phi='chi2', alpha=1.0, expectation='token', stop_gradient='next')
    """

    bootstraps = True
    rowwise = True

    def __init__(
        self,
        phi: Literal["chi2", "identity"] = "chi2",
        *,
        alpha: float = 0.1,
        expectation: Literal["token", "teacher"] = "token",
        stop_gradient: Literal["next"] | None = None,
    ) -> None:
        _one_of("phi", phi, ("chi2", "identity"))
        _one_of("expectation", expectation, ("token", "teacher"))
        _one_of("stop_gradient", stop_gradient, (None, "next"))
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number > 0, got {alpha!r}")
        self.phi = phi
        self.alpha = alpha
        self.expectation = expectation
        self.stop_gradient = stop_gradient

    def __call__(self, rows: Rows) -> Tensor:
        future = rows.gamma * rows.next_value
        if self.stop_gradient == "next":
            future = future.detach()
        if self.expectation == "token":
            expected = self._phi(rows.taken(rows.q) - future)
        else:
            weights = rows.teacher_weights
            # a slot without weight may hold -inf, which phi would turn into 0 * inf
            q = torch.where(weights > 0, rows.q, 0.0)
            expected = (weights * self._phi(q - future.unsqueeze(-1))).sum(-1)
        return rows.value - future - expected

    def _phi(self, x: Tensor) -> Tensor:
        return x if self.phi == "identity" else x - x.square() / (4 * self.alpha)


class _OnTheSet(Objective):
    """Shared by the imitation baselines: with ``tail`` the full vocabulary counts, as the set plus
    one bucket that holds the rest; without, both distributions are renormalised on the set."""

    rowwise = True

    def __init__(self, *, tail: bool = False) -> None:
        self.tail = tail

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return self.tail

    def _distributions(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities, ``[N, k]`` or ``[N, k + 1]`` with the tail last."""
        policy = rows.q - rows.value.unsqueeze(-1)
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
    """``KL(teacher || student)`` on the action set, nats a row.

    Args:
        tail: add one bucket that holds the mass outside the set, of both. Without it nothing keeps
            the student's mass on the set.
    """

    def __call__(self, rows: Rows) -> Tensor:
        return _kl(*self._distributions(rows))


class ReverseKL(_OnTheSet):
    """``KL(student || teacher)`` on the action set, nats a row.

    Infinite where the student gives mass to a member that the teacher excludes (logit -inf).

    Args:
        tail: as in :class:`ForwardKL`.
    """

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = self._distributions(rows)
        return _kl(student, teacher)


class CrossEntropy(_OnTheSet):
    """Negative log-likelihood of the taken token, nats a row.

    Args:
        tail: normalise over the full vocabulary (``F.cross_entropy``); without it over the set.
    """

    def __call__(self, rows: Rows) -> Tensor:
        log_likelihood = rows.taken(rows.q) - rows.value
        if self.tail:
            assert rows.log_mass is not None
            log_likelihood = log_likelihood + rows.log_mass
        return -log_likelihood


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``sum_a e^p (p - q)`` over the last dim; slots where p is -inf count nothing."""
    held = p > -torch.inf
    p = torch.where(held, p, 0.0)
    return torch.where(held, p.exp() * (p - torch.where(held, q, 0.0)), 0.0).sum(-1)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


ObjectiveLike = Objective | Callable[[Rows], Tensor]
"""What the ops take as ``objective``."""
