"""Who is timed for each op.

A rival prepares itself for a case and returns a function of the case's tensors, which is called
with one copy of them after the other. One that cannot run here, or not on this case, raises
:class:`Skip` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tdkd import ops
from tdkd.benchmark import linear
from tdkd.benchmark.cases import Case, Inputs, Run, Skip, make_linear_inputs
from tdkd.objectives import IQLearn
from tdkd.published import published_loss

Impl = Literal["auto", "reference", "fused"]
ANCHORS = {"cpu": "amax", "cuda": "copy"}
"""The rival that moves bytes as fast as a device can."""
PUBLISHED_BUFFERS = 20
"""float32 buffers of the logits' size that the published loss holds at once."""
GAMMA, LAMBDA = 0.99, 0.9
"""Of TD targets."""


class Rival(NamedTuple):
    """One way to do what an op does."""

    name: str
    prepare: Callable[[Case], Run]
    passes: int = 0
    """Times that an op of this kind must read or write the main tensor, however it is done; 0
    where bandwidth is not what bounds it."""
    against: str = "tdkd"
    """the rival whose time is 1 in its ratio."""
    compiles: bool = False
    """needs the compiler: left out by ``--no-compile``."""
    device: str | None = None
    """the only one where it is of interest."""


def _amax(case: Case) -> Run:
    return lambda inputs: inputs.main.detach().amax(-1)


def _copied(case: Case) -> Run:
    kept: list[Tensor] = []

    def copy(inputs: Inputs) -> None:
        if not kept:
            kept.append(torch.empty_like(inputs.main, requires_grad=False))
        kept[0].copy_(inputs.main.detach())

    return copy


def _select(impl: Impl) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        return lambda inputs: ops.select_actions(inputs.main, case.k, case.top_p, impl=impl)

    return prepare


