"""The ops on this machine, against the reference in float64: what `tdkd verify` runs.

A case is drawn from a seed: shapes, strides, options, and values that are hard on a kernel. Its
outputs and gradients may be as far from the reference in float64 as the reference in the case's own
dtype is, and a few units in the last place further; ids must be equal, and a second run must give
the same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.library import opcheck

from tdkd import ops
from tdkd.errors import UserError
from tdkd.kernels import backends, routes
from tdkd.kernels import head as products
from tdkd.objectives import ForwardKL, IQLearn, Objective
from tdkd.testing import LOGITS, SCALES, make_logits, peak_bytes, raw_ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OBJECTIVE: Objective = ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0, stop_gradient="next")
CASES = {"quick": 12, "full": 200}
"""Cases of each op and dtype."""


class Problem(NamedTuple):
    """One case: tensors that may need gradients, and what to do with them."""

    leaves: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]
    """``call(*leaves, impl=...)``: integer outputs must be equal, floating ones near."""
    reach: float = 0.0
    """size of what was subtracted to give the outputs: logits, where they are log-probabilities."""
    slope: float = 0.0
    """the same for gradients: of what was subtracted to give them, for an incoming one near 1."""
    note: str = ""
    """the case in words."""
    chunk: int | None = None
    """logits of a chunk of the linear forms; None leaves it to them."""


@dataclass
class Finding:
    """What the cases of one op and dtype showed."""

    op: str
    dtype: str
    backend: str
    cases: int = 0
    worst: float = 0.0
    """largest excess over the error of the reference, as a share of what is allowed."""
    failures: list[str] = field(default_factory=list)
    """the first ones in words, with the seed that gives each again."""

    @property
    def passed(self) -> bool:
        return not self.failures


class Draw:
    """Everything random about a case."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def rows(self) -> int:
        return self.random.choice((0, 1, 2, 5, 12, 33))

    def vocab(self) -> int:
        return self.random.choice((1, 2, 17, 128, 257, 700, 1100, 4100))

    def k(self) -> int:
        return self.random.choice((1, 2, 5, 16, 64, 100, 300, 1024))

    def scale(self) -> dict[str, Any]:
        return self.random.choice(SCALES)._asdict()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def logits(self, rows: int, vocab: int) -> tuple[Tensor, str]:
        """Rows of one kind or of several, levels and strides of many kinds."""
        kind = self.random.choice(LOGITS)
        x = make_logits(kind, rows, vocab, torch.float32, self.generator)
        level = self.random.choice((0.0, 0.0, 100.0, -1000.0))
        if kind not in ("spike", "nan"):
            x = x + level
        shrink = self.random.choice((1.0, 1.0, 1e-40))
        if shrink != 1.0:
            x, level = x * shrink, 0.0
        holes = self.random.random() < 0.3
        if holes and vocab > 1:
            x[:, self.random.randrange(vocab) :: 3] = -torch.inf
        x = self.place(x.to(self.dtype))
        stride = self.random.choice(("dense", "sliced", "transposed"))
        if stride == "sliced":
            wide = torch.zeros(rows, vocab + 3, dtype=self.dtype, device=self.device)
            wide[:, :vocab] = x
            x = wide[:, :vocab]
        elif stride == "transposed":
            x = x.T.contiguous().T
        return x, f"{rows} x {vocab} {kind} level {level:g}{' holes' if holes else ''} {stride}"

    def ids(self, rows: int, k: int, vocab: int) -> Tensor:
        """Some padded, some twice."""
        return self.place(self.integers(-1, vocab, rows, k))

    def tokens(self, rows: int, vocab: int) -> Tensor:
        tokens = self.integers(0, vocab, rows)
        tokens[self.integers(0, 5, rows) == 0] = -100
        return self.place(tokens)

    def successor(self, rows: int) -> Tensor:
        """Chains in any order over the rows, each ended or cut off."""
        order = torch.randperm(rows, generator=self.generator)
        successor = torch.full((rows,), -2)
        if rows > 1:
            successor[order[:-1]] = order[1:]
            cut = order[self.integers(0, 4, rows) == 0]
            successor[cut] = self.integers(-2, 0, cut.numel())
        return self.place(successor)

    def top_p(self) -> float:
        return self.random.choice((1e-6, 0.3, 0.8, 0.95, 1.0))


