"""An objective of one's own, held to what the ops take from it: `tdkd verify --objective`.

Cases are drawn in float64 from a seed: every level of Q, ties, -inf logits, sets with padded slots,
responses that end and that were cut off, rows that are no states, rows of the student's own, values
of a target network and of a value head. On each the objective is asked four questions:

``gradient``
    is the gradient that autograd makes of it that of its values? What it detaches is held constant,
    but not what it computes under ``torch.no_grad()``, where nobody can see what came out.
``linear``
    are loss and gradient the same from hidden states, a head and sets with more padding?
``padding``
    are they untouched by rows that are no states, finite, and there for batches of none?
``flags``
    does it read no more than its flags say (``bootstraps``, ``normalised``, ``rowwise``,
    ``starts``, ``looks_ahead``, ``demonstrations``)?
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from tdkd import ops
from tdkd.errors import UserError
from tdkd.objectives import Objective, ObjectiveLike, as_objective, parse
from tdkd.td_rows import TDRows
from tdkd.types import Rows
from tdkd.verify import Finding, known_device

SAME = {"rtol": 1e-9, "atol": 1e-11}
"""Float64 sums in another order."""
HINT = (
    "what is computed under torch.no_grad() counts as a part of the loss here; call .detach() on it"
)
OF_ROWS = ("expert_weight", "target_value", "state_value")
"""Options of the ops that a case may have, one number a row."""


def load(spec: str) -> ObjectiveLike:
    """The objective at ``module:name`` (a class is called without arguments), or, without a colon,
    that of a text for :func:`tdkd.objectives.parse`.

    Raises:
        UserError: there is no such thing, or it is no objective.
    """
    if ":" not in spec:
        try:
            return parse(spec)
        except ValueError as error:
            raise UserError(str(error)) from error
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"objective: expected module:name, got {spec!r}")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, TypeError) as error:  # the latter of names such as ".."
        raise UserError(f"objective: expected a module to import, got {spec!r}: {error}") from error
    except AttributeError as error:
        raise UserError(f"objective: expected a name in {module_name}, got {spec!r}") from error
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:  # whatever a caller's own code raises
            raise UserError(
                f"objective: expected a class that needs no arguments, got {spec!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not callable(found):
        raise UserError(
            f"objective: expected a class, an instance or a function of Rows, got {spec!r}, "
            f"{type(found).__name__}"
        )
    return found


@dataclass(frozen=True)
class Case:
    """A student and a teacher on a few rows, in float64."""

    hidden: Tensor
    weight: Tensor
    hidden_logits: Tensor
    """which logits of the student are -inf."""
    teacher: Tensor
    tokens: Tensor
    options: dict[str, Any]
    note: str

    @property
    def student(self) -> Tensor:
        return self.masked(self.hidden @ self.weight.T)

    def masked(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(self.hidden_logits, -torch.inf)

    def dense(self, student: Tensor, objective: ObjectiveLike, **options: Any) -> ops.TDOutput:
        return ops.td_loss(
            student,
            self.teacher,
            self.tokens,
            objective=objective,
            impl="reference",
            **{**self.options, **options},
        )


def draw(seed: int, device: torch.device, *, target: bool = True) -> Case:
    """The case of a seed; without ``target`` none has values of a target network."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, vocab, k = choose.randint(2, 7), choose.randint(3, 9), choose.randint(1, 6)
    hidden, weight = normal(rows, 3), normal(vocab, 3)
    teacher = (normal(rows, vocab) * 3).round() / 2  # ties
    holes = torch.zeros(vocab, dtype=torch.bool)
    if choose.random() < 0.5:
        holes[choose.randrange(1, vocab)] = True
    teacher[:, holes] = -torch.inf
    allowed = (~holes).nonzero().squeeze(-1)
    tokens = allowed[torch.randint(len(allowed), (rows,), generator=generator)]
    tokens[torch.randint(0, 6, (rows,), generator=generator) == 0] = -100
    # one chain, then another, each ended or cut off
    successor = torch.arange(1, rows + 1)
    ends = {choose.randrange(rows), rows - 1}
    for end in ends:
        successor[end] = choose.choice((-1, -1, -2))
    options: dict[str, Any] = {
        "q": choose.choice(get_args(ops.Level)),
        "k": k,
        "top_p": choose.choice((0.5, 0.9, 1.0)),
        "gamma": choose.choice((0.0, 0.7, 0.99, 0.99)),
        "successor": successor.to(device),
    }
    options |= dict.fromkeys(OF_ROWS)
    if choose.random() < 0.3:
        own = torch.rand(rows, generator=generator) < 0.5
        weight_of_experts = torch.where(own, 0.0, rows / (~own).sum().clamp(min=1))
        options["expert_weight"] = weight_of_experts.double().to(device)
    for name, there in (("target_value", target), ("state_value", True)):
        level = normal(rows).to(device)
        if choose.random() < 0.3 and there:
            options[name] = level
    note = f"{rows} x {vocab} k={k} q={options['q']} gamma={options['gamma']}"
    note += "".join(f" {name}" for name in OF_ROWS if options[name] is not None)
    if holes.any():
        note += " -inf"
    hidden, weight, holes, teacher, tokens = (
        x.to(device) for x in (hidden, weight, holes, teacher, tokens)
    )
    return Case(hidden, weight, holes, teacher, tokens, options, note)


