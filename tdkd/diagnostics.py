"""What a step of TD distillation has to tell, beside its loss."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tdkd import ops

logger = logging.getLogger("tdkd")

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
DRIFT = 10.0
"""Nats that the mean V may move before somebody is told."""


def diagnostics(
    out: ops.TDOutput,
    tokens: Tensor,
    successor: Tensor,
    *,
    log_prob: bool,
    gamma: float,
    state_value: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over the rows of one micro-batch, left on the device.

    Args:
        out: of the loss, over N rows that are states.
        tokens: taken tokens ``[N]``.
        successor: as in :func:`tdkd.ops.successors`, ``[N]``.
        log_prob: whether Q is a log-probability.
        gamma: discount.
        state_value: v(s) of a value head ``[N]``, where Q and V hold one.
    Returns:
        ``td_error``: mean size, and quantiles of ``Q(a) - gamma V'`` where V' is known, nats.
        ``q``, ``value``: means of Q(a) and V.
        ``set_size``, ``teacher_mass``: of the sets; and ``kappa``, nats: how far the best policy on
        sets of that mass can be from the best one, ``-gamma / (1 - gamma) E[log mass]``
        (arXiv 2505.20335; with gamma = 1 there is no bound, and no entry).
        ``set_kl``: mean of ``log pi*(a) - log pi_Q(a)`` on the set, an estimate of
        ``KL(teacher || student)`` there where the teacher took the tokens.
        ``entropy_gap``: mean of H(student) - H(teacher), both renormalised on the set, nats; the
        tail is left out, since nothing but the set is at hand where no normaliser is. Below 0 the
        student is surer than its teacher.
        With ``log_prob``: ``student_mass``, and ``value_gap``: mean of V - V*, V* being the log of
        the teacher's mass, which is the soft return that its own probabilities imply.
        With ``state_value``: its mean.
    """
    rows = max(1, out.q.numel())
    known = successor != -2
    error = out.td_error.detach()
    metrics = {
        "td_error": error.abs().sum() / known.sum().clamp(min=1),
        "q": out.q.detach().sum() / rows,
        "value": out.value.detach().sum() / rows,
        "set_size": out.actions.count.sum() / rows,
        "teacher_mass": out.actions.mass.sum() / rows,
    }
    # one more that does not count: a batch without rows has the same entries, or ranks part
    spread = torch.where(known, error.float(), torch.nan)
    spread = torch.cat([spread, spread.new_full((1,), torch.nan)])
    for name, share in QUANTILES.items():
        metrics[f"td_error_{name}"] = spread.nanquantile(share).nan_to_num(0.0)
    ids, log_probs, _ = out.actions
    theirs = log_probs.logsumexp(-1)
    # the taken token, once, though an id may stand twice in a caller's set
    slot = (ids == tokens.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    taken = log_probs.gather(-1, slot).squeeze(-1)
    wanted = taken - theirs
    usable = wanted.isfinite()
    ratio = torch.where(usable, wanted, 0.0) - torch.where(usable, out.q - out.value, 0.0).detach()
    metrics["set_kl"] = ratio.sum() / usable.sum().clamp(min=1)
    held = theirs.isfinite()
    policy = torch.where(log_probs == -torch.inf, -torch.inf, log_probs - theirs.unsqueeze(-1))
    theirs_entropy = torch.special.entr(policy.exp()).sum(-1)
    metrics["entropy_gap"] = torch.where(held, out.entropy - theirs_entropy, 0.0).sum() / rows
    theirs = torch.where(held, theirs, 0.0)
    if gamma < 1:
        metrics["kappa"] = -gamma / (1 - gamma) * theirs.sum() / rows
    if log_prob:
        value = out.value.detach()
        log_mass = value if state_value is None else value - state_value.detach()
        metrics["student_mass"] = log_mass.exp().sum() / rows
        metrics["value_gap"] = torch.where(held, value - theirs, 0.0).sum() / rows
    if state_value is not None:
        metrics["state_value"] = state_value.detach().sum() / rows
    return metrics


class Drift:
    """Tells once that V has left the level where it began."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._told = False

    def see(self, value: float) -> None:
        """The mean V of a log entry, nats."""
        if self._first is None:
            self._first = value
        elif abs(value - self._first) > DRIFT and not self._told:
            self._told = True
            logger.warning(
                "value: the mean V went from %.1f to %.1f nats. Where Q is the raw logit its level "
                "is free, and drowns the policy in Q - gamma V'; q_level: log_prob has none.",
                self._first,
                value,
            )
