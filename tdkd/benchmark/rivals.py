"""Who is timed for each op.

A rival prepares itself for a case and returns a function of the case's tensors, which is called
with one copy of them after the other. One that cannot run here, or not on this case, raises
:class:`Skip` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tdkd import ops
from tdkd.benchmark.cases import Case, Inputs, make_linear_inputs
from tdkd.objectives import IQLearn
from tdkd.published import published_loss

Run = Callable[[Inputs], Any]
Impl = Literal["auto", "reference", "fused"]


class Skip(Exception):
    """Why a rival is not timed."""


class Rival(NamedTuple):
    """One way to do what an op does."""

    name: str
    prepare: Callable[[Case], Run]
    passes: int = 0
    """Times that an op of this kind must read or write ``[N, V]`` logits, however it is done; 0
    where bandwidth is not what bounds it."""
    against: str = "tdkd"
    """the rival whose time is 1 in its ratio."""
    compiles: bool = False
    """needs the compiler: left out by ``--no-compile``."""
    warm: bool = True
    """the first call does not count."""
    max_rounds: int | None = None


def _select_amax(case: Case) -> Run:
    return lambda inputs: inputs.teacher.amax(-1)


def _select(impl: Impl) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        return lambda inputs: ops.select_actions(inputs.teacher, case.k, case.top_p, impl=impl)

    return prepare


def _select_plain(case: Case) -> Run:
    """What one would write: top-k and log Z, no more."""
    k = min(case.k, case.vocab)

    def plain(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        values, ids = torch.topk(inputs.teacher, k)
        return values, ids, torch.logsumexp(inputs.teacher, -1)

    return plain


def _select_compiled(case: Case) -> Run:
    return torch.compile(_select_plain(case), dynamic=False)


def _loss_amax(case: Case) -> Run:
    def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
        student, _ = _student(inputs)
        return student.detach().amax(-1), inputs.teacher.amax(-1)

    return both


def _loss(impl: Impl) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        forward = _loss_forward(case, impl)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            student, tokens = _student(inputs)
            return _with_gradient(forward(student, inputs.teacher, tokens), student)

        return run

    return prepare


def _loss_forward(case: Case, impl: Impl) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    objective = IQLearn(alpha=1.0)

    def forward(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        return ops.td_loss(
            student,
            teacher,
            tokens,
            objective=objective,
            k=case.k,
            top_p=case.top_p,
            impl=impl,
        ).loss

    return forward


def _loss_compiled(case: Case) -> Run:
    forward = torch.compile(_loss_forward(case, "reference"), dynamic=False)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        student, tokens = _student(inputs)
        return _with_gradient(forward(student, inputs.teacher, tokens), student)

    return run


def _loss_published(case: Case) -> Run:
    if case.rows % 4:
        raise Skip(f"takes (B, T, V) logits: expected rows to be a multiple of 4, got {case.rows}")
    shape = (4, case.rows // 4, case.vocab)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        student, tokens = _student(inputs)
        loss, _ = published_loss(
            student.view(shape),
            inputs.teacher.view(shape),
            tokens.view(shape[:2]),
            top_p=case.top_p,
            pad_token_id=0,
        )
        return _with_gradient(loss, student)

    return run


def _linear(case: Case) -> Run:
    objective = IQLearn(alpha=1.0)
    return _from_hidden(
        case,
        lambda hidden, weight, teacher_hidden, teacher_weight, tokens: (
            ops.linear_td_loss(
                hidden,
                weight,
                tokens,
                teacher_hidden=teacher_hidden,
                teacher_weight=teacher_weight,
                objective=objective,
                k=case.k,
                top_p=case.top_p,
            ).loss
        ),
    )


def _liger(case: Case) -> Run:
    try:
        chunked_loss = importlib.import_module("liger_kernel.chunked_loss")
    except ImportError as error:
        raise Skip(f"cannot be imported: {error}") from error
    loss = chunked_loss.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    return _from_hidden(case, loss)


def _from_hidden(case: Case, loss: Callable[..., Tensor]) -> Run:
    """A loss of hidden states and heads; these are the same in every call, being many products
    to one byte."""
    tokens = torch.randint(case.vocab, (case.rows,), generator=torch.Generator().manual_seed(0))
    given = make_linear_inputs(case, tokens)
    return lambda inputs: _with_gradient(loss(*given), given.student, given.student_weight)


def _student(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.student is not None
    assert inputs.tokens is not None
    return inputs.student, inputs.tokens


def _with_gradient(loss: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, wanted)


# Forward and backward of a loss from logits: teacher read, student read twice, gradient written.
LOSS_PASSES = 4

RIVALS: dict[str, list[Rival]] = {
    "select_actions": [
        Rival("amax", _select_amax, passes=1),
        Rival("tdkd", _select("fused"), passes=1),
        Rival("tdkd reference", _select("reference"), passes=1),
        Rival("torch eager", _select_plain, passes=1),
        Rival("torch.compile", _select_compiled, passes=1, compiles=True),
    ],
    "td_loss": [
        Rival("amax", _loss_amax, passes=2),
        Rival("tdkd", _loss("fused"), passes=LOSS_PASSES),
        Rival("tdkd reference", _loss("reference"), passes=LOSS_PASSES),
        Rival("torch.compile", _loss_compiled, passes=LOSS_PASSES, compiles=True),
        Rival("published", _loss_published, passes=LOSS_PASSES, warm=False, max_rounds=1),
        Rival("tdkd linear", _linear, against="tdkd linear"),
        Rival("Liger JSD", _liger, against="tdkd linear", compiles=True),
    ],
}
