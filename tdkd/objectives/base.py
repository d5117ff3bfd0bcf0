"""What objectives have in common: flags, weighted sums, and checks of their options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdkd.types import Rows


class Objective:
    """Base of the built-in objectives: gives them ``+`` and ``*`` and a readable ``repr``.

    ``starts`` and ``demonstrations`` are None where a plain function does not say.
    """

    bootstraps: bool = False
    normalised: bool = False
    rowwise: bool = False
    successors: bool = True
    free_level: bool = False
    starts: bool | None = False
    demonstrations: bool | None = False

    @property
    def looks_ahead(self) -> bool:
        """Whether it reads V' at all; the rows of a sum may count without it."""
        return self.bootstraps

    def __call__(self, rows: Rows) -> Tensor:
        """One loss a row, ``[N]``; entries of rows that are no states are ignored."""
        raise NotImplementedError

    def __add__(self, other: ObjectiveLike) -> Objective:
        return Weighted([*_terms(self), *_terms(other)]) if callable(other) else NotImplemented

    def __radd__(self, other: ObjectiveLike | int) -> Objective:
        if isinstance(other, int) and other == 0:  # where sum() begins
            return self
        return Weighted([*_terms(other), *_terms(self)]) if callable(other) else NotImplemented

    def __mul__(self, weight: float) -> Objective:
        if not isinstance(weight, numbers.Real | Tensor):
            return NotImplemented
        return Weighted([(weight * w, objective) for w, objective in _terms(self)])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class Weighted(Objective):
    """``sum_j w_j objective_j``; a term that bootstraps gives 0 where V' is unknown.

    Args:
        terms: pairs ``(weight, objective)``; a plain function counts as it does alone.

    Raises:
        ValueError: a weight that is a number but not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, ObjectiveLike]]) -> None:
        self.terms = [(weight, as_objective(term)) for weight, term in terms]
        for weight, _ in self.terms:
            if isinstance(weight, numbers.Real) and not math.isfinite(weight):
                raise ValueError(f"weight: expected a finite number, got {weight!r}")
        objectives = [objective for _, objective in self.terms]
        self.bootstraps = all(objective.bootstraps for objective in objectives)
        self.normalised = any(objective.normalised for objective in objectives)
        # a weight that is a tensor may learn
        self.rowwise = all(
            objective.rowwise and not isinstance(weight, Tensor) for weight, objective in self.terms
        )
        self.successors = any(objective.successors for objective in objectives)
        self.free_level = any(objective.free_level for objective in objectives)
        self.starts = _any([objective.starts for objective in objectives])
        self.demonstrations = _any([objective.demonstrations for objective in objectives])

    @property
    def looks_ahead(self) -> bool:
        return any(objective.looks_ahead for _, objective in self.terms)

    def __call__(self, rows: Rows) -> Tensor:
        total = torch.zeros_like(rows.value)
        for weight, objective in self.terms:
            apart = objective.bootstraps and not self.bootstraps
            loss = objective(rows.blanked() if apart else rows)
            if loss.shape != total.shape:
                raise ValueError(
                    f"objective: expected one loss a row {tuple(total.shape)} of {objective!r}, "
                    f"got {tuple(loss.shape)}"
                )
            if apart:
                loss = torch.where(rows.bootstrapped, loss, 0.0)
            total = total + weight * loss
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{_told(weight)} * {term!r}" for weight, term in self.terms)


def _told(weight: object) -> str:
    if isinstance(weight, Tensor) and weight.numel() == 1:
        weight = weight.item()
    return f"{weight:g}" if isinstance(weight, numbers.Real) else repr(weight)


class _Function(Objective):
    """A plain function of ``Rows``: where it has no flags, it is given everything."""

    def __init__(self, function: Callable[[Rows], Tensor]) -> None:
        self.function = function
        self.bootstraps = getattr(function, "bootstraps", True)
        self.normalised = getattr(function, "normalised", True)
        self.rowwise = getattr(function, "rowwise", False)
        self.successors = getattr(function, "successors", True)
        self.free_level = getattr(function, "free_level", False)
        self.starts = getattr(function, "starts", None)
        self.demonstrations = getattr(function, "demonstrations", None)

    @property
    def looks_ahead(self) -> bool:
        return getattr(self.function, "looks_ahead", True)

    def __call__(self, rows: Rows) -> Tensor:
        return self.function(rows)

    def __repr__(self) -> str:
        return repr(self.function)


def as_objective(objective: ObjectiveLike) -> Objective:
    """With the flags that whoever calls it reads.

    Raises:
        TypeError: it is neither an objective nor a function.
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective) or isinstance(objective, type):
        got = f"the class {objective.__name__}" if callable(objective) else repr(objective)
        raise TypeError(
            f"objective: expected an objective or a function of Rows, got {got}; "
            "tdkd.objectives.parse makes one of text"
        )
    return _Function(objective)


def _any(flags: Sequence[bool | None]) -> bool | None:
    return True if any(flags) else None if None in flags else False


def _terms(objective: ObjectiveLike) -> Sequence[tuple[float, ObjectiveLike]]:
    return objective.terms if isinstance(objective, Weighted) else [(1.0, objective)]


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuses a value that is none of the allowed ones."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def number_in(name: str, value: object, low: float, high: float, interval: str) -> None:
    """Refuses what is no number in an interval; ``interval`` is how the message writes it."""
    inside = _is_number(value) and low <= value <= high  # type: ignore[operator]
    open_ends = {low if "(" in interval else None, high if ")" in interval else None}
    if not inside or value in open_ends:
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}")


def positive(name: str, value: object) -> None:
    """Refuses what is no finite number above 0."""
    if not (_is_number(value) and 0 < value < math.inf):  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


ObjectiveLike = Objective | Callable[[Rows], Tensor]
"""What the ops take as ``objective``."""