def _select_plain(case: Case) -> Run:
    """What one would write: top-k and log Z, no more."""
    k = min(case.k, case.vocab)

    def plain(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        values, ids = torch.topk(inputs.main, k)
        return values, ids, torch.logsumexp(inputs.main, -1)

    return plain


def _select_compiled(case: Case) -> Run:
    return torch.compile(_select_plain(case), dynamic=False)


def _loss_amax(case: Case) -> Run:
    def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
        student, _ = _student(inputs)
        return student.detach().amax(-1), inputs.main.amax(-1)

    return both


def _loss(impl: Impl) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        forward = _loss_forward(case, impl)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            student, tokens = _student(inputs)
            return _with_gradient(forward(student, inputs.main, tokens), student)

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
        return _with_gradient(forward(student, inputs.main, tokens), student)

    return run


def _loss_plain(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of ``tdkd`` as one would write it: top-k, log Z, gather. Every row is followed by
    the next one, and the last by none, whose value is unknown. A taken token that is not in its
    set takes the place of the last member."""
    k = min(case.k, case.vocab)

    def forward(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            values, ids = torch.topk(teacher.float(), k)
            p = (values - torch.logsumexp(teacher.float(), -1, keepdim=True)).exp()
            held = p.cumsum(-1) - p < case.top_p
            outside = ~((ids == tokens[:, None]) & held).any(-1)
            last = torch.arange(k, device=ids.device) == held.sum(-1, keepdim=True).clamp(max=k - 1)
            here = last & outside[:, None]
            ids, held = torch.where(here, tokens[:, None], ids), held | here
        log_z = torch.logsumexp(student.float(), -1)
        q = student.gather(-1, ids).float() - log_z[:, None]
        value = torch.where(held, q, -torch.inf).logsumexp(-1)
        future = GAMMA * value[1:]
        taken = torch.where((ids == tokens[:, None]) & held, q, 0.0).sum(-1)
        error = taken[:-1] - future
        return (value[:-1] - future - (error - error.square() / 4)).mean()

    return forward


def _plain(compiled: bool) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        forward = _loss_plain(case)
        if compiled:
            forward = torch.compile(forward, dynamic=False)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            student, tokens = _student(inputs)
            return _with_gradient(forward(student, inputs.main, tokens), student)

        return run

    return prepare


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """bool ``[..., V]``: the top-p set as the authors' code takes it, of the whole row sorted."""
    probs, ids = logits.float().softmax(-1).sort(-1, descending=True)
    held = probs.cumsum(-1) - probs < top_p
    return torch.zeros_like(held).scatter(-1, ids, held)


def _loss_published(case: Case) -> Run:
    if case.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        needed = PUBLISHED_BUFFERS * 4 * case.rows * case.vocab
        if needed > free:
            raise Skip(f"needs about {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")
    if case.rows % 4:
        raise Skip(f"takes (B, T, V) logits: expected rows to be a multiple of 4, got {case.rows}")
    shape = (4, case.rows // 4, case.vocab)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        student, tokens = _student(inputs)
        teacher = inputs.main.view(shape)
        loss, _ = published_loss(
            student.view(shape),
            teacher,
            tokens.view(shape[:2]),
            top_p=case.top_p,
            pad_token_id=0,
            support=nucleus(teacher, case.top_p),
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


def _liger_fused(case: Case) -> Run:
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise Skip(f"cannot be imported: {error}") from error

    def loss(
        hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, tokens: Tensor
    ) -> Tensor:
        return functional.liger_fused_linear_jsd(hidden, weight, teacher, teacher_weight, tokens)

    return _from_hidden(case, loss)


def _from_hidden(case: Case, loss: Callable[..., Tensor]) -> Run:
    """A loss of hidden states and heads; these are the same in every call, being many products
    to one byte."""
    given = make_linear_inputs(case)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        with case.mixed():
            result = loss(*given)
        return _with_gradient(result, given.student, given.student_weight)

    return run


def _student(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return _there(inputs.student), _there(inputs.tokens)


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _with_gradient(loss: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def _gather(gather: Callable[[Tensor, Tensor], Tensor]) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        q = gather(inputs.main, _there(inputs.ids))
        return q.detach(), *torch.autograd.grad(q, inputs.main, inputs.grad)

    return run


def _gather_q(impl: Impl) -> Callable[[Case], Run]:
    return lambda case: _gather(lambda logits, ids: ops.gather_q(logits, ids, impl=impl))


def _plain_gather(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.long()).float()


def _gather_from_head(gather: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        hidden = _there(inputs.student)
        q = gather(hidden, inputs.main, _there(inputs.ids))
        return q.detach(), *torch.autograd.grad(q, (hidden, inputs.main), inputs.grad)

    return run


def _linear_gather_q(impl: Impl) -> Callable[[Case], Run]:
    return lambda case: _gather_from_head(
        lambda hidden, weight, ids: ops.linear_gather_q(hidden, weight, ids, impl=impl)
    )


def _dense_gather(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return _plain_gather(hidden @ weight.T, ids)


def _value(value_of: Callable[[Tensor], Tensor]) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        value = value_of(inputs.main)
        return value.detach(), *torch.autograd.grad(value, inputs.main, inputs.grad)

    return run


def _soft_value(impl: Impl) -> Callable[[Case], Run]:
    return lambda case: _value(lambda q: ops.soft_value(q, impl=impl))


def _plain_value(q: Tensor) -> Tensor:
    return torch.logsumexp(q, -1)


def _td_target(impl: Impl) -> Callable[[Case], Run]:
    return lambda case: partial(_targets, impl=impl)


def _targets(inputs: Inputs, impl: Impl) -> Tensor:
    return ops.td_target(inputs.main, _there(inputs.successor), gamma=GAMMA, lam=LAMBDA, impl=impl)


def _plain_targets(case: Case) -> Run:
    """The loop from the last row to the first, for rows in order."""

    def loop(inputs: Inputs) -> Tensor:
        targets = torch.zeros_like(inputs.main)
        for i in range(case.rows - 2, -1, -1):
            ahead = (1 - LAMBDA) * inputs.main[i + 1] + LAMBDA * targets[i + 1]
            targets[i] = GAMMA * ahead
        return targets

    return loop


# Forward and backward of a loss from logits: teacher read, student read twice, gradient written.
LOSS_PASSES = 4

RIVALS: dict[str, list[Rival]] = {
    "select_actions": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _select("fused"), passes=1),
        Rival("tdkd reference", _select("reference"), passes=1),
        Rival("torch eager", _select_plain, passes=1),
        Rival("torch.compile", _select_compiled, passes=1, compiles=True),
    ],
    "td_loss": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _loss_amax, passes=2),
        Rival("tdkd", _loss("fused"), passes=LOSS_PASSES),
        Rival("tdkd reference", _loss("reference"), passes=LOSS_PASSES),
        Rival("torch.compile", _loss_compiled, passes=LOSS_PASSES, compiles=True),
        Rival("plain torch", _plain(compiled=False), passes=LOSS_PASSES),
        Rival("plain torch, compiled", _plain(compiled=True), passes=LOSS_PASSES, compiles=True),
        Rival("published", _loss_published, passes=LOSS_PASSES),
        Rival("tdkd linear", _linear, against="tdkd linear"),
        Rival("Liger JSD", _liger, against="tdkd linear", compiles=True),
    ],
    # forward and backward: the dense gradient is written, and what is gathered hardly counts
    "gather_q": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _gather_q("fused"), passes=1),
        Rival("tdkd reference", _gather_q("reference"), passes=1),
        Rival("torch eager", lambda case: _gather(_plain_gather), passes=1),
        Rival(
            "torch.compile",
            lambda case: _gather(torch.compile(_plain_gather, dynamic=False)),
            passes=1,
            compiles=True,
        ),
    ],
    # forward and backward: hidden states and the head get gradients
    "linear_gather_q": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _linear_gather_q("fused")),
        Rival("tdkd reference", _linear_gather_q("reference")),
        Rival("dense", lambda case: _gather_from_head(_dense_gather)),
        Rival(
            "torch.compile",
            lambda case: _gather_from_head(torch.compile(_dense_gather, dynamic=False)),
            compiles=True,
        ),
    ],
    # forward and backward of the student's side: hidden states and the head get gradients. Row
    # gather is another objective, one that needs no normaliser.
    "linear_td_loss": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("three products", linear.three_products),
        Rival("tdkd", linear.td_loss(linear.NORMALISED)),
        Rival("tdkd batch", linear.td_loss(linear.NORMALISED, normaliser="batch")),
        Rival("tdkd sampled", linear.td_loss(linear.NORMALISED, normaliser="sampled")),
        Rival("tdkd gather", linear.td_loss(linear.GATHERED, q="logit")),
        Rival("dense", linear.dense_loss()),
        Rival("torch.compile", linear.dense_loss(compiled=True), compiles=True),
        # with the teacher's head
        Rival("tdkd, both heads", linear.both_heads("batch"), device="cuda"),
        Rival("tdkd sampled, both heads", linear.both_heads("sampled"), device="cuda"),
        Rival("Liger JSD, both heads", _liger, compiles=True, device="cuda"),
        Rival("Liger fused JSD, both heads", _liger_fused, compiles=True, device="cuda"),
    ],
    "linear_log_probs": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("three products", linear.three_products),
        Rival("tdkd", linear.both_ways(linear.log_probs)),
        Rival("torch chunks", linear.both_ways(linear.chunked_log_probs)),
        Rival("dense", linear.both_ways(linear.dense_log_probs)),
        Rival(
            "torch.compile", linear.both_ways(linear.dense_log_probs, compiled=True), compiles=True
        ),
        Rival("tdkd, head frozen", linear.both_ways(linear.log_probs, frozen=True)),
        Rival("dense, head frozen", linear.both_ways(linear.dense_log_probs, frozen=True)),
    ],
    "linear_select_actions": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("one product", linear.one_product),
        Rival("tdkd", linear.select),
        Rival("dense", linear.dense_select),
    ],
    # forward and backward
    "linear_cross_entropy": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("three products", linear.three_products),
        Rival("tdkd", linear.lm_loss),
        Rival("torch", linear.torch_cross_entropy),
        Rival("torch, its chunks", partial(linear.torch_cross_entropy, chunks="auto")),
        Rival("torch, 256 rows", partial(linear.torch_cross_entropy, chunks=256)),
        Rival("dense", linear.both_ways(linear.dense_cross_entropy)),
        Rival(
            "torch.compile",
            linear.both_ways(linear.dense_cross_entropy, compiled=True),
            compiles=True,
        ),
    ],
    # forward and backward: read twice, and the gradient is written
    "soft_value": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _soft_value("fused"), passes=3),
        Rival("tdkd reference", _soft_value("reference"), passes=3),
        Rival("torch eager", lambda case: _value(_plain_value), passes=3),
        Rival(
            "torch.compile",
            lambda case: _value(torch.compile(_plain_value, dynamic=False)),
            passes=3,
            compiles=True,
        ),
    ],
    # forward; a chain of rows, not bandwidth, is what it waits for
    "td_target": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _td_target("fused")),
        Rival("tdkd reference", _td_target("reference")),
        Rival("torch eager", _plain_targets),
        Rival(
            "torch.compile",
            lambda case: torch.compile(lambda inputs: _targets(inputs, "reference"), dynamic=False),
            compiles=True,
        ),
    ],
}

