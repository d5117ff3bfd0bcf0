"""The public ops: what they mean, what they refuse, and the choice of implementation.

Conventions: student before teacher; logits ``[..., V]``, or hidden states ``[..., H]`` with a head
``[V, H]``; the caller shifts tokens, so that row i is the state in which ``tokens[i]`` is taken;
``ignore_index`` marks rows that are no states. Outputs are float32, float64 where the input is.

``impl="reference"`` is plain PyTorch on any device and defines the op; ``"fused"`` is the kernel
and raises where there is none; ``"auto"`` takes the kernel where one exists, and on a GPU warns
once where none does.

Products with a head take their factors in the dtype of autocast, where it is on, as those of a
linear layer do, and without it in that of hidden states and head, where they share one: on GPUs,
and for bfloat16 on CPUs that multiply it (AVX512-BF16, AMX); elsewhere in float32. Results are
float32, and gradients until they are given in the leaf's dtype; the gradient of a chunk of logits
is rounded to the dtype of the factors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from tdkd import arguments as _check
from tdkd.kernels import backends as _backends
from tdkd.kernels import gather_q as _gather_q
from tdkd.kernels import head as _head
from tdkd.kernels import linear_gather_q as _linear_gather_q
from tdkd.kernels import linear_rows as _linear_rows
from tdkd.kernels import linear_select_actions as _linear_select_actions
from tdkd.kernels import routes as _routes
from tdkd.kernels import sampled_rows as _sampled_rows
from tdkd.kernels import select_actions as _select_actions
from tdkd.kernels import soft_value as _soft_value
from tdkd.kernels import student_rows as _student_rows
from tdkd.kernels import td_target as _td_target
from tdkd.kernels.batch_vocabulary import reference as _batch_vocabulary
from tdkd.kernels.gather_q import reference as _gather_q_reference
from tdkd.kernels.linear_gather_q import reference as _linear_gather_q_reference
from tdkd.kernels.linear_rows import reference as _linear_rows_reference
from tdkd.kernels.linear_rows.in_forward import linear_loss
from tdkd.kernels.linear_rows.row_loss import row_loss
from tdkd.kernels.linear_select_actions import reference as _linear_select_actions_reference
from tdkd.kernels.sampled_rows import reference as _sampled_rows_reference
from tdkd.kernels.select_actions import reference as _select_actions_reference
from tdkd.kernels.soft_value import reference as _soft_value_reference
from tdkd.kernels.student_rows import reference as _student_rows_reference
from tdkd.kernels.td_target import reference as _td_target_reference
from tdkd.objectives import IQLearn, Objective, ObjectiveLike, as_objective
from tdkd.td_rows import RowTerms, TDRows
from tdkd.types import (
    ActionSet,
    LogProbs,
    Scale,
    StudentRows,
    TDOutput,
    Vocabulary,
    largest,
)

__all__ = [
    "ActionSet",
    "LogProbs",
    "TDOutput",
    "Vocabulary",
    "batch_vocabulary",
    "gather_q",
    "linear_gather_q",
    "linear_log_probs",
    "linear_logsumexp",
    "linear_select_actions",
    "linear_td_loss",
    "routes",
    "sampled_vocabulary",
    "select_actions",
    "soft_value",
    "student_law",
    "successors",
    "td_loss",
    "td_target",
]

logger = logging.getLogger("tdkd")

Impl = Literal["auto", "reference", "fused"]
Level = Literal["log_prob", "logit", "shifted"]
Normaliser = Literal["exact", "batch", "sampled"]
Reduction = Literal["mean", "sum", "none"]


def select_actions(
    logits: Tensor,
    k: int = 64,
    top_p: float = 1.0,
    *,
    temperature: float = 1.0,
    include: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = False,
    impl: Impl = "auto",
) -> ActionSet:
    """The teacher's action sets: the shortest top-p prefix of each row, cut at ``k``.

    Tokens are ordered by (probability descending, id ascending), and the set is the shortest prefix
    whose probability reaches ``top_p`` (within 1e-5 of it, so that rounding decides nothing), at
    least one token and at most ``k``. ``top_p=1`` is plain top-k. Tokens with logit -inf are never
    members. A row with NaN, with +inf, or with nothing finite gives an empty set. No gradient.
    The top-p candidate set of arXiv 2505.20335. On a kernel no tensor of the logits' size is made.

    Args:
        logits: teacher logits ``(..., V)``; float64, float32, bfloat16 or float16.
        k: cap of a set, >= 1; may exceed V.
        top_p: probability that a set must reach, in (0, 1].
        temperature: divides the logits, > 0.
        include: taken tokens ``(...)``; each is in its set afterwards: appended, or in place of the
            last member when the set is full. Negative entries include nothing.
        vocab_size: columns at and above it are padding and do not exist.
        softcap: ``softcap * tanh(z / softcap)`` on the logits before the temperature (Gemma).
        logit_scale: multiplies the logits before the softcap (Cohere, Granite).
        check: refuse rows without a usable logit and ids out of range, at the price of a host sync.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        ``ActionSet(ids int32 (..., k), log_probs float32 (..., k), count int32 (...))``.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.
        RuntimeError: an id is >= V that nobody looked at (``check``); on a GPU NaN in its place.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.

    >>> actions = select_actions(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), k=3, top_p=0.9)
    >>> actions.ids.tolist(), actions.count.tolist()
    ([[1, 3, -1]], [2])
    """
    _check.floating("logits", logits)
    _check.selection(k, top_p)
    scale = _check.scale("", temperature, softcap, logit_scale)
    logits = _check.columns("logits", logits, vocab_size)
    if include is not None:
        _check.tokens("include", include, logits.shape[:-1], logits)
        if check:
            _check.ids_below("include", include, logits.shape[-1])
    if check:
        _check.usable("logits", logits)
    op = _select_actions if _fused(impl, logits, k=k) else _select_actions_reference
    return op.select_actions(logits, k, top_p, scale, include)


def gather_q(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Q-values of an action set: ``logits.gather(-1, ids) / temperature``, -inf where padded.

    Differentiable; backward writes one dense gradient (:func:`linear_gather_q` writes none).

    Args:
        logits: student logits ``(..., V)``; float64, float32, bfloat16 or float16.
        ids: token ids ``(..., k)``, int32 or int64; negative ids pad.
        temperature: divides the logits, > 0.
        softcap: as in :func:`select_actions`.
        logit_scale: as in :func:`select_actions`.
        check: refuse ids >= V, at the price of a host sync.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        Q-values in nats, ``(..., k)``, float32.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: leading dims differ, an option is out of range, or (``check``) an id is >= V.
        RuntimeError: an id is >= V that nobody looked at (``check``); on a GPU NaN in its place.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    _check.floating("logits", logits)
    scale = _check.scale("", temperature, softcap, logit_scale)
    ids = _check.set_ids("ids", ids, logits.shape[:-1], logits)
    if check:
        _check.ids_below("ids", ids, logits.shape[-1])
    op = _gather_q if _fused(impl, logits, k=ids.shape[-1]) else _gather_q_reference
    return op.gather_q(logits, ids, scale)


def soft_value(q: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Soft value of each set: ``V = logsumexp(q, -1)``; -inf, without gradient, on an empty one.

    Args:
        q: Q-values in nats ``(..., k)``; -inf where padded.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        ``(...)``, float32, nats.
    Raises:
        TypeError: ``q`` is not floating point.
        ValueError: ``q`` has no dimension.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    _check.floating("q", q)
    q = _accumulated(q)
    op = _soft_value if _fused(impl, q) else _soft_value_reference
    return op.soft_value(q)


def successors(
    tokens: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The row of each row's next state, for every layout of sequences.

    Row i is the state in which ``tokens[i]`` is taken. Its successor is the row after it in the
    same sequence, if that is a state too. Rows are numbered over all leading dims, row-major.

    Args:
        tokens: taken tokens ``(..., T)``, already shifted; ``ignore_index`` where a row is no state
            (prompt, padding on either side, other people's turns).
        cu_seqlens: for one packed sequence ``(T,)`` or ``(1, T)``: offsets ``(S + 1,)`` of its S
            sequences, ascending from 0 to T (not checked, which would be a host sync).
        eos_token_id: token or tokens that end a response. None: every response counts as cut off.
        ignore_index: see ``tokens``.
    Returns:
        int64, the shape of ``tokens``: row of the next state; -1 where the token ends the response
        (terminal, V' = 0); -2 where it was cut off (V' unknown), and on rows that are no states.
    Raises:
        TypeError: ``tokens``, ``cu_seqlens`` or ``eos_token_id`` are not integers.
        ValueError: ``tokens`` has no dimension, or ``cu_seqlens`` does not fit them.

    >>> successors(torch.tensor([-100, 5, 6, 2, 7, 8]), eos_token_id=2).tolist()
    [-2, 2, 3, -1, 5, -2]
    """
    _check.integers("tokens", tokens)
    if tokens.dim() == 0:
        raise ValueError("tokens: expected at least one dimension, got a scalar")
    state = tokens != ignore_index
    follows = torch.zeros_like(state)
    follows[..., :-1] = state[..., 1:]
    if cu_seqlens is not None:
        _check.integers("cu_seqlens", cu_seqlens)
        length = tokens.shape[-1]
        if cu_seqlens.dim() != 1 or tokens.numel() != length:
            raise ValueError(
                "cu_seqlens: expected offsets (S + 1,) with tokens (T,) or (1, T), got "
                f"{tuple(cu_seqlens.shape)} with tokens {tuple(tokens.shape)}"
            )
        starts = torch.zeros(length + 1, dtype=torch.bool, device=tokens.device)
        starts.index_fill_(0, cu_seqlens.long().clamp(max=length), 1)
        follows &= ~starts[1:]
    rows = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    successor = torch.where(state & follows, rows + 1, -2)
    if eos_token_id is not None:
        eos = _check.token_ids("eos_token_id", eos_token_id).to(tokens.device)
        ends = (tokens.unsqueeze(-1) == eos).any(-1)
        successor = torch.where(state & ends, -1, successor)
    return successor


