"""The ops that start from hidden states and heads: their inputs, and who is timed for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tdkd import ops
from tdkd.benchmark.cases import Case, Inputs, Run, Skip, make_linear_inputs, read_sets
from tdkd.kernels import head, routes
from tdkd.objectives import ForwardKL

SETS = Path(__file__).with_name("sets.npz")
"""Sets of a real teacher: `benchmarks/real_sets.py`."""
SETS_VOCAB = 49_152


class Student(NamedTuple):
    """What the student's side of a linear TD loss sees."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    actions: ops.ActionSet


def action_sets(case: Case, generator: torch.Generator) -> tuple[ops.ActionSet, Tensor]:
    """Sets ``[N, k]`` and taken tokens ``[N]``, which are members.

    ``real``: those of a real teacher at p = 0.8, cut at k; in a larger vocabulary the same ones
    spread out, so that the union is as large, and in a smaller one without what is not in it.
    More rows than there are (2,048) repeat them, and the union stays as it is, which that of so
    many rows of text does not. ``random``: k random tokens each, the worst case. Anything else is
    the path of a file as ``SETS``, which may hold as many rows as one likes.
    """
    rows, k, vocab, device = case.rows, min(case.k, case.vocab), case.vocab, generator.device
    if case.sets != "random":
        kept = read_sets(SETS if case.sets == "real" else Path(case.sets))
        count = kept["count"]
        ids = torch.full((count.numel(), max(k, int(count.max()))), -1)
        held = torch.arange(ids.shape[1]) < count[:, None]
        ids[held] = kept["members"]
        some, spread = torch.arange(rows) % count.numel(), max(1, vocab // SETS_VOCAB)
        ids, tokens = ids[some, :k], kept["tokens"][some]
        ids = torch.where((ids < 0) | (ids * spread >= vocab), -1, ids * spread).to(device)
        tokens = (tokens * spread % vocab).to(device)
        inside = (ids == tokens[:, None]).any(-1)
        ids[:, 0] = torch.where(inside, ids[:, 0], tokens)
    else:
        # one token of each of k ranges: distinct
        step = vocab // k
        ids = torch.randint(step, (rows, k), generator=generator, device=device)
        ids = ids + torch.arange(k, device=device) * step
        tokens = ids[:, 0]
    slot = torch.arange(k, device=device)
    weights = torch.where(ids >= 0, -0.3 * slot, -torch.inf).log_softmax(-1) + math.log(0.85)
    return ops.ActionSet(ids.int(), weights, (ids >= 0).sum(-1).int()), tokens


def make_student(case: Case) -> Student:
    """The student's head and hidden states of a case, and the sets of its teacher."""
    given = make_linear_inputs(case)
    generator = torch.Generator(case.device).manual_seed(1)
    actions, tokens = action_sets(case, generator)
    return Student(given.student, given.student_weight, tokens, actions)


def td_loss(objective: ForwardKL, **options: object) -> Callable[[Case], Run]:
    """Forward and backward of the student's side by :func:`tdkd.ops.linear_td_loss`."""

    def loss(student: Student) -> Tensor:
        return ops.linear_td_loss(
            student.hidden,
            student.weight,
            student.tokens,
            actions=student.actions,
            objective=objective,
            **options,  # type: ignore[arg-type]
        ).loss

    return both_ways(loss)


def both_heads(normaliser: ops.Normaliser) -> Callable[[Case], Run]:
    """The teacher's head and selection, then the student's side.

    The student is given the case's sets: those of random teachers share nothing between rows.
    """

    def prepare(case: Case) -> Run:
        given, learn = make_linear_inputs(case), td_loss(NORMALISED, normaliser=normaliser)(case)

        def run(inputs: Inputs) -> tuple[object, ...]:
            with case.mixed():
                actions = ops.linear_select_actions(
                    given.teacher, given.teacher_weight, case.k, 0.8, include=given.tokens
                )
            return actions, *learn(inputs)

        return run

    return prepare


def dense_loss(compiled: bool = False) -> Callable[[Case], Run]:
    """The same loss as one would write it: logits, logsumexp, gather, loss."""

    def loss(student: Student) -> Tensor:
        logits = (student.hidden @ student.weight.T).float()
        ids, log_p, _ = student.actions
        held = ids >= 0
        log_q = logits.gather(-1, ids.long().clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
        log_q = torch.where(held, log_q, -torch.inf)
        tail_p, tail_q = (torch.log1p(-x.exp().sum(-1)) for x in (log_p, log_q))
        within = torch.where(held, log_p.exp() * (log_p - torch.where(held, log_q, 0.0)), 0.0)
        return (within.sum(-1) + tail_p.exp() * (tail_p - tail_q)).mean()

    return both_ways(loss, compiled)


def log_probs(student: Student) -> Tensor:
    given = ops.linear_log_probs(student.hidden, student.weight, student.actions.ids)
    held = student.actions.ids >= 0
    return -torch.where(held, given.log_probs, 0.0).sum() - given.log_tail.sum()


def dense_log_probs(student: Student) -> Tensor:
    log_q = (student.hidden @ student.weight.T).float().log_softmax(-1)
    ids = student.actions.ids
    picked = torch.where(ids >= 0, log_q.gather(-1, ids.long().clamp(min=0)), -torch.inf)
    tail = torch.log1p(-picked.exp().sum(-1))
    return -torch.where(ids >= 0, picked, 0.0).sum() - tail.sum()


def chunked_log_probs(student: Student) -> Tensor:
    """The dense way on a chunk of rows at a time, made again in backward: no [N, V] in memory."""

    def part(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        actions = student.actions._replace(ids=ids)
        return dense_log_probs(student._replace(hidden=hidden, weight=weight, actions=actions))

    total = student.hidden.new_zeros((), dtype=torch.float32)
    for rows in head.chunks(student.hidden, student.weight):
        given = student.hidden[rows], student.weight, student.actions.ids[rows]
        total = total + checkpoint(part, *given, use_reentrant=False)
    return total


def lm_loss(case: Case) -> Run:
    """The LM loss of the trainer, by the best kernel that is installed."""
    try:
        from tdkd.lm_loss import lm_cross_entropy
        from tdkd.models import Head
    except ImportError as error:  # no transformers
        raise Skip(f"cannot be imported: {error}") from error

    def loss(student: Student) -> Tensor:
        whole = Head(student.weight, bias=None, softcap=None, logit_scale=1.0)
        return lm_cross_entropy(student.hidden, whole, student.tokens)

    return both_ways(loss)(case)


def dense_cross_entropy(student: Student) -> Tensor:
    logits = (student.hidden @ student.weight.T).float()
    return F.cross_entropy(logits, student.tokens, reduction="sum")


def torch_cross_entropy(case: Case, chunks: int | Literal["auto"] | None = None) -> Run:
    """``F.linear_cross_entropy``: as it is, in chunks of so many rows, or as it chooses them."""
    kernel = getattr(F, "linear_cross_entropy", None)
    if kernel is None:
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = None
    if chunks is not None:
        rows = None if chunks == "auto" else chunks
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(student: Student) -> Tensor:
        given = student.hidden, student.weight, student.tokens
        return kernel(*given, reduction="sum", options=options)

    return both_ways(loss)(case)


def both_ways(
    loss: Callable[[Student], Tensor], compiled: bool = False, frozen: bool = False
) -> Callable[[Case], Run]:
    """Forward and backward of a loss of a :class:`Student`; ``frozen``: its head learns nothing."""
    if compiled:
        loss = torch.compile(loss, dynamic=False)

    def prepare(case: Case) -> Run:
        student = make_student(case)
        leaves: tuple[Tensor, ...] = student.hidden, student.weight
        if frozen:
            student, leaves = student._replace(weight=student.weight.detach()), leaves[:1]

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            with case.mixed():
                result = loss(student)
            return result.detach(), *torch.autograd.grad(result, leaves)

        return run

    return prepare


def forced(way: routes.Way, prepare: Callable[[Case], Run]) -> Callable[[Case], Run]:
    """A rival that takes this way, whatever the rule says."""

    def prepared(case: Case) -> Run:
        run = prepare(case)

        def on_that_way(inputs: Inputs) -> object:
            with routes.forced(way):
                return run(inputs)

        return on_that_way

    return prepared


def three_products(case: Case) -> Run:
    """The matrix products of a dense head, forward and backward, and nothing else."""
    given = make_linear_inputs(case)
    hidden, weight = given.student.detach(), given.student_weight.detach()

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        with case.mixed():
            logits = hidden @ weight.T
            return logits @ weight, logits.T @ hidden

    return run


def one_product(case: Case) -> Run:
    """The teacher's matrix product, and nothing else."""
    given = make_linear_inputs(case)
    return lambda inputs: given.teacher @ given.teacher_weight.T


def select(case: Case) -> Run:
    given = make_linear_inputs(case)
    return lambda inputs: ops.linear_select_actions(
        given.teacher, given.teacher_weight, case.k, case.top_p
    )


def dense_select(case: Case) -> Run:
    """Logits, top-k, and log Z."""
    given = make_linear_inputs(case)
    k = min(case.k, case.vocab)

    def run(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        logits = given.teacher @ given.teacher_weight.T
        values, ids = torch.topk(logits, k)
        return values, ids, torch.logsumexp(logits, -1)

    return run


GATHERED = ForwardKL()
"""Needs no normaliser where Q is the logit."""
NORMALISED = ForwardKL(tail=True)