class Held:
    """An objective whose detached values, once seen, stay what they were."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.seen: list[Tensor] | None = None
        for flag in ("bootstraps", "normalised", "starts", "looks_ahead", "successors"):
            setattr(self, flag, getattr(objective, flag))

    def __call__(self, rows: Rows) -> Tensor:
        detach, first = Tensor.detach, self.seen is None
        seen: list[Tensor] = [] if self.seen is None else list(self.seen)

        def held(x: Tensor) -> Tensor:
            if first:
                seen.append(detach(x))
                return seen[-1]
            return seen.pop(0)

        with mock.patch.object(Tensor, "detach", held):
            loss = self.objective(rows)
        if first:
            self.seen = seen
        return loss


def _gradient(objective: Objective, case: Case) -> Iterator[str]:
    held = Held(objective)
    leaves = [(case.hidden @ case.weight.T).requires_grad_()]
    if case.options["state_value"] is not None:
        leaves.append(case.options["state_value"].clone().requires_grad_())

    def loss(logits: Tensor, state_value: Tensor | None = None) -> Tensor:
        options = {"state_value": state_value, "reduction": "none"}
        return case.dense(case.masked(logits), held, **options).loss

    loss(*leaves)  # what is detached is held from here on
    try:
        torch.autograd.gradcheck(loss, leaves, rtol=1e-5, atol=1e-6)
    except GradcheckError as error:
        yield f"{' '.join(str(error).split())[:300]} ({HINT})"


def _linear(objective: Objective, case: Case) -> Iterator[str]:
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    dense = case.dense(leaves[0] @ leaves[1].T, objective)
    ids, log_probs, count = dense.actions
    padding = ids.new_full((*ids.shape[:-1], 3), -1)
    actions = ops.ActionSet(
        torch.cat([ids, padding], -1),
        torch.cat([log_probs, torch.full_like(padding, -torch.inf, dtype=log_probs.dtype)], -1),
        count,
    )
    options = {name: case.options[name] for name in ("q", "gamma", "successor", *OF_ROWS)}
    linear = ops.linear_td_loss(
        leaves[0],
        leaves[1],
        case.tokens,
        actions=actions,
        objective=objective,
        impl="reference",
        **options,
    )
    wanted = [dense.loss, *torch.autograd.grad(dense.loss, leaves, materialize_grads=True)]
    got = [linear.loss, *torch.autograd.grad(linear.loss, leaves, materialize_grads=True)]
    for name, x, y in zip(("loss", "hidden", "weight"), got, wanted, strict=True):
        what = name if name == "loss" else f"gradient of {name}"
        yield from _differ(f"{what} from hidden states and more padding", x, y)


def _padding(objective: Objective, case: Case) -> Iterator[str]:
    state = (case.tokens >= 0).unsqueeze(-1)
    results = []
    for spoilt in (False, True):
        student = case.student.clone()
        teacher = case.teacher.clone()
        if spoilt:
            student = torch.where(state, student, torch.nan)
            teacher = torch.where(state, teacher, torch.nan)
        student.requires_grad_()
        out = replace(case, teacher=teacher).dense(student, objective)
        (grad,) = torch.autograd.grad(out.loss, student, materialize_grads=True)
        results.append((out.loss, grad))
    if not results[0][0].isfinite():
        yield f"loss: expected a finite number, got {float(results[0][0].detach())}"
    if not results[0][1].isfinite().all():
        yield "gradient: expected finite numbers, got others"
    yield from _differ("loss with NaN in rows that are no states", results[1][0], results[0][0])
    yield from _differ("gradient with NaN in rows that are no states", results[1][1], results[0][1])
    nothing = replace(case, tokens=torch.full_like(case.tokens, -100))
    empty = replace(
        case,
        hidden=case.hidden[:0],
        teacher=case.teacher[:0],
        tokens=case.tokens[:0],
        options={
            name: given[:0] if isinstance(given, Tensor) else given
            for name, given in case.options.items()
        },
    )
    for name, small in (("no states", nothing), ("no rows", empty)):
        loss = small.dense(small.student, objective).loss
        if loss != 0:
            yield f"loss of a batch with {name}: expected 0, got {float(loss.detach())}"


def _flags(objective: Objective, case: Case) -> Iterator[str]:
    flags = {
        name: getattr(objective, name) is not False
        for name in (
            "bootstraps",
            "normalised",
            "starts",
            "looks_ahead",
            "demonstrations",
            "successors",
        )  # fmt: skip
    }
    if flags["bootstraps"] and not flags["looks_ahead"]:
        yield "looks_ahead: expected True where bootstraps is, got False"
    made: list[Rows] = []

    def everything(rows: Rows) -> Tensor:
        made.append(rows)
        return torch.zeros_like(rows.value)

    case.dense(case.student, everything)
    (rows,) = made
    expected = objective(rows)
    if expected.shape != rows.value.shape:
        yield f"loss: expected one a row {tuple(rows.value.shape)}, got {tuple(expected.shape)}"
        return
    shift = 0.5 + torch.arange(rows.value.numel(), dtype=torch.float64, device=rows.value.device)
    unknown = rows.state & ~rows.bootstrapped
    counted = rows.bootstrapped if flags["bootstraps"] else rows.state
    changes: list[tuple[str, str, dict[str, Any], bool, Tensor]] = [
        ("normalised", "rows.log_mass and rows.log_tail", {"log_mass": None, "log_tail": None},
         not flags["normalised"], counted),
        ("starts", "rows.occupancy", {"occupancy": None}, not flags["starts"], counted),
        ("looks_ahead", "rows.next_value", {"next_value": rows.next_value + shift},
         not flags["looks_ahead"], counted),
        ("bootstraps", "V' where it is unknown", {"next_value": rows.next_value + shift},
         not flags["bootstraps"], unknown),
        ("successors", "rows.successor where it does not look ahead",
         {"successor": rows.successor.clamp(max=-1)},
         not (flags["successors"] or flags["looks_ahead"] and rows.gamma), counted),
        ("demonstrations", "rows.expert_weight", {"expert_weight": shift},
         not flags["demonstrations"], counted),
    ]  # fmt: skip
    for flag, what, fields, binding, where in changes:
        if not binding:
            continue
        try:
            got = objective(replace(rows, **fields))
        except Exception as error:  # it asked for what is not there
            yield f"{flag}: expected True, since it reads {what}, got False ({error!r})"
            continue
        if any(_differ("", got[where], expected[where])):
            yield f"{flag}: expected True, since it reads {what}, got False"
    if objective.rowwise:
        yield from _rowwise(objective, case)


def _rowwise(objective: Objective, case: Case) -> Iterator[str]:
    """A row and its successor alone must give the row's loss, as the linear forms ask for it."""
    actions = case.dense(case.student, objective).actions
    td_rows = TDRows.of(
        actions.ids,
        actions.log_probs,
        case.tokens,
        case.options["successor"],
        ignore_index=-100,
        objective=objective,
        level=case.options["q"],
        gamma=case.options["gamma"],
        soft_value=ops.soft_value,
        **{name: case.options[name] for name in OF_ROWS},
    )
    z = ops.gather_q(case.student, actions.ids, impl="reference")
    outside = torch.zeros_like(case.student, dtype=torch.bool).scatter(
        -1, actions.ids.long().clamp(min=0), actions.ids >= 0
    )
    rest = case.student.masked_fill(outside, -torch.inf).logsumexp(-1)
    expected = td_rows(z, rest).loss
    for row in range(expected.numel()):
        successor = int(td_rows.successor[row])
        index = torch.tensor([row] if successor < 0 else [row, successor], device=z.device)
        got = td_rows.take(index)(z[index], rest[index]).loss[0]
        if any(_differ("", got, expected[row])):
            yield "rowwise: expected False, since it reads other rows, got True"
            return