def td_target(
    value: Tensor,
    successor: Tensor,
    *,
    gamma: float = 0.99,
    reward: Tensor | None = None,
    lam: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Targets of temporal-difference learning: ``r + gamma V'``, or TD(lambda) returns.

    With ``lam``, ``G_i = r_i + gamma ((1 - lam) V'_i + lam G_{i'})`` along the chain of successors
    i'; ``lam=0`` is the one-step target. At a terminal row ``G = r``. A row that was cut off
    (successor -2) has no target: it holds its own value, from which the return of the row before
    it bootstraps.

    Args:
        value: V of each row ``(...)``, nats; rows are numbered over all dims, row-major.
        successor: int32 or int64 ``(...)``, as :func:`successors` returns it.
        gamma: discount in [0, 1].
        reward: ``(...)``, nats; None means 0, as in inverse RL.
        lam: lambda in [0, 1], or None for the one-step target.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        Targets ``(...)``, float32, differentiable in ``value`` and ``reward``.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes differ, or ``gamma`` or ``lam`` is outside [0, 1].
        RuntimeError: the successors go in a circle (on a CPU; the reference does not look).
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    _check.floating("value", value, dims=0)
    successor = _check.successor(successor, value.shape, value)
    _check.within("gamma", gamma, 0.0, 1.0)
    if lam is not None:
        _check.within("lam", lam, 0.0, 1.0)
    value = _accumulated(value)
    if reward is not None:
        _check.floating("reward", reward, dims=0)
        _check.same_shape("reward", reward, value.shape, "value")
        _check.same_device("reward", reward, value)
        reward = reward.to(value.dtype).flatten()
    op = _td_target if _fused(impl, value) else _td_target_reference
    target = op.td_target(value.flatten(), successor.flatten(), reward, gamma=gamma, lam=lam)
    return target.reshape(value.shape)