def _select_actions(draw: Draw) -> Problem:
    rows, vocab, k, top_p = draw.rows(), draw.vocab(), draw.k(), draw.top_p()
    logits, note = draw.logits(rows, vocab)
    scale = draw.scale()
    include = draw.ids(rows, 1, vocab)[:, 0] if draw.random.random() < 0.5 else None

    def call(logits: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        if logits.dtype == torch.float64:
            # sets of float64 are others where float32 merges values: those of the dtype, exactly
            ids, _, count = ops.select_actions(
                logits.to(draw.dtype), k, top_p, include=include, impl="reference", **scale
            )
            whole = ops.gather_q(logits.detach(), _every(logits), impl="reference", **scale)
            log_p = whole - whole.logsumexp(-1, keepdim=True)
            picked = log_p.gather(-1, ids.long().clamp(min=0))
            return ids, torch.where(ids < 0, -torch.inf, picked), count
        return ops.select_actions(logits, k, top_p, include=include, impl=impl, **scale)

    note = f"{note} k={k} top_p={top_p:g} {scale}"
    return Problem((logits,), call, _size(logits, scale), note=note)


def _every(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)


def _size(logits: Tensor, scale: dict[str, Any]) -> float:
    """Largest finite scaled logit."""
    finite = logits.detach().double()[logits.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    largest *= scale["logit_scale"]
    if scale["softcap"]:
        largest = min(largest, scale["softcap"])
    return largest / scale["temperature"] + 12.0


def _squared(size: float) -> float:
    """Reach of a loss that squares TD errors of some size, with the weight that OBJECTIVE gives."""
    return size * (1.0 + 0.1 * size / 2)


def _gather_q(draw: Draw) -> Problem:
    rows, vocab, k = draw.rows(), draw.vocab(), draw.k()
    logits, note = draw.logits(rows, vocab)
    ids, scale = draw.ids(rows, k, vocab), draw.scale()

    def call(logits: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        return (ops.gather_q(logits, ids, impl=impl, **scale),)

    # of a saturated softcap 1 - tanh^2 is left
    return Problem((logits,), call, slope=1.0, note=f"{note} k={k} {scale}")


def _soft_value(draw: Draw) -> Problem:
    rows, k = draw.rows(), draw.k()
    q, note = draw.logits(rows, k)

    def call(q: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        return (ops.soft_value(q, impl=impl),)

    size = _size(q, {"logit_scale": 1.0, "softcap": None, "temperature": 1.0})
    return Problem((q,), call, size, note=note)


def _td_target(draw: Draw) -> Problem:
    rows = draw.rows()
    successor = draw.successor(rows)
    gamma, lam = draw.random.choice((0.0, 0.99, 1.0)), draw.random.choice((None, 0.0, 0.7, 1.0))
    values = tuple(draw.place((draw.normal(rows) * 5).to(draw.dtype)) for _ in range(2))

    def call(value: Tensor, reward: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        return (
            ops.td_target(
                value,
                successor,
                gamma=gamma,
                reward=reward,
                lam=lam,
                impl=impl,
            ),
        )

    return Problem(values, call, 20.0 * rows, note=f"{rows} rows gamma={gamma} lam={lam}")


def _td_loss(draw: Draw) -> Problem:
    rows, vocab, k = draw.rows(), draw.vocab(), draw.k()
    kind = draw.random.choice(("random", "peaked"))
    student = make_logits(kind, rows, vocab, draw.dtype, draw.generator)
    teacher = draw.place(make_logits("peaked", rows, vocab, draw.dtype, draw.generator))
    options: dict[str, Any] = {
        "objective": OBJECTIVE,
        "q": draw.random.choice(("log_prob", "logit")),
        "successor": draw.successor(rows),
        "reduction": "none",
        "k": k,
        "top_p": draw.top_p(),
        **draw.scale(),
    }
    tokens = draw.tokens(rows, vocab)

    def call(student: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        out = ops.td_loss(student, teacher, tokens, impl=impl, **options)
        return out.actions.ids, out.loss, out.q, out.value, out.td_error

    student = draw.place(student)
    note = f"{rows} x {vocab} {kind} k={k} q={options['q']} top_p={options['top_p']:g}"
    size = _squared(_size(student, options))
    if k < vocab // 2 and draw.random.random() < 0.5:
        _suppress(student, teacher, tokens)
        note += " suppressed"
    return Problem((student,), call, size, 1.0, note)


def _suppress(student: Tensor, teacher: Tensor, tokens: Tensor) -> None:
    """Writes a large negative number, in place of -inf, into some logits (or biases) of a student:
    what generation does to tokens that it forbids. No set holds them, nor all others: the tail
    bucket would hold rounding times that number."""
    forbidden = torch.arange(student.shape[-1], device=student.device) % 7 == 0
    student[..., forbidden] = max(-1e9, torch.finfo(student.dtype).min)
    teacher[..., forbidden] = -torch.inf
    tokens[tokens % 7 == 0] = -100


class _HeadDraw(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    note: str


def _head(draw: Draw, whole_numbers: bool = False) -> _HeadDraw:
    rows, vocab, width = draw.rows(), draw.vocab(), draw.random.choice((1, 7, 16, 64, 129))
    if whole_numbers:  # every dtype holds their products exactly
        hidden, weight = draw.integers(-2, 3, rows, width), draw.integers(-2, 3, vocab, width)
        bias = draw.integers(-2, 3, vocab)
    else:
        hidden, weight = draw.normal(rows, width), draw.normal(vocab, width) * 2 / width**0.5
        bias = draw.normal(vocab)
    hidden, weight, bias = (draw.place(x.to(draw.dtype)) for x in (hidden, weight, bias))
    return _HeadDraw(hidden, weight, bias, f"{rows} x {width} @ {width} x {vocab}")


def _factor(head: _HeadDraw) -> float:
    """The largest hidden state or head row, of which gradients are sums."""
    return max(1.0, *(float(x.abs().max()) if x.numel() else 0.0 for x in head[:2]))


def _linear_gather_q(draw: Draw) -> Problem:
    head = _head(draw)
    k, scale = draw.k(), draw.scale()
    ids = draw.ids(head.hidden.shape[0], k, head.weight.shape[0])

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        return (ops.linear_gather_q(hidden, weight, ids, bias=bias, impl=impl, **scale),)

    return Problem(head[:3], call, 12.0, note=f"{head.note} k={k} {scale}")


def _linear_log_probs(draw: Draw) -> Problem:
    head = _head(draw)
    scale = draw.scale()
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    # distinct ids, fewer than all: a tail of rounding alone has no value to agree on
    k = min(draw.k(), vocab // 2)
    order = torch.rand(rows, vocab, generator=draw.generator).argsort(-1)
    ids = draw.place(order[:, :k])
    frozen = draw.random.random() < 0.5
    sampled: dict[str, Any] = {}
    if draw.random.random() < 0.3:  # more columns than ids: some are outside of every set
        columns = ops.sampled_vocabulary(
            vocab, k + 1 + vocab // 4, generator=draw.generator, device=draw.device
        )
        sampled = {"vocabulary": columns, "gathered": True}

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        return ops.linear_log_probs(hidden, weight, ids, bias=bias, impl=impl, **scale, **sampled)

    # gradients add up k targets of random sign
    slope = _factor(head) * k**0.5
    note = f"{head.note} k={k} {scale}{' sampled columns' * bool(sampled)}"
    return Problem(head[:3], call, 24.0, slope, note=note)


def _linear_select_actions(draw: Draw) -> Problem:
    head = _head(draw, whole_numbers=True)
    k, top_p = draw.k(), draw.top_p()

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        if hidden.dtype == torch.float64:
            hidden, weight, bias = (x.float() for x in (hidden, weight, bias))
        given = ops.linear_select_actions(hidden, weight, k, top_p, bias=bias, impl=impl)
        return given.ids, given.log_probs

    size = 4.0 * head.hidden.shape[1] + 14.0
    return Problem(head[:3], call, size, note=f"{head.note} k={k} top_p={top_p:g}")


def _linear_td_loss(draw: Draw) -> Problem:
    head = _head(draw)
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    k, tokens = draw.k(), draw.tokens(rows, vocab)
    teacher = draw.place(make_logits("peaked", rows, vocab, torch.float32, draw.generator))
    suppressed = k < vocab // 2 and draw.random.random() < 0.5
    if suppressed:
        _suppress(head.bias, teacher, tokens)
    actions = ops.select_actions(
        teacher, k, 0.8, include=torch.where(tokens < 0, -1, tokens), impl="reference"
    )
    options: dict[str, Any] = {
        "objective": OBJECTIVE,
        "successor": draw.successor(rows),
        "reduction": draw.random.choice(("mean", "sum", "none")),
        **draw.scale(),
    }
    step = draw.random.choice((None, 1, 4, 5))  # rows of a chunk
    if step and draw.random.random() < 0.5:  # responses in order, which end where chunks do
        successor = torch.arange(1, rows + 1)
        successor[step - 1 :: step] = successor[-1:] = -1
        options["successor"] = draw.place(successor)
    # gradients that were made in forward serve where nothing else has one
    alone = draw.random.random() < 0.5
    way = draw.random.choice(("exact", "batch", "sampled", "gather"))
    if way == "gather":
        options |= {"objective": ForwardKL(), "q": "logit"}
    elif way == "batch":
        options |= {
            "normaliser": "batch",
            "vocabulary": ops.batch_vocabulary(actions, vocab, extra=8, generator=draw.generator),
        }
    elif way == "sampled":
        columns = ops.sampled_vocabulary(vocab, k + 8, generator=draw.generator, device=draw.device)
        options |= {"normaliser": "sampled", "vocabulary": columns}

    frozen = draw.random.random() < 0.3

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, impl: ops.Impl) -> tuple[Tensor, ...]:
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        out = ops.linear_td_loss(
            hidden, weight, tokens, actions=actions, bias=bias, impl=impl, **options
        )
        if alone:
            return (out.loss,)
        return out.loss, out.q, out.value, out.td_error

    note = f"{head.note} k={k} {way} {options['reduction']} {step or 'all'} rows a chunk"
    note += " suppressed" * suppressed
    chunk = step and step * vocab
    return Problem(head[:3], call, _squared(24.0), _factor(head), note, chunk)


SUBJECTS: dict[str, Callable[[Draw], Problem]] = {
    "select_actions": _select_actions,
    "gather_q": _gather_q,
    "soft_value": _soft_value,
    "td_target": _td_target,
    "td_loss": _td_loss,
    "linear_gather_q": _linear_gather_q,
    "linear_log_probs": _linear_log_probs,
    "linear_select_actions": _linear_select_actions,
    "linear_td_loss": _linear_td_loss,
}
"""The ops, and how a case of each is drawn."""

ALLOWED = 4.0
"""Units in the last place beyond the error of the reference in the same dtype, for sums in another
order. The unit is that of the largest entry of the row, or of what was subtracted to give it."""
ALLOWED_GRADIENT = 16.0
"""The same for gradients, in units of the tensor's largest entry: exp of a difference of logits,
themselves rounded, and sums over rows."""


def verify(
    *,
    device: str = "cpu",
    ops_: Sequence[str] = tuple(SUBJECTS),
    dtypes: Sequence[str] = tuple(DTYPES),
    cases: int = CASES["quick"],
    seed: int = 0,
    tell: Callable[[str], None] = lambda what: None,
) -> Iterator[Finding]:
    """Draws ``cases`` cases of each op and dtype, from ``seed`` on, and compares.

    Raises:
        UserError: a name is unknown, or there is no kernel on the device.
    """
    for name, given, known in (("op", ops_, SUBJECTS), ("dtype", dtypes, DTYPES)):
        for value in given:
            if value not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {value}")
    backend = backend_of(device)
    for op in ops_:
        for dtype in dtypes:
            tell(f"{op} {dtype}")
            finding = Finding(op, dtype, backend)
            for number in range(seed, seed + cases):
                finding.cases += 1
                worst, failures = compare(op, dtype, device, number)
                finding.worst = max(finding.worst, worst)
                finding.failures += [f"seed {number}: {failure}" for failure in failures]
            yield finding


def known_device(device: str) -> torch.device:
    """The device of a name.

    Raises:
        UserError: torch has no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device: expected one of this machine, got {device}: {reason}") from error


def backend_of(device: str) -> str:
    """The kernels' name on a device.

    Raises:
        UserError: the device is not there, or has no kernels.
    """
    missing = backends.why_not(torch.empty(0, device=known_device(device)))
    if missing is not None:
        raise UserError(f"device: expected one with kernels, got {device}: {missing}")
    return f"C++ {backends.capability()}" if device == "cpu" else "Triton"


def compare(op: str, dtype: str, device: str, seed: int) -> tuple[float, list[str]]:
    """Worst share of what is allowed, and what failed, on the case that ``seed`` gives."""
    problem = SUBJECTS[op](Draw(seed, DTYPES[dtype], torch.device(device)))
    failures: list[str] = []
    try:
        with _chunks_of(problem.chunk, device):
            got = _run(problem, "fused", seed)
            again = _run(problem, "fused", seed)
        eager = _run(problem, "reference", seed)
        exact = _run(problem, "reference", seed, wide=True)
    except Exception as error:  # a kernel that raises has failed, and the others go on
        return math.inf, [f"{type(error).__name__}: {error} ({problem.note})"]
    worst = 0.0
    names = [f"output {i}" for i in range(len(got[0]))] + [
        f"gradient {i}" for i in range(len(got[1]))
    ]
    columns = zip(*((*run[0], *run[1]) for run in (got, again, eager, exact)), strict=True)
    for name, (mine, same, theirs, wanted) in zip(names, columns, strict=True):
        if not torch.equal(_bits(mine), _bits(same)):
            failures.append(f"{name}: two runs differ ({problem.note})")
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                failures.append(f"{name}: other ids than the reference's ({problem.note})")
            continue
        gradient = name.startswith("gradient")
        allowed = ALLOWED_GRADIENT if gradient else ALLOWED
        reach = problem.slope if gradient else problem.reach
        share = excess(mine, theirs, wanted, reach, gradient) / allowed
        worst = max(worst, share)
        if not share <= 1.0:
            failures.append(f"{name}: {share:.3g} of what is allowed ({problem.note})")
    return worst, failures


@contextmanager
def _chunks_of(elements: int | None, device: str) -> Iterator[None]:
    """Small chunks, whose rows any number of links may leave."""
    kind = torch.device(device).type
    with (
        mock.patch.dict(products.CHUNK_ELEMENTS, {kind: elements or products.CHUNK_ELEMENTS[kind]}),
        mock.patch.object(products, "TILE_ROWS", 3 if elements else products.TILE_ROWS),
        mock.patch.object(routes, "MOST_LINKS", 1.0 if elements else routes.MOST_LINKS),
    ):
        yield


def excess(got: Tensor, eager: Tensor, exact: Tensor, reach: float, whole: bool) -> float:
    """|got - exact| - |eager - exact| in units in the last place, where exact is finite.

    The unit is that of the largest of: the entries of the row (of the tensor, with ``whole``), and
    ``reach``. Entries that are not finite must be what eager gives.
    """
    finite = exact.isfinite() & eager.isfinite()
    if not torch.equal(_bits(got.float()[~finite]), _bits(eager.float()[~finite])):
        return math.inf
    if not bool(got[finite].isfinite().all()):
        return math.inf
    if not finite.any():
        return 0.0
    clean = torch.where(finite, exact, 0.0).abs()
    largest = clean.max() if whole or clean.dim() < 2 else clean.amax(-1, keepdim=True)
    info = torch.finfo(got.dtype)
    # below the normal numbers units do not shrink any more
    unit = (largest.clamp(min=reach) * info.eps).clamp(min=info.tiny)
    error = (got.double() - exact).abs() - (eager.double() - exact).abs()
    return max(0.0, float((torch.where(finite, error, 0.0) / unit).max()))


def _bits(x: Tensor) -> Tensor:
    """NaN equals NaN."""
    return x.nan_to_num(nan=1.25e30, posinf=torch.inf, neginf=-torch.inf)


def _run(
    problem: Problem, impl: ops.Impl, seed: int, wide: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients of the leaves, of a random weighting of the finite outputs."""
    leaves = [x.detach().clone() if x.is_contiguous() else x.detach() for x in problem.leaves]
    leaves = [(x.double() if wide else x).requires_grad_() for x in leaves]
    outputs = problem.call(*leaves, impl=impl)
    generator = torch.Generator().manual_seed(seed + 1)
    total: Tensor | None = None
    for output in outputs:
        if output.requires_grad:
            # inf and NaN have no gradient to compare
            weight = torch.randn(output.shape, generator=generator).to(output)
            part = (torch.where(output.isfinite(), output, 0.0) * weight).sum()
            total = part if total is None else total + part
    grads: tuple[Tensor, ...] = ()
    if total is not None:
        made = torch.autograd.grad(total, leaves, materialize_grads=True)
        # a logit that is NaN or infinite has no gradient to agree on
        finite = [x.detach().isfinite() for x in leaves]
        grads = tuple(torch.where(f, g, 0.0) for f, g in zip(finite, made, strict=True))
    return tuple(x.detach() for x in outputs), tuple(grads)


def raw_findings(device: str) -> Iterator[Finding]:
    """`torch.library.opcheck` of every operator that the ops call."""
    backend = backend_of(device)
    for name, arguments in raw_ops(torch.device(device)).items():
        finding = Finding(f"tdkd::{name}", "", backend, cases=1)
        try:
            opcheck(getattr(torch.ops.tdkd, name).default, arguments)
        except Exception as error:  # whatever it finds
            finding.failures.append(f"opcheck: {str(error).strip().splitlines()[0]}")
        yield finding


def graph_findings(device: str) -> Iterator[Finding]:
    """`torch.compile(fullgraph=True)` of each op; on a GPU no host sync, and a CUDA graph."""
    backend = backend_of(device)
    for op in SUBJECTS:
        finding = Finding(op, "graph", backend, cases=1)
        problem = _plain(op, torch.device(device))
        expected = problem.call(*problem.leaves, impl="fused")
        for name, way in (("torch.compile", _compiled), ("no host sync", _unwatched),
                          ("CUDA graph", _captured)):  # fmt: skip
            if device == "cpu" and way is not _compiled:
                continue
            try:
                for got, wanted in zip(way(problem), expected, strict=True):
                    torch.testing.assert_close(got, wanted, equal_nan=True)
            except Exception as error:
                lines = str(error).strip().splitlines()
                finding.failures.append(f"{name}: {lines[0] if lines else type(error).__name__}")
        yield finding


class Promise(NamedTuple):
    """What an op says of its memory."""

    call: Callable[[], object]
    """forward, and backward where there is one; returns all that stays."""
    allowed: int
    """bytes that its tensors may take at a time, results and gradients included."""


def memory_findings(device: str, ops_: Sequence[str] = tuple(SUBJECTS)) -> Iterator[Finding]:
    """The most memory that a call takes at a time, against what the op's documentation says."""
    backend, where = backend_of(device), torch.device(device)
    for make in (_from_logits, _from_heads):
        for op, promise in make(where).items():
            if op not in ops_:
                continue
            finding = Finding(op, "memory", backend, cases=1)
            try:
                promise.call()  # what is made once and kept does not count
                finding.worst = peak_bytes(promise.call, where) / promise.allowed
            except Exception as error:
                finding.failures.append(f"memory: {type(error).__name__}: {error}")
            if finding.worst > 1.0:
                share = f"{finding.worst:.3g} of the {promise.allowed:,} bytes"
                finding.failures.append(f"memory: {share} that it may take")
            yield finding


def _both(total: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return total.detach(), *torch.autograd.grad(total, leaves)


def _from_logits(device: torch.device) -> dict[str, Promise]:
    """No tensor of the logits' size but their gradient; a quarter of it is left for the rest."""
    rows, vocab, k = 1024, 16_384, 64
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(rows, vocab, generator=generator, device=device) for _ in range(2)
    )
    student.requires_grad_()
    tokens = torch.arange(rows, device=device)
    ids = tokens[:, None] + torch.arange(k, device=device)
    rest = student.nbytes // 4

    def gather() -> object:
        return _both(ops.gather_q(student, ids, impl="fused").sum(), student)

    def loss() -> object:
        given = ops.td_loss(student, teacher, tokens, objective=OBJECTIVE, k=k, impl="fused")
        return _both(given.loss, student)

    return {
        "select_actions": Promise(lambda: ops.select_actions(teacher, k, impl="fused"), rest),
        "gather_q": Promise(gather, student.nbytes + rest),
        "td_loss": Promise(loss, student.nbytes + rest),
    }


def _from_heads(device: torch.device) -> dict[str, Promise]:
    """One chunk of logits of the four that there are, and the gradients."""
    vocab, width, k = 16_384, 32, 64
    rows = 4 * products.CHUNK_ELEMENTS[device.type] // vocab
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, generator=generator, device=device).requires_grad_()
        for n in (rows, vocab)
    )
    tokens = torch.arange(rows, device=device) % vocab
    ids = (tokens[:, None] + torch.arange(k, device=device)) % vocab
    count = torch.full_like(tokens, k, dtype=torch.int32)
    actions = ops.ActionSet(ids.int(), torch.full(ids.shape, -5.0, device=device), count)
    chunk = 4 * products.CHUNK_ELEMENTS[device.type]
    # added up in float32, then given; and sorted slots, weights, log-probabilities of [N, k]
    rest = 2 * (hidden.nbytes + weight.nbytes) + 64 * ids.numel()

    def gather() -> object:
        q = ops.linear_gather_q(hidden, weight, ids, impl="fused")
        return _both(q.sum(), hidden, weight)

    def log_probs() -> object:
        given = ops.linear_log_probs(hidden, weight, ids, impl="fused")
        return _both(given.log_probs.sum(), hidden, weight)

    def loss() -> object:
        options: dict[str, Any] = {"objective": OBJECTIVE, "actions": actions, "impl": "fused"}
        return _both(ops.linear_td_loss(hidden, weight, tokens, **options).loss, hidden, weight)

    def select() -> object:
        return ops.linear_select_actions(hidden, weight, k, impl="fused")

    return {
        "linear_gather_q": Promise(gather, rest),
        "linear_log_probs": Promise(log_probs, chunk + rest),
        "linear_select_actions": Promise(select, chunk + rest),
        "linear_td_loss": Promise(loss, chunk + rest),
    }


def _plain(op: str, device: torch.device) -> Problem:
    """The first case of an op that is of some size."""
    for seed in range(1000):
        problem = SUBJECTS[op](Draw(seed, torch.float32, device))
        if problem.leaves[0].shape[0] > 1 and problem.leaves[-1].numel() > 30:
            return problem
    raise AssertionError(op)


def _compiled(problem: Problem) -> tuple[Tensor, ...]:
    torch._dynamo.reset()

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return problem.call(*leaves, impl="fused")

    return torch.compile(call, fullgraph=True, backend="aot_eager")(*problem.leaves)


def _unwatched(problem: Problem) -> tuple[Tensor, ...]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return problem.call(*problem.leaves, impl="fused")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(problem: Problem) -> tuple[Tensor, ...]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        problem.call(*problem.leaves, impl="fused")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = problem.call(*problem.leaves, impl="fused")
    graph.replay()
    torch.cuda.synchronize()
    return outputs