def _differ(what: str, got: Tensor, wanted: Tensor) -> Iterator[str]:
    got, wanted = got.detach(), wanted.detach()
    if not torch.allclose(got, wanted, equal_nan=True, **SAME):
        off = (got - wanted).abs().nan_to_num(torch.inf)
        yield f"{what}: off by {float(off.max()):.3g}"


QUESTIONS: dict[str, Callable[[Objective, Case], Iterator[str]]] = {
    "gradient": _gradient,
    "linear": _linear,
    "padding": _padding,
    "flags": _flags,
}


def verify_objective(
    objective: ObjectiveLike,
    *,
    name: str,
    device: str = "cpu",
    cases: int,
    seed: int = 0,
    tell: Callable[[str], None] = lambda what: None,
) -> Iterator[Finding]:
    """Asks every question on ``cases`` cases from ``seed`` on.

    Args:
        objective: an objective of :mod:`tdkd.objectives`, or a function of ``Rows``.
        name: what to call it in the findings.
        device: of the tensors.
        cases: how many cases a question.
        seed: of the first case.
        tell: hears what is asked.
    Raises:
        UserError: torch has no such device here.
    """
    known_device(device)
    objective = as_objective(objective)
    # which the ops refuse beside it
    target = not objective.starts
    for question, ask in QUESTIONS.items():
        tell(f"{name} {question}")
        finding = Finding(name, question, "float64")
        for number in range(seed, seed + cases):
            finding.cases += 1
            case = draw(number, torch.device(device), target=target)
            failures: list[str] = []
            try:
                failures.extend(ask(objective, case))
            except Exception as error:  # an objective that raises has failed
                failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            finding.failures += [f"seed {number}: {what} ({case.note})" for what in failures]
        yield finding