def td_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    *,
    objective: ObjectiveLike | None = None,
    q: Level = "log_prob",
    k: int = 64,
    top_p: float = 0.8,
    gamma: float = 0.99,
    successor: Tensor | None = None,
    target_value: Tensor | None = None,
    state_value: Tensor | None = None,
    expert_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    check: bool = False,
    impl: Impl = "auto",
) -> TDOutput:
    """TD distillation from logits: one call in place of a KD loss.

    **Warning**: the default objective, ``IQLearn()`` with alpha 0.1, is the paper's formula, and
    alone it undoes a student (``docs/quality.md``). To train take ``ForwardKL(tail=True)`` and
    ``top_p=1.0``; a TD term goes beside such a one, never in its place.

    Selects the teacher's action sets (the taken token always in), gathers the student's Q on them,
    takes soft values, bootstraps along ``successor`` and hands the rows to the objective
    (arXiv 2505.20335, section 4). Logits outside the sets matter through ``log Z`` alone
    (``q="log_prob"``), or not at all (``q="logit"``). On a kernel one tensor of their size is made,
    the gradient of the student's (with ``vocab_size`` a second one, of its columns).

    Args:
        student_logits: ``(..., V)``; float64, float32, bfloat16 or float16.
        teacher_logits: ``(..., V)``, no gradient.
        tokens: taken tokens ``(...)``, already shifted; ``ignore_index`` where a row is no state.
        objective: see :mod:`tdkd.objectives`; None is ``IQLearn()``: see the warning.
        q: ``"log_prob"``: Q is the student's full-vocabulary log-probability; ``"logit"``: its
            logit (the paper), whose level is free; ``"shifted"``: its logit less the set's largest,
            and no less than -10 (the authors' code, which takes the whole row's largest; with the
            set's V is blind to mass outside it).
        k: cap of an action set, >= 1.
        top_p: teacher probability that a set must reach, in (0, 1].
        gamma: discount in [0, 1].
        successor: int32 or int64 ``(...)`` from :func:`successors`; None derives it from
            ``tokens`` with every response cut off at its end.
        target_value: soft values ``(...)`` of a target network on the same rows and sets, for V' in
            place of the student's own: the ``value`` of this op with the target network's logits.
            No gradient.
        state_value: v ``(...)``, nats, added to every Q of its row, and so to V, as a value head
            gives it: ``Q = log pi + v(s)``. Differentiable. The policy does not change, so that
            only objectives that look ahead see it.
        expert_weight: ``(...)``, >= 0, for batches that also hold states which the student's own
            answers visited: 0 there, and rows / teacher's rows on the teacher's, so that what an
            objective learns from the teacher's tokens is a mean over them. No gradient.
        temperature: divides the student's logits, > 0. The loss is not multiplied by T^2.
        teacher_temperature: divides the teacher's logits, > 0.
        softcap: the student's, as in :func:`select_actions`; likewise the next three.
        logit_scale: the student's.
        teacher_softcap: the teacher's.
        teacher_logit_scale: the teacher's.
        vocab_size: columns at and above it are padding; needed where the models pad differently.
        ignore_index: see ``tokens``.
        reduction: "mean" over the rows that count, "sum", or "none" (0 on rows that do not count).
            Rows without a known V' do not count for an objective that bootstraps.
        num_items_in_batch: divides the sum in place of the number of rows that count ("mean"
            only); 0 makes the loss 0.
        check: refuse ids out of range and rows without a usable logit, at the price of a host sync.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        ``TDOutput(loss, q, value, td_error, actions, entropy, log_mass)``; the first four are
        differentiable.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.

    >>> from tdkd.objectives import ForwardKL
    >>> student = torch.randn(2, 5, 100, requires_grad=True)
    >>> teacher, tokens = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
    >>> imitate = ForwardKL(tail=True)
    >>> td_loss(student, teacher, tokens, objective=imitate, top_p=1.0).loss.backward()
    """
    _check.floating("student_logits", student_logits)
    _check.floating("teacher_logits", teacher_logits)
    lead = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != lead:
        raise ValueError(
            f"teacher_logits: expected the leading dims of student_logits {tuple(lead)}, got "
            f"{tuple(teacher_logits.shape[:-1])}"
        )
    _check.same_device("teacher_logits", teacher_logits, student_logits)
    _check.same_vocabulary(
        "teacher_logits", teacher_logits.shape[-1], student_logits.shape[-1], vocab_size
    )
    student_logits = _check.columns("student_logits", student_logits, vocab_size)
    _check.tokens("tokens", tokens, lead, student_logits)
    _check.ids_below("tokens", tokens, student_logits.shape[-1], ignore_index, check)
    _check.selection(k, top_p)
    scale = _check.scale("", temperature, softcap, logit_scale)
    teacher_scale = _check.scale(
        "teacher_", teacher_temperature, teacher_softcap, teacher_logit_scale
    )
    teacher_logits = _check.columns("teacher_logits", teacher_logits, vocab_size)
    state = tokens != ignore_index
    if check:
        _check.usable("teacher_logits", teacher_logits, state)
        _check.usable("student_logits", student_logits, state)
    objective = as_objective(IQLearn() if objective is None else objective)

    # rows that are no states are not even read
    select = _select_actions if _fused(impl, teacher_logits, k=k) else _select_actions_reference
    actions = select.select_actions(
        teacher_logits, k, top_p, teacher_scale, torch.where(state, tokens, -1), state
    )
    if _needs_normaliser(objective, q):
        op = _student_rows if _fused(impl, student_logits, k=k) else _student_rows_reference
        held = state & (actions.count > 0)
        z, log_rest = op.student_rows(student_logits, actions.ids, scale, state=held)
        log_rest = log_rest.flatten()
    else:
        gather = _gather_q if _fused(impl, student_logits, k=k) else _gather_q_reference
        z, log_rest = gather.gather_q(student_logits, actions.ids, scale), None
    rows = _td_rows(
        actions,
        tokens,
        objective=objective,
        q=q,
        gamma=gamma,
        successor=successor,
        target_value=target_value,
        state_value=state_value,
        expert_weight=expert_weight,
        ignore_index=ignore_index,
        impl=impl,
    )
    divisor = _divisor(rows, reduction, num_items_in_batch)
    terms = _terms(rows, z.reshape(tokens.numel(), k), log_rest, impl)
    return _td_output(terms, actions, lead, reduction, divisor)


