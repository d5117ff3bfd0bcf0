"""The records that ops take and return."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Scale(NamedTuple):
    """What stands between a head's matrix product and the logits that it means."""

    temperature: float = 1.0
    softcap: float | None = None
    """``softcap * tanh(z / softcap)``, as Gemma has it."""
    logit_scale: float = 1.0
    """multiplies the product before the softcap, as Cohere and Granite have it."""


class ActionSet(NamedTuple):
    """The few tokens of each position that carry the teacher's probability.

    Members come first, by probability descending (ties: lowest id first); with ``include`` the
    taken token may follow them out of that order.
    """

    ids: Tensor
    """int32 ``[..., k]``; -1 where padded."""
    log_probs: Tensor
    """float32 ``[..., k]``; log pi* over the full vocabulary, nats; -inf where padded."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """int32 ``[...]``; number of members; 0 where the teacher's row has no usable logit."""

    @property
    def valid(self) -> Tensor:
        """bool ``[..., k]``: True where a slot holds a member."""
        return self.ids >= 0

    @property
    def mass(self) -> Tensor:
        """float32 ``[...]``: the teacher probability that the set holds."""
        return self.log_probs.exp().sum(-1)


class StudentRows(NamedTuple):
    """What is left of a student's row of logits: its values on a set, and the mass of the rest."""

    z: Tensor
    """float32 ``[..., k]``: scaled logits at the ids; -inf where padded."""
    log_rest: Tensor
    """float64 ``[...]`` (float32 on devices without): logsumexp of the scaled logits at every
    column but the ids. Differences with it are taken before it is rounded."""


class LogProbs(NamedTuple):
    """A distribution over the vocabulary, as its values on a set and the mass of the rest."""

    log_probs: Tensor
    """float32 ``[..., k]``: full-vocabulary log-probabilities, nats; -inf where padded."""
    log_tail: Tensor
    """float32 ``[...]``: log of the mass outside the set."""


class Vocabulary(NamedTuple):
    """A weighted subset of the vocabulary, from which ``log Z`` is estimated."""

    ids: Tensor
    """int32 ``[M]``, ascending, distinct; -1 where padded, at the end."""
    log_weight: Tensor
    """float32 ``[M]``: 0 for columns surely in, -log of its chance to be in for a sampled one
    (``log((V - |U|) / m)`` where all had the same); -inf where padded."""


class TDOutput(NamedTuple):
    """What a TD loss returns; ``loss``, ``q``, ``value`` and ``td_error`` are differentiable."""

    loss: Tensor
    """scalar, or ``[...]`` with ``reduction="none"``."""
    q: Tensor
    """float32 ``[...]``: Q of the taken token; 0 on rows that are no states."""
    value: Tensor
    """float32 ``[...]``: soft value V on the set; 0 on rows that are no states. With
    ``q="log_prob"`` it is the log of the student's mass on the set."""
    td_error: Tensor
    """float32 ``[...]``: ``Q(a) - gamma V'``; 0 where V' is unknown or the row is no state."""
    actions: ActionSet
    entropy: Tensor
    """float32 ``[...]``: entropy of the student renormalised on the set, ``softmax(Q)``, nats; no
    gradient; 0 on rows that are no states."""
    log_mass: Tensor | None = None
    """float32 ``[...]``: log of the student's full-vocabulary mass on the set, nats; no gradient; 0
    on rows that are no states. None where the loss needs no ``log Z``."""


def largest(z: Tensor) -> Tensor:
    """``[...]``: of each set ``[..., k]``; 0 where that is not finite."""
    if not z.shape[-1]:
        return z.new_zeros(z.shape[:-1])
    best = z.amax(-1)
    return torch.where(best.isfinite(), best, 0.0)


def following(per_row: Tensor, successor: Tensor) -> Tensor:
    """``per_row[successor]`` over flat rows; 0 where ``successor < 0``."""
    if not per_row.numel():
        return per_row
    return torch.where(successor >= 0, per_row.gather(0, successor.clamp(min=0)), 0.0)


