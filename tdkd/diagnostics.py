"""What a step of TD distillation has to tell, beside its loss."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tdkd import ops

logger = logging.getLogger("tdkd")

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
DRIFT = 10.0
"""Nats that a mean of values may move before somebody is told."""


def share(total: Tensor, count: Tensor | float) -> Tensor:
    """A sum and what it is to be divided by, once those of all micro-batches and ranks are added:
    some may have no rows. ``[2]``, float32."""
    total = total.detach().float()
    return torch.stack([total, torch.as_tensor(count, dtype=torch.float32, device=total.device)])


def diagnostics(
    out: ops.TDOutput,
    tokens: Tensor,
    successor: Tensor,
    *,
    log_prob: bool,
    gamma: float,
    state_value: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over the rows of one micro-batch, left on the device as :func:`share` makes them.

    Args:
        out: of the loss, over N rows that are states.
        tokens: taken tokens ``[N]``.
        successor: as in :func:`tdkd.ops.successors`, ``[N]``.
        log_prob: whether Q is a log-probability.
        gamma: discount.
        state_value: v(s) of a value head ``[N]``, where Q and V hold one.
    Returns:
        ``td_error``: mean size, and quantiles of ``Q(a) - gamma V'`` where V' is known (or, at
        gamma = 0, not needed), nats.
        ``q``, ``value``: means of Q(a) and V.
        ``set_size``, ``teacher_mass``: of the sets; and ``kappa``, nats: how far the best policy on
        sets of that mass can be from the best one, ``-gamma / (1 - gamma) E[log mass]``
        (arXiv 2505.20335; with gamma = 1 there is no bound, and no entry).
        ``set_kl``: mean of ``log pi*(a) - log pi_Q(a)`` on the set, an estimate of
        ``KL(teacher || student)`` there where the teacher took the tokens.
        ``entropy_gap``: mean of H(student) - H(teacher), both renormalised on the set, nats; the
        tail is left out, since nothing but the set is at hand where no normaliser is. Below 0 the
        student is surer than its teacher.
        Where the loss computed log Z: ``student_mass``, and ``value_gap``: mean of V - V*, V* being
        the log of the teacher's mass, which is the soft return that its own probabilities imply.
        Where V is no log-probability, the log of the student's mass stands in its place.
        With ``state_value``: its mean.
    """
    rows = out.q.numel()
    known = successor != -2 if gamma else torch.ones_like(successor, dtype=torch.bool)
    error = out.td_error.detach()
    metrics = {
        "td_error": share(error.abs().sum(), known.sum()),
        "q": share(out.q.sum(), rows),
        "value": share(out.value.sum(), rows),
        "set_size": share(out.actions.count.sum(), rows),
        "teacher_mass": share(out.actions.mass.sum(), rows),
    }
    # one more that does not count: a batch without rows has the same entries, or ranks part
    spread = torch.where(known, error.float(), torch.nan)
    spread = torch.cat([spread, spread.new_full((1,), torch.nan)])
    for name, at in QUANTILES.items():
        quantile = spread.nanquantile(at).nan_to_num(0.0)
        metrics[f"td_error_{name}"] = share(quantile, known.any())
    ids, log_probs, _ = out.actions
    theirs = log_probs.logsumexp(-1)
    # the taken token, once, though an id may stand twice in a caller's set
    slot = (ids == tokens.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    taken = log_probs.gather(-1, slot).squeeze(-1)
    wanted = taken - theirs
    usable = wanted.isfinite()
    ratio = torch.where(usable, wanted, 0.0) - torch.where(usable, out.q - out.value, 0.0).detach()
    metrics["set_kl"] = share(ratio.sum(), usable.sum())
    held = theirs.isfinite()
    policy = torch.where(log_probs == -torch.inf, -torch.inf, log_probs - theirs.unsqueeze(-1))
    theirs_entropy = torch.special.entr(policy.exp()).sum(-1)
    gap = torch.where(held, out.entropy - theirs_entropy, 0.0)
    metrics["entropy_gap"] = share(gap.sum(), rows)
    theirs = torch.where(held, theirs, 0.0)
    if gamma < 1:
        metrics["kappa"] = share(-gamma / (1 - gamma) * theirs.sum(), rows)
    if out.log_mass is not None:
        value = out.value.detach() if log_prob else out.log_mass
        metrics["student_mass"] = share(out.log_mass.exp().sum(), rows)
        metrics["value_gap"] = share(torch.where(held, value - theirs, 0.0).sum(), rows)
    if state_value is not None:
        metrics["state_value"] = share(state_value.sum(), rows)
    return metrics


class Drift:
    """Tells once that values have left the level where they began, where that level is free.

    It is free where Q is the raw logit, and where a value head adds one. The log of a mass moves
    for good reasons, logits that are shifted cannot move so far, and what does not look ahead sees
    no level.

    Args:
        level: what Q is: as ``q`` of :func:`tdkd.ops.td_loss`.
        value_head: whether v(s) is learned.
        looks_ahead: whether V' has a say in the loss.
    """

    metric = ""
    """The entry of the log that is looked at, if any."""

    def __init__(self, level: str, *, value_head: bool, looks_ahead: bool) -> None:
        self._why = ""
        if looks_ahead and level == "logit":
            self.metric = "value"
            self._why = "Where Q is the raw logit its level is free; q_level: log_prob has none."
        elif looks_ahead and value_head:
            self.metric = "state_value"
            self._why = "The value head adds it to every Q; value_head: false has none."
        self._told = False

    def see(self, now: float, log: list[dict[str, float]]) -> None:
        """The mean of a log entry, nats, and the entries before it, those of the run that was
        resumed among them: the first is the level where it began."""
        first = next((entry[self.metric] for entry in log if self.metric in entry), now)
        if self._told or abs(now - first) <= DRIFT:
            return
        self._told = True
        logger.warning(
            "%s: its mean went from %.1f to %.1f nats, a level that drowns the policy in "
            "Q - gamma V'. %s",
            self.metric,
            first,
            now,
            self._why,
        )