def linear_select_actions(
    hidden: Tensor,
    weight: Tensor,
    k: int = 64,
    top_p: float = 1.0,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    include: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = False,
    impl: Impl = "auto",
) -> ActionSet:
    """``select_actions(hidden @ weight.T + bias)`` without the ``[N, V]`` logits in memory.

    One chunk has logits at a time: 48 MiB of them on CPU, few columns of up to 4,096 rows, and
    1 GiB on a GPU, all columns of few rows. Products accumulate in float32. No gradient.

    Args:
        hidden: the teacher's last hidden states ``(..., H)``.
        weight: its head ``(V, H)``.
        bias: its head's bias ``(V,)``.
        k: as in :func:`select_actions`, and so are the others.
    Returns:
        ``ActionSet(ids int32 (..., k), log_probs float32 (..., k), count int32 (...))``.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    weight, bias = _check.head("hidden", hidden, "weight", weight, "bias", bias, vocab_size)
    _check.selection(k, top_p)
    scale = _check.scale("", temperature, softcap, logit_scale)
    lead = hidden.shape[:-1]
    if include is not None:
        _check.tokens("include", include, lead, hidden)
        if check:
            _check.ids_below("include", include, weight.shape[0])
    if check:
        _check.usable("hidden", hidden)
    return _select_from_head(hidden, weight, bias, k, top_p, scale, include, None, impl)


def _select_from_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    top_p: float,
    scale: Scale,
    include: Tensor | None,
    state: Tensor | None,
    impl: Impl,
) -> ActionSet:
    lead = hidden.shape[:-1]
    fused = _fused(impl, hidden, weight, k=k)
    op = _linear_select_actions if fused else _linear_select_actions_reference
    actions = op.linear_select_actions(
        hidden.reshape(lead.numel(), hidden.shape[-1]),
        weight,
        bias,
        k,
        top_p,
        scale,
        None if include is None else include.reshape(-1),
        None if state is None else state.reshape(-1),
    )
    return ActionSet(*(column.view((*lead, *column.shape[1:])) for column in actions))


def linear_gather_q(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    check: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """``gather_q(hidden @ weight.T + bias, ids)`` from the k head rows of each position alone.

    Differentiable in ``hidden``, ``weight`` and ``bias``. Nothing of size ``[N, V]`` exists.

    Args:
        hidden: last hidden states ``(..., H)``.
        weight: head ``(V, H)``.
        ids: token ids ``(..., k)``, int32 or int64; negative ids pad.
        bias: head bias ``(V,)``.
        temperature: divides the logits, > 0.
        softcap: as in :func:`select_actions`.
        logit_scale: as in :func:`select_actions`.
        check: refuse ids >= V on a GPU too, at the price of a host sync; on a CPU they always are.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        Q-values in nats, ``(..., k)``, float32; -inf where padded.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    weight, bias = _check.head("hidden", hidden, "weight", weight, "bias", bias, None)
    scale = _check.scale("", temperature, softcap, logit_scale)
    ids = _check.set_ids("ids", ids, hidden.shape[:-1], hidden)
    _check.ids_below("ids", ids, weight.shape[0], check=check)
    rows = ids.shape[:-1].numel()
    flat = hidden.reshape(rows, hidden.shape[-1])
    gather = _head_rows_of(impl, flat, weight, ids.shape[-1])
    return gather(flat, weight, bias, ids.reshape(rows, ids.shape[-1]), scale).view(ids.shape)


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocabulary: Vocabulary | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``log Z = logsumexp(hidden @ weight.T + bias, -1)`` without the ``[N, V]`` logits in memory.

    Differentiable in ``hidden``, ``weight`` and ``bias``; logits are computed again in backward,
    chunk by chunk. With a ``vocabulary``, ``log Z`` is estimated from its weighted columns alone:
    consistent (Z is unbiased, its log is not), and only those head rows get a gradient.

    Args:
        hidden: last hidden states ``(..., H)``.
        weight: head ``(V, H)``.
        vocabulary: from :func:`batch_vocabulary` or :func:`sampled_vocabulary`; None is exact.
        bias: head bias ``(V,)``.
        temperature: divides the logits, > 0.
        softcap: as in :func:`select_actions`.
        logit_scale: as in :func:`select_actions`.
        vocab_size: columns at and above it are padding and do not exist. Where there are some,
            backward makes a second gradient of the head, for the rows that are left.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        ``(...)``, float32, nats.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    weight, bias = _check.head("hidden", hidden, "weight", weight, "bias", bias, vocab_size)
    scale = _check.scale("", temperature, softcap, logit_scale)
    lead = hidden.shape[:-1]
    flat = hidden.reshape(lead.numel(), hidden.shape[-1])
    nothing = torch.empty((flat.shape[0], 0), dtype=torch.int64, device=hidden.device)
    if vocabulary is not None:
        vocabulary = _weighted_columns(vocabulary, hidden, weight)
    linear_rows = _linear_rows_of(impl, hidden, weight, 1)
    rows = linear_rows(flat, weight, bias, nothing, scale, vocabulary)
    return rows.log_rest.to(rows.z.dtype).view(lead)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    vocabulary: Vocabulary | None = None,
    gathered: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    check: bool = False,
    impl: Impl = "auto",
) -> LogProbs:
    """Full-vocabulary log-probabilities at ``ids``, and of everything else together.

    What a top-k KL and its tail bucket need, as ``linear_gather_q - linear_logsumexp`` would give
    it, but from one pass over the head forward, and one backward whose gradient is
    ``softmax - target``, logits being computed again, a chunk at a time as in
    :func:`linear_select_actions`. Nothing of size ``[N, V]`` exists.
    Differentiable in ``hidden``, ``weight`` and ``bias``. The tail is no difference from 1, so
    it is exact where the ids hold nearly all.

    Args:
        hidden: last hidden states ``(..., H)``.
        weight: head ``(V, H)``.
        ids: token ids ``(..., k)``, int32 or int64; negative ids pad. One that stands twice in a
            row has its log-probability at both places, and counts once against the tail.
        vocabulary: as in :func:`linear_logsumexp`; must hold every id, unless ``gathered``.
        gathered: the vocabulary, of :func:`sampled_vocabulary` for example, need not hold the ids:
            k head rows a position are gathered for them, and its columns, but for those that are
            ids of the row, stand for the rest.
        bias: head bias ``(V,)``.
        temperature: divides the logits, > 0.
        softcap: as in :func:`select_actions`.
        logit_scale: as in :func:`select_actions`.
        vocab_size: as in :func:`linear_logsumexp`.
        check: refuse ids >= V on a GPU too, at the price of a host sync; on a CPU they always are.
        impl: "auto", "reference" or "fused" (raises where no kernel exists).
    Returns:
        ``LogProbs(log_probs float32 (..., k), log_tail float32 (...))``, nats; -inf where padded.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, shapes do not fit, the vocabulary lacks an id (on a
            CPU, or with ``check``), or there is none and ``gathered``.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.

    >>> given = linear_log_probs(torch.zeros(1, 4), torch.ones(10, 4), torch.tensor([[3, 7]]))
    >>> given.log_probs.exp(), given.log_tail.exp()
    (tensor([[0.1000, 0.1000]]), tensor([0.8000]))
    """
    weight, bias = _check.head("hidden", hidden, "weight", weight, "bias", bias, vocab_size)
    scale = _check.scale("", temperature, softcap, logit_scale)
    lead = hidden.shape[:-1]
    ids = _check.set_ids("ids", ids, lead, hidden)
    _check.ids_below("ids", ids, weight.shape[0], check=check)
    k = ids.shape[-1]
    flat, ids_of = hidden.reshape(lead.numel(), hidden.shape[-1]), ids.reshape(lead.numel(), k)
    if vocabulary is not None:
        vocabulary = _weighted_columns(vocabulary, hidden, weight, check)
        if not gathered:
            _holds(vocabulary, ids_of, check)
    elif gathered:
        raise ValueError("vocabulary: expected a Vocabulary with gathered=True, got None")
    linear_rows = _linear_rows_of(impl, hidden, weight, k, gathered)
    z, log_rest = linear_rows(flat, weight, bias, ids_of, scale, vocabulary)
    level = largest(z.detach())
    near, rest = z - level.unsqueeze(-1), (log_rest - level).to(z.dtype)
    held = soft_value(torch.where(_check.repeated(ids_of), -torch.inf, near), impl=impl)
    log_z = torch.logaddexp(held, rest)
    log_probs = torch.where(ids_of < 0, -torch.inf, near - log_z.unsqueeze(-1))
    return LogProbs(log_probs.view(ids.shape), (rest - log_z).view(lead))


