"""From the student's values on the action sets to a TD loss: all that is ``[N, k]``.

Nothing of vocabulary size reaches this far; it is ordinary PyTorch under autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tdkd.kernels.td_target.reference import td_target
from tdkd.objectives import Objective
from tdkd.types import Rows, following, largest

FLOOR = -10.0
"""Lowest Q of the level ``"shifted"``, nats below the largest of the set."""


class RowTerms(NamedTuple):
    """What each of N rows gives, ``[N]``; 0 where it does not count."""

    loss: Tensor
    q: Tensor
    value: Tensor
    td_error: Tensor
    entropy: Tensor
    log_mass: Tensor | None


# compared by identity: torch 2.11's compiler hashes what it calls, before it has fields
@dataclass(frozen=True, eq=False)
class TDRows:
    """N rows with all that a TD loss needs but the student's values; :meth:`of` makes them."""

    ids: Tensor
    """``[N, k]``: the action sets; negative where padded."""
    log_probs: Tensor
    """``[N, k]``: the teacher's."""
    slot: Tensor
    """int64 ``[N]``: slot of the taken token."""
    state: Tensor
    """bool ``[N]``: a taken token that is in its set."""
    successor: Tensor
    """int64 ``[N]``: of states, among states; -1 terminal, -2 unknown."""
    occupancy: Tensor | None
    """``[N]``: as in :class:`tdkd.types.Rows`."""
    target_value: Tensor | None
    """``[N]``: the soft values of a target network."""
    objective: Objective
    level: str
    """what Q is: as ``q`` of :func:`tdkd.ops.td_loss`."""
    gamma: float
    soft_value: Callable[[Tensor], Tensor]
    state_value: Tensor | None = None
    """``[N]``: added to Q, by a value head; differentiable."""
    expert_weight: Tensor | None = None
    """``[N]``: as in :class:`tdkd.types.Rows`."""

    @classmethod
    def of(
        cls,
        ids: Tensor,
        log_probs: Tensor,
        tokens: Tensor,
        successor: Tensor,
        *,
        ignore_index: int,
        objective: Objective,
        level: str,
        gamma: float,
        soft_value: Callable[[Tensor], Tensor],
        target_value: Tensor | None = None,
        state_value: Tensor | None = None,
        expert_weight: Tensor | None = None,
    ) -> TDRows:
        """Of flat ids ``[N, k]``; tokens, successors and values of a target network ``[N]``."""
        taken = tokens.long()
        here = (ids == taken.unsqueeze(-1)) & (ids >= 0)
        state = (taken != ignore_index) & here.any(-1)
        # a successor that is no state has no value to offer
        successor = successor.long()
        exists = state.new_ones(successor.shape)
        if state.numel():
            exists = (successor < 0) | state.gather(0, successor.clamp(min=0))
        successor = torch.where(state & exists, successor, -2)
        slot = here.int().argmax(-1) * state
        occupancy = None
        if objective.starts is not False:
            occupancy = _occupancy(state, successor, gamma)
        if target_value is not None:
            target_value = torch.where(state, target_value.detach(), 0.0)
        if state_value is not None:
            state_value = torch.where(state, state_value, 0.0)
        if expert_weight is not None:
            expert_weight = torch.where(state, expert_weight.detach(), 0.0)
        return cls(
            ids,
            log_probs,
            slot,
            state,
            successor,
            occupancy,
            target_value,
            objective,
            level,
            gamma,
            soft_value,
            state_value,
            expert_weight,
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss of a row depends on its successor."""
        return bool(self.gamma) and self.objective.looks_ahead

    @property
    def linked(self) -> bool:
        """Whether the loss of a row may depend on which row follows."""
        return self.looks_ahead or self.objective.successors

    @property
    def bootstrapped(self) -> Tensor:
        """bool ``[N]``: as in :class:`tdkd.types.Rows`."""
        return self.state & (self.successor != -2) if self.gamma else self.state

    @property
    def counted(self) -> Tensor:
        """bool ``[N]``: rows that the loss counts."""
        return self.bootstrapped if self.objective.bootstraps else self.state

    def take(self, index: Tensor) -> TDRows:
        """The rows at ``index [n]``, distinct; a successor that is not among them is unknown."""
        place = torch.full_like(self.successor, -2)
        place[index] = torch.arange(index.numel(), device=index.device)
        successor = self.successor[index]
        return self._at(index, torch.where(successor < 0, successor, place[successor.clamp(min=0)]))

    def run(self, rows: slice) -> TDRows:
        """Neighbours without their successors: for rows that are not linked."""
        return self._at(rows, self.successor[rows].clamp(max=-1))

    def _at(self, rows: Tensor | slice, successor: Tensor) -> TDRows:
        """Some rows, with these successors among them."""

        def given(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return replace(
            self,
            ids=self.ids[rows],
            log_probs=self.log_probs[rows],
            slot=self.slot[rows],
            state=self.state[rows],
            successor=successor,
            occupancy=given(self.occupancy),
            target_value=given(self.target_value),
            state_value=given(self.state_value),
            expert_weight=given(self.expert_weight),
        )

    def next_value(self, value: Tensor) -> Tensor:
        """``[N]``: V' of each row's successor, of the target network where there is one."""
        given = value if self.target_value is None else self.target_value.to(value.dtype)
        # at gamma = 0 an infinite V' is of no concern
        return following(given, self.successor if self.gamma else self.successor.clamp(max=-1))

    def td_error(self, q: Tensor, ahead: Tensor) -> Tensor:
        """``[N]``: Q of the taken token less gamma V'; 0 where V' is unknown."""
        return torch.where(self.bootstrapped, q - self.gamma * ahead, 0.0)

    def __call__(self, z: Tensor, log_rest: Tensor | None) -> RowTerms:
        """The terms of each row, from the student's scaled logits on the sets ``z [N, k]`` and the
        log of the mass outside ``[N]`` (None where nothing needs it)."""
        state = self.state
        valid = (self.ids >= 0) & state.unsqueeze(-1)
        log_mass = log_tail = None
        if log_rest is None:
            value = torch.where(state, self.soft_value(z), 0.0)
        else:
            # relative to the set, or a level of 100 would round differences by 1e-5
            level = largest(z.detach())
            near = z - level.unsqueeze(-1)
            rest = (log_rest - level).to(z.dtype)
            held = torch.where(state, self.soft_value(near), 0.0)
            log_z = torch.where(state, torch.logaddexp(held, rest), 0.0)
            log_mass = held - log_z
            log_tail = torch.where(state, rest - log_z, 0.0)
            if self.level == "log_prob":
                z = near - log_z.unsqueeze(-1)
                value = log_mass
            else:
                value = torch.where(state, held + level, 0.0)
        if self.level == "shifted":
            z = _shifted(z, valid)
            value = torch.where(state, self.soft_value(z), 0.0)
        if self.state_value is not None:
            z = z + self.state_value.to(z.dtype).unsqueeze(-1)
            value = value + self.state_value.to(z.dtype)
        blank = ~state.unsqueeze(-1)
        target = None if self.target_value is None else self.target_value.to(value.dtype)
        weight = None if self.expert_weight is None else self.expert_weight.to(value.dtype)
        rows = Rows(
            q=torch.where(blank, 0.0, z),
            log_probs=torch.where(blank, 0.0, self.log_probs.to(z.dtype)),
            valid=valid,
            slot=self.slot,
            value=value,
            next_value=self.next_value(value),
            successor=self.successor,
            state=state,
            gamma=self.gamma,
            log_mass=log_mass,
            log_tail=log_tail,
            occupancy=None if self.occupancy is None else self.occupancy.to(value.dtype),
            target_value=target,
            expert_weight=weight,
        )
        per_row = self.objective(rows.blanked() if self.objective.bootstraps else rows)
        if not isinstance(per_row, Tensor):
            raise TypeError(f"objective: expected a tensor, got {type(per_row).__name__}")
        if per_row.shape != value.shape:
            raise ValueError(
                f"objective: expected one loss a row {tuple(value.shape)}, got "
                f"{tuple(per_row.shape)}"
            )
        per_row = torch.where(self.counted, per_row, 0.0)
        q_taken = torch.where(state, rows.taken(rows.q), 0.0)
        td_error = self.td_error(q_taken, rows.next_value)
        mass = None if log_mass is None else log_mass.detach()
        return RowTerms(per_row, q_taken, value, td_error, _entropy(rows), mass)


@torch.no_grad()
def _entropy(rows: Rows) -> Tensor:
    """``[N]``: of ``softmax(Q)`` on the set, nats."""
    policy = torch.where(rows.q == -torch.inf, -torch.inf, rows.q - rows.value.unsqueeze(-1))
    return torch.where(rows.state, torch.special.entr(policy.exp()).sum(-1), 0.0)


def _shifted(z: Tensor, valid: Tensor) -> Tensor:
    """Relative to the largest of the set, and no lower than ``FLOOR``; -inf where padded."""
    best = largest(torch.where(valid, z, -torch.inf)).unsqueeze(-1)
    return torch.where(valid, (z - best).clamp(min=FLOOR), -torch.inf)


def _occupancy(state: Tensor, successor: Tensor, gamma: float) -> Tensor:
    """float64 ``[N]``: as in :class:`tdkd.types.Rows`."""
    count = state.numel()
    rows = torch.arange(count, device=state.device)
    predecessor = torch.full((count + 1,), -1, device=state.device)
    predecessor[torch.where(successor >= 0, successor, count)] = rows
    # the return of a reward of 1 a row: how many count from a row on, and how many lead to it, with
    # itself; a row that was cut off holds its own value
    one = torch.ones(count, dtype=torch.float32, device=state.device)
    last = torch.zeros_like(one) if gamma else state.float()
    after = td_target(last, successor, one, gamma=1.0, lam=1.0)
    before = td_target(one, predecessor[:count], one, gamma=1.0, lam=1.0).double()
    length = after + before - 1
    weight = gamma ** (before - 1)
    if gamma < 1:
        weight = weight * length * (1 - gamma) / (1 - gamma**length)
    counts = state & (successor != -2) if gamma else state
    return torch.where(counts, weight, 0.0)
