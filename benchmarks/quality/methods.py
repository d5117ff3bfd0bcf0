"""The methods that are compared: each is a loss of one batch's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tdkd import ops
from tdkd.diagnostics import diagnostics
from tdkd.lm_loss import lm_cross_entropy
from tdkd.models import Head
from tdkd.objectives import (
    JSD,
    ForwardKL,
    IQLearn,
    Objective,
    ObjectiveLike,
    ReverseKL,
    SkewKL,
    SoftTD,
    TotalVariation,
    parse,
)
from tdkd.published import published_loss
from tdkd.types import Rows

GAMMA = 0.99
TARGET_DECAY = 0.9
"""Of a target network: an average over about the last ten steps, of runs of 40 to 100."""
SET: dict[str, Any] = {"k": 64, "top_p": 0.8}
Dense = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A loss; what it adds up is taken as a mean over the rows of a batch."""

    words: str
    objective: ObjectiveLike | None = None
    dense: Dense | None = None
    """of the logits of student and teacher ``[N, V]``, tokens and successor."""
    lm_weight: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    """of the op, beside ``SET`` and ``gamma``."""
    lmbda: float = 0.0
    """probability that a sequence is the student's own answer, which a live teacher scores."""
    value_head: bool = False
    """whether the student learns a v(s) beside its policy, ``Q = log pi + v(s)``."""
    target_decay: float | None = None
    """of the average of the student that V' is taken from; None: V' is the student's own."""

    @property
    def needs_teacher(self) -> bool:
        return self.objective is not None or self.dense is not None

    @property
    def needs_live_teacher(self) -> bool:
        return self.dense is not None or self.lmbda > 0

    def select(self, teacher_hidden: Tensor, teacher: Head, tokens: Tensor) -> ops.ActionSet | None:
        """The action sets of N rows; None for a method that has none."""
        if self.objective is None:
            return None
        given = SET | {name: value for name, value in self.options if name in SET}
        return ops.linear_select_actions(teacher_hidden, teacher.weight, **given, include=tokens)

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        teacher_hidden: Tensor,
        teacher: Head,
        tokens: Tensor,
        successor: Tensor,
        actions: ops.ActionSet | None = None,
        state_value: Tensor | None = None,
        own: Tensor | None = None,
        target: tuple[Tensor, Head, Tensor | None] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of N rows ``[N, H]``, and what there is to tell of it.

        ``actions``: what :meth:`select` made, as a cache would give it. ``state_value``: v(s) of
        the rows, ``[N]``. ``own``: bool ``[N]``, rows of the student's own answers, from whose
        tokens the LM loss does not learn. ``target``: hidden states, head and v(s) of the network
        that V' is taken from.
        """
        total = hidden.new_zeros(())
        told: dict[str, float] = {}
        if self.objective is not None:
            given = SET | {"normaliser": "exact", "gamma": GAMMA} | dict(self.options)
            if actions is None:
                live = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher.weight}
            else:
                live = {"actions": actions}
                given = {name: value for name, value in given.items() if name not in SET}
            weight = None
            if self.lmbda and own is not None:
                # what learns from the tokens of the data is a mean over the data's rows
                weight = torch.where(own, 0.0, own.numel() / (~own).sum().clamp(min=1))
            common = {**live, "successor": successor, **given}
            target_value = None
            if target is not None:
                slow, slow_head, slow_value = target
                with torch.no_grad():  # of this loss only V is wanted: the cheapest one
                    target_value = ops.linear_td_loss(
                        slow,
                        slow_head.weight,
                        tokens,
                        objective=IQLearn(),
                        state_value=slow_value,
                        **common,
                    ).value
            out = ops.linear_td_loss(
                hidden,
                head.weight,
                tokens,
                objective=self.objective,
                state_value=state_value,
                target_value=target_value,
                expert_weight=weight,
                **common,
            )
            total = total + out.loss
            level = given.get("q", "log_prob") == "log_prob"
            made = diagnostics(
                out,
                tokens,
                successor,
                log_prob=level,
                gamma=given["gamma"],
                state_value=state_value,
            )
            told = {name: (x[0] / x[1].clamp(min=1e-30)).item() for name, x in made.items()}
        if self.dense is not None:
            with torch.no_grad():
                wanted = teacher_hidden @ teacher.weight.T
            total = total + self.dense(hidden @ head.weight.T, wanted, tokens, successor)
        if self.lm_weight:
            if own is not None:
                hidden, tokens = hidden[~own], tokens[~own]
            mean = lm_cross_entropy(hidden, head, tokens) / max(1, len(tokens))
            total = total + self.lm_weight * mean
        return total, told


def full_kl(student: Tensor, teacher: Tensor, tokens: Tensor, successor: Tensor) -> Tensor:
    """KL(teacher || student) over the whole vocabulary."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def published(
    student: Tensor, teacher: Tensor, tokens: Tensor, successor: Tensor, *, chi2: bool = True
) -> Tensor:
    """The authors' code on the rows of each response, one sequence at a time."""
    ends = (successor < 0).nonzero().squeeze(-1) + 1
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    padding = -1  # no token: nothing is padded here
    parts = [x.split(sizes) for x in (student, teacher, tokens)]
    losses = [
        published_loss(s[None], t[None], y[None], chi2=chi2, pad_token_id=padding)[0] * len(y)
        for s, t, y in zip(*parts, strict=True)
        if len(y) > 1
    ]
    return torch.stack(losses).sum() / len(tokens)