def batch_vocabulary(
    actions: ActionSet,
    vocab_size: int,
    *,
    extra: int = 1024,
    law: Tensor | None = None,
    capacity: int | None = None,
    generator: torch.Generator | None = None,
) -> Vocabulary:
    """The columns that matter to a batch: every member of every set, and a sample of the others.

    The union U of the sets has weight 1; ``extra`` columns drawn without replacement from the other
    ``V - |U|`` stand for all of them. Each has the weight 1 / (its chance to be drawn), which is
    ``(V - |U|) / extra`` for the uniform law, so that ``sum exp(z + log_weight)`` is an unbiased
    estimate of Z (of its part on columns that the law can draw).

    Args:
        actions: action sets of the batch.
        vocab_size: V.
        extra: number of sampled columns, >= 0 (all others, if there are fewer; within one, where
            ``law`` is given).
        law: chances of the columns up to a factor, ``(V,)``, finite and >= 0; the best is near to
            the student's mean probabilities. None is uniform. Systematic sampling from a random
            order.
        capacity: size M of the result, padded at its end; it must hold the union and the sample.
            With it no host sync is needed on a GPU. None: M is what the data ask for.
            (:func:`linear_td_loss` then pads it to a multiple of 1,024 on a GPU.)
        generator: source of randomness; None is torch's default one.
    Returns:
        ``Vocabulary(ids int32 (M,) ascending, log_weight float32 (M,))``; -1 and -inf where padded.
    Raises:
        TypeError: ``law`` is not floating point, or a size is no int.
        ValueError: ``extra`` is negative, ``vocab_size`` < 1, ``law`` has another shape, or (on a
            CPU) holds a number that is no chance, a member is >= ``vocab_size`` or ``capacity`` is
            too small.
        RuntimeError: on a GPU, asynchronously, in place of the last three.
    """
    if not isinstance(actions, ActionSet):
        raise TypeError(f"actions: expected an ActionSet, got {type(actions).__name__}")
    _check.whole("vocab_size", vocab_size)
    _check.whole("extra", extra, least=0)
    if capacity is not None:
        _check.whole("capacity", capacity)
    if law is not None:
        law = _checked_law(law, vocab_size)
        _check.same_device("law", law, actions.ids)
    _check.generator(generator)
    _check.ids_below("actions", actions.ids, vocab_size, check=False)
    return _batch_vocabulary.batch_vocabulary(
        actions.ids,
        vocab_size,
        extra=extra,
        law=law,
        capacity=capacity,
        generator=generator,
    )