@dataclass(frozen=True)
class Rows:
    """What an objective sees: N positions, k slots each, nothing of vocabulary size.

    Slots that are padded hold ``q = log_probs = -inf`` and ``valid = False``. Rows that are no
    states hold zeros, so that whatever an objective computes there stays finite.
    """

    q: Tensor
    """``[N, k]``: Q-values of the student on the set, nats."""
    log_probs: Tensor
    """``[N, k]``: the teacher's log-probabilities over the full vocabulary; no gradient."""
    valid: Tensor
    """bool ``[N, k]``: slots that hold a member."""
    slot: Tensor
    """int64 ``[N]``: slot of the taken token (0 on rows that are no states)."""
    value: Tensor
    """``[N]``: V, the soft value on the set."""
    next_value: Tensor
    """``[N]``: V' of the successor; 0 where the response ended or V' is unknown. Of the target
    network, without gradient, where there is one."""
    successor: Tensor
    """int64 ``[N]``: row of the next state; -1 terminal; -2 unknown."""
    state: Tensor
    """bool ``[N]``: rows that are states: a token is taken there, which its set holds."""
    gamma: float
    """discount."""
    log_mass: Tensor | None = None
    """``[N]``: log of the student's full-vocabulary mass on the set; None if not asked for."""
    log_tail: Tensor | None = None
    """``[N]``: log of the student's mass outside the set; None if not asked for."""
    occupancy: Tensor | None = None
    """``[N]``: what the row weighs in a mean that is discounted from the first state of its
    response: gamma^t on the row t states into it, times what makes the mean of the response's
    weights 1. The rows are those with a known V' (all of its states, at gamma = 0); 0 elsewhere;
    None if not asked for."""
    target_value: Tensor | None = None
    """``[N]``: V of a target network, no gradient; None where there is none."""
    expert_weight: Tensor | None = None
    """``[N]``: what the row weighs in a mean over the teacher's states: 0 where the student's own
    answer visited the state, rows / teacher's rows elsewhere; None where all are the teacher's."""

    @property
    def bootstrapped(self) -> Tensor:
        """bool ``[N]``: states whose V' is known (or not needed, at gamma = 0)."""
        return self.state & (self.successor != -2) if self.gamma else self.state

    def blanked(self) -> Rows:
        """As an objective that ``bootstraps`` sees them: on states whose V' is unknown, and which
        it does not count, members that the student excludes have q = 0, for 0 times their infinite
        gradient would be NaN."""
        if not self.gamma:
            return self
        unknown = (self.state & (self.successor == -2)).unsqueeze(-1)
        excluded = unknown & self.valid & (self.q == -torch.inf)
        return replace(self, q=torch.where(excluded, 0.0, self.q))

    def taken(self, per_slot: Tensor) -> Tensor:
        """``[N]``: the entry of ``per_slot [N, k]`` that belongs to the taken token."""
        return per_slot.gather(-1, self.slot.unsqueeze(-1)).squeeze(-1)

    def expert(self, per_row: Tensor) -> Tensor:
        """``[N]``: ``per_row`` for a mean over the teacher's states alone: the student's give 0."""
        if self.expert_weight is None:
            return per_row
        return self.expert_weight * torch.where(self.expert_weight > 0, per_row, 0.0)

    def following(self, per_row: Tensor) -> Tensor:
        """``[N]``: the entry of ``per_row [N]`` of each row's successor; 0 where it has none, or an
        unknown one."""
        return following(per_row, self.successor)

    @property
    def teacher_log_mass(self) -> Tensor:
        """``[N]``: log of the teacher's mass on the set; -inf where it excludes every member."""
        return torch.where(self.state, self.log_probs.logsumexp(-1), 0.0)

    @property
    def teacher_policy(self) -> Tensor:
        """``[N, k]``: log-probabilities of the teacher renormalised on the set; -inf where padded,
        and where the teacher excludes a member (logit -inf)."""
        held = self.log_probs > -torch.inf
        return torch.where(held, self.log_probs - self.teacher_log_mass.unsqueeze(-1), -torch.inf)

    @property
    def teacher_weights(self) -> Tensor:
        """``[N, k]``: the teacher renormalised on the set; 0 where padded."""
        return torch.where(self.valid, self.teacher_policy.exp(), 0.0)