def iq_whole(
    student: Tensor, teacher: Tensor, tokens: Tensor, successor: Tensor, *, alpha: float
) -> Tensor:
    """IQ-Learn's chi2 over the whole vocabulary: cross-entropy and a square of the reward that the
    logits imply (arXiv 2409.01369). It asks nothing of the teacher, whose logits a dense loss gets
    all the same: no time of it is told."""
    q = student.gather(-1, tokens[:, None]).squeeze(-1)
    v = student.logsumexp(-1)
    reward = torch.where(successor == -2, 0.0, q - ops.td_target(v, successor, gamma=GAMMA))
    return (v - q + reward.square() / (4 * alpha)).mean()


class Ahead(Objective):
    """What reverse KL of whole answers has beside that of their states (MiniLLM, arXiv 2306.08543,
    eq. 4 to 6): the policy gradient of the mean of ``log p - log q`` over the rest of the answer.

    0 on the data's answers, where the method has others. MiniLLM also mixes the teacher into
    sampling, with weights and clipping for that.
    """

    bootstraps = True

    def __call__(self, rows: Rows) -> Tensor:
        q = rows.taken(rows.q)
        reward = torch.where(rows.state, rows.taken(rows.log_probs) - q.detach(), 0.0)
        reward = reward.clamp(min=-20.0)  # a token that the teacher excludes
        given = {"gamma": 1.0, "lam": 1.0, "impl": "reference"}
        gain, length = (
            rows.following(ops.td_target(torch.zeros_like(q), rows.successor, reward=each, **given))
            for each in (reward, torch.ones_like(reward))
        )
        ahead = gain / length.clamp(min=1.0)
        if rows.expert_weight is not None:
            ahead = torch.where(rows.expert_weight > 0, 0.0, ahead)
        return -ahead * q


def bellman_distill(
    student: Tensor, teacher: Tensor, tokens: Tensor, successor: Tensor, *, chi2: bool = True
) -> Tensor:
    """What the authors train with beside the LM loss: their TD loss and forward KL."""
    given = student, teacher, tokens, successor
    return published(*given, chi2=chi2) + full_kl(*given)


KL = ForwardKL(tail=True)
LOGIT = (("q", "logit"),)
BATCH = (("normaliser", "batch"),)
LAW = ("law", "student")
P1 = (("top_p", 1.0), *BATCH, LAW)
TAKEN = (("k", 1), ("top_p", 1.0), ("gamma", 0.0))
"""What a server tells that gives no alternatives: the log-probability of the token that it wrote.

Over the whole vocabulary V and V* are 0 at every state, so that a soft TD error is ``log pi(a) -
log pi*(a)`` whatever gamma is; on a set of one token it is so with gamma = 0."""