def sampled_vocabulary(
    vocab_size: int,
    extra: int,
    *,
    law: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Vocabulary:
    """A sample of all columns, whose weighted ``sum exp(z + log_weight)`` estimates Z.

    Where the members of a row's set are gathered by themselves (``normaliser="sampled"``,
    ``gathered=True``), these columns stand for all others. Nothing waits for the device, unless
    ``generator`` is of another one.

    Args:
        vocab_size: V.
        extra: number of sampled columns, >= 1 (within one, where ``law`` is given; all, where there
            are fewer).
        law: as in :func:`batch_vocabulary`; of the uniform one some thousand columns are a poor
            estimate, that of :func:`student_law` serves well.
        generator: source of randomness; None is torch's default one.
        device: where it is made; None is that of ``law``, or the CPU.
    Returns:
        ``Vocabulary(ids int32 (M,) ascending, log_weight float32 (M,))``; -1 and -inf where padded,
        which it is to the same M at every call.
    Raises:
        TypeError: ``law`` is not floating point, or a size is no int.
        ValueError: a size is < 1, ``law`` has another shape or lies on another device, or (on a
            CPU; elsewhere a RuntimeError, asynchronously) holds a number that is no chance.
    """
    _check.whole("vocab_size", vocab_size)
    _check.whole("extra", extra)
    _check.generator(generator)
    if law is not None:
        law = _checked_law(law, vocab_size)
    device = law.device if device is None and law is not None else torch.device(device or "cpu")
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    if law is not None:
        _check.same_device("law", law, nothing)
    return _batch_vocabulary.batch_vocabulary(
        nothing,
        vocab_size,
        extra=extra,
        law=law,
        capacity=_routes.sample_capacity(extra, vocab_size),
        generator=generator,
    )


def student_law(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """A law by which to sample columns: mean probabilities of a student over 64 of its rows.

    A tenth of it is spread evenly, so that every column has a chance. No gradient.

    Args:
        hidden: last hidden states ``(..., H)``; rows with NaN have no say.
        weight: head ``(V, H)``.
        bias: head bias ``(V,)``.
        temperature: divides the logits, > 0.
        softcap: as in :func:`select_actions`.
        logit_scale: as in :func:`select_actions`.
        vocab_size: columns at and above it are padding and do not exist.
    Returns:
        ``(V,)`` float32, for ``law`` of :func:`sampled_vocabulary` or :func:`batch_vocabulary`.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, or shapes do not fit.

    >>> student_law(torch.zeros(1, 4), torch.ones(10, 4))[:3]
    tensor([0.1000, 0.1000, 0.1000])
    """
    weight, bias = _check.head("hidden", hidden, "weight", weight, "bias", bias, vocab_size)
    scale = _check.scale("", temperature, softcap, logit_scale)
    flat = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    state = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
    return _batch_vocabulary.student_law(flat, weight, bias, scale, state)


def _checked_law(law: Tensor, vocab_size: int) -> Tensor:
    _check.floating("law", law)
    _check.same_shape("law", law, torch.Size([vocab_size]), "the vocabulary")
    law = law.detach()
    _check.chances("law", law)
    return law


def linear_td_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    tokens: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    actions: ActionSet | None = None,
    objective: ObjectiveLike | None = None,
    q: Level = "log_prob",
    normaliser: Normaliser = "exact",
    vocabulary: Vocabulary | None = None,
    extra: int = 1024,
    law: Tensor | Literal["student", "uniform"] | None = None,
    capacity: int | None = None,
    generator: torch.Generator | None = None,
    k: int = 64,
    top_p: float = 0.8,
    gamma: float = 0.99,
    successor: Tensor | None = None,
    target_value: Tensor | None = None,
    state_value: Tensor | None = None,
    expert_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    check: bool = False,
    impl: Impl = "auto",
) -> TDOutput:
    """:func:`td_loss` from hidden states and heads, without either model's ``[N, V]`` logits.

    **Warning**: the default objective, ``IQLearn()`` with alpha 0.1, is the paper's formula, and
    alone it undoes a student (``docs/quality.md``). To train take ``ForwardKL(tail=True)`` and
    ``top_p=1.0``; a TD term goes beside such a one, never in its place.

    One chunk of rows has logits at a time, 48 MiB on CPU (192 rows where V exceeds 65,536) and
    1 GiB on a GPU, and they become their gradient in place. The head's gradient adds up in float32;
    a head of another dtype than the factors, and a chunk's gradient, are copied for the products.

    The teacher is live (``teacher_hidden`` and ``teacher_weight``) or given as ``actions``.

    Gradients that are made in forward (``docs/performance.md``) are held in float32 until backward.

    Args:
        student_hidden: last hidden states ``(..., H)``.
        student_weight: head ``(V, H)``.
        tokens: taken tokens ``(...)``, already shifted; ``ignore_index`` where a row is no state.
        teacher_hidden: ``(..., H_t)``, no gradient.
        teacher_weight: ``(V, H_t)``, no gradient.
        actions: action sets in place of a live teacher, distinct ids in each, the taken token
            among them (``include=tokens``); a state whose set is empty does not count. Then ``k``,
            ``top_p`` and the teacher's options have no say.
        normaliser: how ``log Z`` is had where the objective or ``q="log_prob"`` needs it:
            ``"exact"`` over all columns; ``"batch"`` from the batch vocabulary, one product with
            the union of all sets and a sample of the other columns; ``"sampled"`` from each row's
            own set, whose k head rows are gathered, and a sample of all columns: less work where
            the union is large, for an estimate that wants ``extra`` of 2,048 or more to be as good.
            Where either would cost more than all columns (``tdkd info`` tells the bounds) it is
            over all of them. Where nothing needs ``log Z``, neither this nor what follows has a
            say.
        vocabulary: columns in place of the batch vocabulary, which must hold every member, or of
            the sample, which need not. Then the next four have no say. Like ``law`` and
            ``capacity`` refused with ``"exact"``.
        extra: number of sampled columns.
        law: how they are sampled: as in :func:`batch_vocabulary`; ``"student"``, the default of
            ``"sampled"``, is :func:`student_law` of these rows (a product of 64 of them with the
            whole head), ``"uniform"`` that of ``"batch"``: an estimate many times further from the
            exact one (`benchmarks/normaliser.py`).
        capacity: for ``"batch"``: as in :func:`batch_vocabulary`.
        generator: source of randomness.
        bias: the student's head bias ``(V,)``; ``teacher_bias`` is the teacher's.
        vocab_size: as in :func:`linear_logsumexp`; needed where the models pad differently.
        check: refuse ids out of range, rows without a usable logit, and ``actions`` with an id
            twice in a set or without the taken token, at the price of a host sync. On a CPU members
            out of range and sets without the taken token always are.
        objective: as in :func:`td_loss`, and so are the others.
    Returns:
        ``TDOutput(loss, q, value, td_error, actions, entropy, log_mass)``.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is out of range, shapes do not fit, both or neither of a live
            teacher and ``actions`` are given, or an option of one normaliser with another.
        NotImplementedError: ``impl="fused"`` where no kernel takes the arguments.
    """
    weight, bias = _check.head(
        "student_hidden", student_hidden, "student_weight", student_weight, "bias", bias, vocab_size
    )
    lead = student_hidden.shape[:-1]
    _check.tokens("tokens", tokens, lead, student_hidden)
    _check.choice("normaliser", normaliser, get_args(Normaliser))
    options = {"vocabulary": vocabulary, "law": law, "capacity": capacity}
    refused = {"exact": tuple(options), "batch": (), "sampled": ("capacity",)}
    for name in refused[normaliser]:
        if options[name] is not None:
            raise ValueError(
                f'{name}: expected None with normaliser="{normaliser}", got '
                f"{type(options[name]).__name__}"
            )
    if isinstance(law, str):
        _check.choice("law", law, ("student", "uniform"))
    elif law is not None:
        law = _checked_law(law, weight.shape[0])
        _check.same_device("law", law, student_hidden)
    _check.generator(generator)
    scale = _check.scale("", temperature, softcap, logit_scale)
    state = tokens != ignore_index
    if check:
        _check.usable("student_hidden", student_hidden, state)
    _check.ids_below("tokens", tokens, weight.shape[0], ignore_index, check)

    _check.one_teacher(teacher_hidden, teacher_weight, actions)
    live = actions is None
    if actions is None:
        assert teacher_hidden is not None
        assert teacher_weight is not None
        actions = _live_sets(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            tokens,
            state,
            k,
            top_p,
            _check.scale("teacher_", teacher_temperature, teacher_softcap, teacher_logit_scale),
            vocab_size,
            check,
            impl,
        )
    else:
        actions = _check.action_sets(actions, lead, student_hidden, state, check)

    # rows that are no states have no say in which columns exist, nor in the head's gradient, where
    # a NaN of theirs would survive as 0 * NaN
    state = state & (actions.count > 0)
    here = state.unsqueeze(-1)
    flat = student_hidden if _all_states(state) else torch.where(here, student_hidden, 0.0)
    flat = flat.reshape(tokens.numel(), student_hidden.shape[-1])
    used = actions._replace(ids=torch.where(here, actions.ids, -1))
    if not live:
        _check.ids_below("actions", used.ids, weight.shape[0], check=check)
        if check:
            _check.distinct("actions", used.ids)
    objective = as_objective(IQLearn() if objective is None else objective)
    rows = _td_rows(
        used,
        tokens,
        objective=objective,
        q=q,
        gamma=gamma,
        successor=successor,
        target_value=target_value,
        state_value=state_value,
        expert_weight=expert_weight,
        ignore_index=ignore_index,
        impl=impl,
    )
    if not live and _check.looked_at(rows.ids, check):
        _check.taken_held("actions", rows, tokens)
    divisor = _divisor(rows, reduction, num_items_in_batch)
    if not _needs_normaliser(objective, q):
        gather = _head_rows_of(impl, flat, weight, rows.ids.shape[-1])
        some = _gathers(flat, weight, rows.ids.shape[-1])
        _tell(f"no log Z, {'k head rows a position' if some else 'all columns'}", flat, weight)
        terms = rows(gather(flat, weight, bias, rows.ids, scale), None)
        return _td_output(terms, actions, lead, reduction, divisor)
    if vocabulary is not None:
        vocabulary = _weighted_columns(vocabulary, flat, weight, check)
        if normaliser == "batch":
            _holds(vocabulary, rows.ids, check)
    elif normaliser == "batch":
        law = _law_of("uniform" if law is None else law, flat, weight, bias, scale, rows.state)
        vocabulary = _columns_of_batch(used, flat, weight, extra, law, capacity, generator)
    elif normaliser == "sampled" and _samples(flat, weight, rows.ids.shape[-1], extra, law):
        law = _law_of("student" if law is None else law, flat, weight, bias, scale, rows.state)
        vocabulary = sampled_vocabulary(
            weight.shape[0], extra, law=law, generator=generator, device=weight.device
        )
    if normaliser == "exact":
        route = "log Z over all columns"
    elif vocabulary is None:
        route = f"log Z over all columns, for {_ESTIMATES[normaliser]} would cost more"
    else:
        route = f"log Z from {_ESTIMATES[normaliser]}"
    gathered = normaliser == "sampled" and vocabulary is not None
    fused = _fused(impl, flat, weight, k=rows.ids.shape[-1])
    if fused and not gathered and reduction != "none" and _routes.in_forward(rows, flat, weight):
        terms_in_forward = linear_loss(flat, weight, bias, scale, vocabulary, rows, divisor)
        if terms_in_forward is not None:
            _tell(f"{route}, gradients in forward", flat, weight)
            return _td_output(terms_in_forward, actions, lead, reduction, 1.0)
    taken = weight if vocabulary is None else weight[: vocabulary.ids.numel()]
    once = fused and not gathered and _routes.head_is_frozen(flat, taken, bias, rows.ids.shape[-1])
    how = "once, for the head learns nothing" if once else "again in backward"
    _tell(f"{route}, logits made {how}", flat, weight)
    linear_rows = _linear_rows_of(impl, flat, weight, rows.ids.shape[-1], gathered)
    z, log_rest = linear_rows(flat, weight, bias, rows.ids, scale, vocabulary)
    return _td_output(_terms(rows, z, log_rest, impl), actions, lead, reduction, divisor)


_ESTIMATES = {
    "batch": "the batch vocabulary",
    "sampled": "k head rows a position and sampled columns",
}
"""What estimates log Z in place of all columns, for the log."""


def _law_of(
    law: Tensor | str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Scale,
    state: Tensor,
) -> Tensor | None:
    """The law of a word; None is uniform."""
    if isinstance(law, Tensor):
        return law
    if law == "student":
        return _batch_vocabulary.student_law(hidden, weight, bias, scale, state)
    return None


def _live_sets(
    student_hidden: Tensor,
    student_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    state: Tensor,
    k: int,
    top_p: float,
    scale: Scale,
    vocab_size: int | None,
    check: bool,
    impl: Impl,
) -> ActionSet:
    """The live teacher's sets, the taken tokens in them; none where a row is no state."""
    _check.floating("teacher_hidden", hidden)
    lead = student_hidden.shape[:-1]
    if hidden.shape[:-1] != lead:
        raise ValueError(
            f"teacher_hidden: expected the leading dims of student_hidden {tuple(lead)}, got "
            f"{tuple(hidden.shape[:-1])}"
        )
    _check.same_device("teacher_hidden", hidden, student_hidden)
    _check.floating("teacher_weight", weight)
    _check.same_vocabulary("teacher_weight", weight.shape[0], student_weight.shape[0], vocab_size)
    _check.selection(k, top_p)
    weight, bias = _check.head(
        "teacher_hidden", hidden, "teacher_weight", weight, "teacher_bias", bias, vocab_size
    )
    if check:
        _check.usable("teacher_hidden", hidden, state)
    include = torch.where(state, tokens, -1)
    return _select_from_head(hidden, weight, bias, k, top_p, scale, include, state, impl)


def _columns_of_batch(
    actions: ActionSet,
    hidden: Tensor,
    weight: Tensor,
    extra: int,
    law: Tensor | None,
    capacity: int | None,
    generator: torch.Generator | None,
) -> Vocabulary | None:
    """The batch vocabulary, None where it would hold so many columns that all are cheaper."""
    columns = weight.shape[0]
    room = _routes.capacity(capacity, actions.ids, extra, columns)
    vocabulary = batch_vocabulary(
        actions, columns, extra=extra, law=law, capacity=room, generator=generator
    )
    if room is None and weight.is_cuda:
        vocabulary = _bucketed(vocabulary)
    held = vocabulary.ids.numel()
    factors = _head.factor_dtype(hidden, weight)
    pays = _routes.pays(weight.device.type, held, columns, hidden.shape[0], factors)
    return vocabulary if pays else None


def _samples(hidden: Tensor, weight: Tensor, k: int, extra: int, law: Tensor | str | None) -> bool:
    """Whether k head rows a position and a sample of the columns cost less than all columns."""
    _check.whole("extra", extra)
    columns, width = weight.shape
    factors = _head.factor_dtype(hidden, weight)
    size = columns, width, hidden.shape[0]
    by_student = law is None or (isinstance(law, str) and law == "student")
    law_rows = _batch_vocabulary.LAW_ROWS * by_student
    return _routes.samples(weight.device.type, k, extra, *size, factors, law_rows)


def _all_states(state: Tensor) -> bool:
    """Whether no row has to be masked, which spares a copy; False where asking would cost a host
    sync."""
    return state.device.type == "cpu" and not torch.compiler.is_compiling() and bool(state.all())


def _tell(route: str, hidden: Tensor, weight: Tensor) -> None:
    """Logs, once in a process, the way that a loss on a head of this size takes."""
    if not torch.compiler.is_compiling() and _routes.learns(hidden, weight):
        columns, width = weight.shape
        where = f"V = {columns:,}, H = {width:,}, {weight.device.type}"
        _log(logging.INFO, f"linear_td_loss, {where}: {route}")


@cache
def _log(level: int, message: str) -> None:
    logger.log(level, message)


def _bucketed(vocabulary: Vocabulary) -> Vocabulary:
    """Padded to a multiple of ``CAPACITY_STEP``: few sizes, and products that are aligned."""
    ids, log_weight = vocabulary
    spare = (0, -ids.numel() % _routes.CAPACITY_STEP)
    pad = torch.nn.functional.pad
    return Vocabulary(pad(ids, spare, value=-1), pad(log_weight, spare, value=-torch.inf))


def _weighted_columns(
    vocabulary: Vocabulary, hidden: Tensor, weight: Tensor, check: bool = False
) -> Vocabulary:
    """A vocabulary with weights in the dtype that kernel and reference add up in."""
    if not isinstance(vocabulary, Vocabulary):
        raise TypeError(
            f"vocabulary: expected a Vocabulary, as batch_vocabulary returns it, got "
            f"{type(vocabulary).__name__}"
        )
    ids, log_weight = vocabulary
    _check.integers("vocabulary.ids", ids)
    if ids.dim() != 1:
        raise ValueError(f"vocabulary.ids: expected (M,), got {tuple(ids.shape)}")
    _check.same_device("vocabulary.ids", ids, hidden)
    _check.floating("vocabulary.log_weight", log_weight)
    _check.same_shape("vocabulary.log_weight", log_weight, ids.shape, "its ids")
    _check.same_device("vocabulary.log_weight", log_weight, hidden)
    if _check.looked_at(ids, check):
        _check.ids_below("vocabulary.ids", ids, weight.shape[0])
        if bool(((ids < 0) & (log_weight > -torch.inf)).any()):
            raise ValueError("vocabulary.log_weight: expected -inf where an id is negative")
        if bool((ids[1:] <= ids[:-1])[ids[1:] >= 0].any()):
            raise ValueError("vocabulary.ids: expected ascending, distinct ids, padded at the end")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return Vocabulary(_check.ordinary(ids), _check.ordinary(log_weight.detach().to(wide)))


def _holds(vocabulary: Vocabulary, ids: Tensor, check: bool) -> None:
    """Refuses a vocabulary without some member."""
    if not _check.looked_at(ids, check):
        return
    missing = (ids >= 0) & ~torch.isin(ids, vocabulary.ids)
    if bool(missing.any()):
        raise ValueError(
            "vocabulary: expected every member of the action sets, but id "
            f"{int(ids[missing][0])} is not in it"
        )


def routes(device: str = "cpu", columns: int = 49_152, width: int = 576) -> str:
    """The rule by which the linear forms choose their way, in words, for a head
    ``[columns, width]`` and 2,048 rows: ``tdkd info`` prints it."""
    return _routes.describe(device, columns, width)


def _linear_rows_of(
    impl: Impl, hidden: Tensor, weight: Tensor, k: int, gathered: bool = False
) -> Callable[..., StudentRows]:
    """``gathered``: members by k head rows a position, and a vocabulary for the rest alone."""
    fused = _fused(impl, hidden, weight, k=k)
    if gathered:
        return (_sampled_rows if fused else _sampled_rows_reference).sampled_rows
    return (_linear_rows if fused else _linear_rows_reference).linear_rows


def _head_rows_of(impl: Impl, hidden: Tensor, weight: Tensor, k: int) -> Callable[..., Tensor]:
    if not _fused(impl, hidden, weight):
        return _linear_gather_q_reference.linear_gather_q
    dense = not _gathers(hidden, weight, k)
    return partial(_linear_gather_q.linear_gather_q, dense=dense)


def _gathers(hidden: Tensor, weight: Tensor, k: int) -> bool:
    columns, width = weight.shape
    factors = _head.factor_dtype(hidden, weight)
    return _routes.gathers(weight.device.type, k, columns, width, hidden.shape[0], factors)


def _needs_normaliser(objective: Objective, q: Level) -> bool:
    _check.choice("q", q, get_args(Level))
    return q == "log_prob" or objective.normalised


def _td_rows(
    actions: ActionSet,
    tokens: Tensor,
    *,
    objective: Objective,
    q: Level,
    gamma: float,
    successor: Tensor | None,
    target_value: Tensor | None,
    state_value: Tensor | None,
    expert_weight: Tensor | None,
    ignore_index: int,
    impl: Impl,
) -> TDRows:
    _check.within("gamma", gamma, 0.0, 1.0)
    lead = tokens.shape
    for name, given in (
        ("target_value", target_value),
        ("state_value", state_value),
        ("expert_weight", expert_weight),
    ):
        if given is not None:
            _check.floating(name, given, dims=0)
            _check.same_shape(name, given, lead, "the rows")
            _check.same_device(name, given, tokens)
    if expert_weight is not None and _check.looked_at(expert_weight):
        _check.shares("expert_weight", expert_weight[tokens != ignore_index])
    if target_value is not None and objective.starts:
        raise ValueError(
            "target_value: expected None with an objective that counts from the first state of a "
            f"response, where V' must be the student's own, got one with {objective!r}"
        )
    if successor is None:
        successor = successors(tokens.reshape(lead or (1,)), ignore_index=ignore_index).view(lead)
    successor = _check.successor(successor, lead, tokens)
    k = actions.ids.shape[-1]
    return TDRows.of(
        actions.ids.reshape(tokens.numel(), k),
        actions.log_probs.reshape(tokens.numel(), k),
        tokens.reshape(-1),
        successor.reshape(-1),
        ignore_index=ignore_index,
        objective=objective,
        level=q,
        gamma=gamma,
        soft_value=partial(soft_value, impl=impl),
        target_value=None if target_value is None else target_value.reshape(-1),
        state_value=None if state_value is None else state_value.reshape(-1),
        expert_weight=None if expert_weight is None else expert_weight.reshape(-1),
    )


def _terms(rows: TDRows, z: Tensor, log_rest: Tensor | None, impl: Impl) -> RowTerms:
    """``rows(z, log_rest)``, in one launch where there is a kernel of it."""
    fused = log_rest is not None and _fused(impl, z, k=z.shape[-1])
    if fused and not torch.compiler.is_compiling() and _routes.row_kernel(rows, z):
        assert log_rest is not None
        return row_loss(rows, z, log_rest)
    return rows(z, log_rest)


def _divisor(
    rows: TDRows, reduction: Reduction, num_items_in_batch: Tensor | float | None
) -> Tensor | float:
    _check.choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction != "mean":
        return 1.0
    if num_items_in_batch is None:
        return rows.counted.sum().clamp(min=1)
    # without items there is nothing to lose
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "num_items_in_batch: expected one number, got a tensor of shape "
                f"{tuple(num_items_in_batch.shape)}"
            )
        num_items_in_batch = num_items_in_batch.reshape(()).to(_accumulated(rows.log_probs).dtype)
        if _check.looked_at(num_items_in_batch):
            _check.within("num_items_in_batch", num_items_in_batch.item(), 0, float("inf"))
        return torch.where(num_items_in_batch == 0, torch.inf, num_items_in_batch)
    _check.within("num_items_in_batch", num_items_in_batch, 0, float("inf"))
    return num_items_in_batch or torch.inf


def _td_output(
    terms: RowTerms,
    actions: ActionSet,
    lead: torch.Size,
    reduction: Reduction,
    divisor: Tensor | float,
) -> TDOutput:
    loss = terms.loss.view(lead) if reduction == "none" else terms.loss.sum() / divisor
    q, value, td_error, entropy = (term.view(lead) for term in terms[1:5])
    log_mass = None if terms.log_mass is None else terms.log_mass.view(lead)
    return TDOutput(loss, q, value, td_error, actions, entropy, log_mass)


def _accumulated(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fused(impl: str, *tensors: Tensor, k: int = 1) -> bool:
    """Whether the kernel is wanted, and takes these tensors and sets of ``k``."""
    _check.choice("impl", impl, ("auto", "reference", "fused"))
    if impl == "reference":
        return False
    reason = _backends.why_not(*tensors, k=k)
    if impl == "fused" and reason is not None:
        raise NotImplementedError(f'impl: expected "auto" or "reference", got "fused": {reason}')
    if reason is not None and tensors[0].is_cuda and not torch.compiler.is_compiling():
        _log(logging.WARNING, f'impl="auto" takes plain PyTorch: {reason}')
    return reason is None