# What the rule chooses, and each of the ways that it chooses from.
WAYS: dict[str, list[Rival]] = {
    "linear_gather_q": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", _linear_gather_q("fused")),
        Rival("k rows", linear.forced("gather", _linear_gather_q("fused"))),
        Rival("all rows", linear.forced("products", _linear_gather_q("fused"))),
        Rival("dense", lambda case: _gather_from_head(_dense_gather)),
    ],
    "linear_td_loss": [
        Rival("copy", _copied, passes=2, device="cuda"),
        Rival("amax", _amax, passes=1),
        Rival("tdkd", linear.td_loss(linear.NORMALISED, normaliser="batch")),
        Rival(
            "batch",
            linear.forced("batch", linear.td_loss(linear.NORMALISED, normaliser="batch")),
        ),
        Rival("tdkd sampled", linear.td_loss(linear.NORMALISED, normaliser="sampled")),
        Rival(
            "sampled",
            linear.forced("sampled", linear.td_loss(linear.NORMALISED, normaliser="sampled")),
        ),
        Rival("exact", linear.td_loss(linear.NORMALISED)),
    ],
}


def rivals_of(case: Case) -> list[Rival]:
    """Who is timed on a case."""
    rivals = (WAYS if case.ways else RIVALS)[case.op]
    return [r for r in rivals if r.device in (None, case.device)]