METHODS: dict[str, Method] = {
    # cloning
    "sft": Method("cross-entropy on the teacher's answers (SeqKD)", lm_weight=1.0),
    "kl-full": Method("forward KL, whole vocabulary (KD)", dense=full_kl),
    "kl-tail": Method("forward KL, set and tail bucket", KL),
    "kl-tail-p1": Method(
        "the same on the 64 likeliest tokens, whatever they hold", KL, options=(("top_p", 1.0),)
    ),
    "kl-set": Method("forward KL, renormalised on the set", ForwardKL(), options=LOGIT),
    "rkl-tail": Method("reverse KL, set and tail bucket", ReverseKL(tail=True)),
    "jsd-tail": Method("JSD(0.5), set and tail bucket", JSD(tail=True)),
    "skew-tail": Method("skew KL 0.1, set and tail bucket", SkewKL(tail=True)),
    "tv-tail": Method("total variation, set and tail bucket", TotalVariation(tail=True)),
    # TD alone
    "iq-paper": Method(
        "IQ-Learn chi2, alpha 0.1, raw logits (the paper)", IQLearn(), options=LOGIT
    ),
    "iq-identity": Method(
        "IQ-Learn without chi2, raw logits (the paper's ablation)",
        IQLearn("identity"),
        options=LOGIT,
    ),
    "published": Method("the authors' code", dense=published),
    "published-identity": Method(
        "the authors' code without chi2", dense=partial(published, chi2=False)
    ),
    "published-kd": Method("the authors' code + forward KL", dense=bellman_distill),
    "published-identity-kd": Method(
        "the authors' code without chi2 + forward KL", dense=partial(bellman_distill, chi2=False)
    ),
    "soft-td": Method("soft TD regression, one step", SoftTD(huber=1.0)),
    "iq-whole": Method(
        "IQ-Learn chi2, whole vocabulary, raw logits, alpha 10", dense=partial(iq_whole, alpha=10.0)
    ),
    "iq-whole-1": Method("the same, alpha 1", dense=partial(iq_whole, alpha=1.0)),
    # TD beside cloning
    "kl-tail+iq": Method(
        "forward KL with tail + 0.05 IQ-Learn chi2, alpha 2, stop-gradient (the demo's)",
        KL + 0.05 * IQLearn(alpha=2.0, stop_gradient="next"),
    ),
    "kl-tail+iq-teacher": Method(
        "the same over the teacher's distribution on the set",
        KL + 0.05 * IQLearn(alpha=2.0, stop_gradient="next", expectation="teacher"),
    ),
    "kl-tail+iq-flow": Method("the same with gradients through V'", KL + 0.05 * IQLearn(alpha=2.0)),
    "kl-tail+soft": Method(
        "forward KL with tail + 0.1 soft TD, one step", KL + 0.1 * SoftTD(huber=1.0)
    ),
    "kl-tail+soft-flow": Method(
        "the same with gradients through V'", KL + 0.1 * SoftTD(huber=1.0, stop_gradient=None)
    ),
    # normalisers
    "kl-tail-batch": Method("forward KL with tail, log Z from 1024 columns", KL, options=BATCH),
    "kl-tail-student": Method("the same by the student's law", KL, options=(*BATCH, LAW)),
    # the 64 likeliest tokens, whatever they hold, and log Z by the student's law
    "kl-p1": Method("forward KL, top 64 and tail bucket", KL, options=P1),
    "kl-p1-uniform": Method(
        "forward KL, top 64 and tail bucket, log Z from 1024 uniform columns",
        KL,
        options=(("top_p", 1.0), *BATCH),
    ),
    "kl-p1-set": Method(
        "forward KL renormalised on the top 64: no log Z",
        ForwardKL(),
        options=(("top_p", 1.0), *LOGIT),
    ),
    "kl-p1-256": Method("forward KL, top 256 and tail bucket", KL, options=(*P1, ("k", 256))),
    "rkl-p1": Method("reverse KL, top 64 and tail bucket", ReverseKL(tail=True), options=P1),
    "jsd-p1": Method("JSD(0.5), top 64 and tail bucket", JSD(tail=True), options=P1),
    "skew-p1": Method("skew KL 0.1, top 64 and tail bucket", SkewKL(tail=True), options=P1),
    "tv-p1": Method("total variation, top 64 and tail", TotalVariation(tail=True), options=P1),
    "kl-p1+tv": Method(
        "forward KL + total variation, top 64 and tail", KL + TotalVariation(tail=True), options=P1
    ),
    "kl-p1+iq": Method(
        "forward KL + 0.05 IQ-Learn chi2, alpha 2, stop-gradient, top 64",
        KL + 0.05 * IQLearn(alpha=2.0, stop_gradient="next"),
        options=P1,
    ),
    "kl-p1+iq-teacher": Method(
        "forward KL + 0.5 IQ-Learn chi2, alpha 2, teacher's expectation, top 64",
        KL + 0.5 * IQLearn(alpha=2.0, stop_gradient="next", expectation="teacher"),
        options=P1,
    ),
    "kl-p1+iq-shifted": Method(
        "forward KL + 0.05 IQ-Learn chi2, alpha 1, Q less its largest, top 64",
        KL + 0.05 * IQLearn(alpha=1.0),
        options=(*P1, ("q", "shifted")),
    ),
    # on the student's own answers
    "gkd": Method("JSD(0.5), half of the answers the student's", JSD(tail=True), None, 0, P1, 0.5),
    "opd": Method("reverse KL, the student's answers", ReverseKL(tail=True), None, 0, P1, 1.0),
    "minillm": Method(
        "reverse KL of whole answers, half of them the student's (like MiniLLM)",
        ReverseKL(tail=True) + Ahead(),
        options=P1,
        lmbda=0.5,
    ),
    "kl-p1-own": Method("forward KL, half of the answers the student's", KL, None, 0, P1, 0.5),
    "kl-p1+soft": Method(
        "forward KL + 0.1 soft TD, one step, top 64", KL + 0.1 * SoftTD(huber=1.0), options=P1
    ),
}


ALPHAS = (0.1, 1.0, 10.0)


def family() -> dict[str, Method]:
    """IQ-Learn's chi2 alone, by level of Q, strength, expectation and gradient through V'."""
    made = {}
    for level, alpha, expectation, flow in product(
        ("logit", "log_prob"), ALPHAS, ("token", "teacher"), ("flow", "stop")
    ):
        objective = IQLearn(
            alpha=alpha, expectation=expectation, stop_gradient="next" if flow == "stop" else None
        )
        options = LOGIT if level == "logit" else ()
        name = f"iq-{level}-{alpha:g}-{expectation}-{flow}"
        words = f"IQ-Learn chi2, {level}, alpha {alpha:g}, over the {expectation}, {flow}"
        made[name] = Method(words, objective, options=options)
    return made


FAMILY = family()
"""What `run.py` runs only where it is named."""


def with_extras(name: str) -> Method:
    """A method by its name, or the one of an objective that the name is the text of, on the top 64.

    At the end ``+top5`` takes the 5 likeliest, ``+gamma0`` sets gamma, ``+taken`` leaves of each
    set the taken token, ``+value`` adds a value head, ``+ema`` takes V' from an average of the
    student, and ``+lm`` adds the LM loss, in this order.
    """
    plain, lm = name.removesuffix("+lm"), name.endswith("+lm")
    plain, ema = plain.removesuffix("+ema"), plain.endswith("+ema")
    plain, value_head = plain.removesuffix("+value"), plain.endswith("+value")
    plain, taken = plain.removesuffix("+taken"), plain.endswith("+taken")
    plain, _, gamma = plain.partition("+gamma")
    plain, _, top = plain.partition("+top")
    method = (METHODS | FAMILY).get(plain)
    if method is None:
        try:
            method = Method(f"{plain}, top 64", parse(plain), options=P1)
        except ValueError as error:
            raise SystemExit(
                f"method: expected one of {', '.join(METHODS)}, one of gradients.py, or the text "
                "of an objective, +top5, +gamma0, +taken, +value, +ema, +lm or not, "
                f"got {name} ({error})"
            ) from error
    words = f"{plain}, the taken token alone" if taken else method.words
    words += f", gamma {gamma}" * bool(gamma)
    words += " + value head" * value_head + " + target network" * ema + " + LM" * lm
    lm_weight = 1.0 if lm else method.lm_weight
    options = TAKEN if taken else method.options
    if top:
        words = words.replace("top 64", f"top {top}")
        options = (*options, ("k", int(top)))
    if gamma:
        options = (*options, ("gamma", float(gamma)))
    return replace(
        method,
        words=words,
        options=options,
        lm_weight=lm_weight,
        value_head=value_head,
        target_decay=TARGET_DECAY if ema else None,
    )
