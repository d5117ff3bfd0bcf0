"""What is measured: cases and suites as data, and the tensors of a case."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdkd.errors import UserError
from tdkd.testing import LOGITS, STD, make_logits

FIELDS = {
    "select_actions": ("rows", "vocab", "k", "dtype", "logits"),
    "td_loss": ("rows", "vocab", "k", "dtype", "logits"),
    "gather_q": ("rows", "vocab", "k", "dtype"),
    "linear_gather_q": ("rows", "vocab", "k", "dtype"),
    "linear_td_loss": ("rows", "vocab", "k", "dtype", "sets"),
    "linear_log_probs": ("rows", "vocab", "k", "dtype", "sets"),
    "linear_select_actions": ("rows", "vocab", "k", "dtype"),
    "linear_cross_entropy": ("rows", "vocab", "dtype"),
    "soft_value": ("rows", "k"),
    "td_target": ("rows",),
}
"""The ops, and which fields of a case each has a use for. ``linear_cross_entropy`` is the LM loss
of ``tdkd.lm_loss``."""
OPS = tuple(FIELDS)
DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SET_SOURCES = ("real", "random")
"""Where action sets come from, if not from a file."""

ROTATED_BYTES = 256 << 20
"""Copies of the inputs together exceed this, so that no call finds its own in a cache."""
MAX_COPIES = 16
"""Cap for tiny cases, whose time is overhead anyway."""
HIDDEN = 576
"""H of SmolLM2-135M."""


class Case(NamedTuple):
    """One op at one size."""

    op: str
    rows: int
    vocab: int
    k: int = 64
    top_p: float = 1.0
    dtype: str = "float32"
    logits: str = "peaked"
    """kind of the teacher's logits; the student's are random."""
    device: str = "cpu"
    sets: str = "real"
    """the action sets where the teacher is not live: those of a real one, ``random``, or a file of
    them (:func:`tdkd.benchmark.linear.action_sets`)."""
    hidden: int = HIDDEN
    """H of both models where an op or a rival starts from hidden states."""
    compiled: bool = True
    """whether rivals that need a compiler, which takes its time, are timed."""
    autocast: str | None = None
    """dtype of autocast, in which whatever starts from hidden states runs forward."""

    def mixed(self) -> contextlib.AbstractContextManager[object]:
        """The context of ``autocast``."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, DTYPES[self.autocast])

    ways: bool = False
    """the rivals are the ways that ``tdkd.kernels.routes`` chooses from, each forced."""

    @property
    def main_bytes(self) -> int:
        """Size of what an op reads: one model's logits, a head, Q-values, or values."""
        if self.op == "td_target":
            return 4 * self.rows
        if self.op == "soft_value":
            return 4 * self.rows * self.k
        if self.op.startswith("linear"):
            return self.vocab * self.hidden * DTYPES[self.dtype].itemsize
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.op} {describe(self._asdict())}"


def describe(case: dict[str, Any]) -> str:
    """The fields that count, in words: of a case, or of one in a run's JSON."""
    fields = FIELDS[case["op"]]
    words = [f"{case['rows']} x {case['vocab']}" if "vocab" in fields else f"{case['rows']}"]
    for field in ("dtype", "k", "logits", "sets"):
        if field in fields:
            words.append(f"k={case['k']}" if field == "k" else Path(str(case[field])).name)
    if case["op"].startswith("linear") and case["hidden"] != HIDDEN:
        words.append(f"H={case['hidden']}")
    if case.get("autocast"):
        words.append(f"under {case['autocast']} autocast")
    return " ".join(words)


class Skip(Exception):
    """Why a rival is not timed."""


class Inputs(NamedTuple):
    """The tensors of a case; what an op does not take is None."""

    main: Tensor
    """the tensor of ``Case.main_bytes``: the teacher's logits for ``select_actions`` and
    ``td_loss``, the student's for ``gather_q``, its head for ``linear_gather_q``, Q-values, or
    values."""
    student: Tensor | None = None
    """``[N, V]`` logits, or ``[N, H]`` hidden states for ``linear_gather_q``; requires grad."""
    tokens: Tensor | None = None
    """int64 ``[N]``, in [1, V): 0 is left for padding."""
    ids: Tensor | None = None
    """int32 ``[N, k]``, distinct in each row."""
    grad: Tensor | None = None
    """gradient of the op's result."""
    successor: Tensor | None = None
    """int64 ``[N]``: the next row; the last one is terminal."""


Run = Callable[[Inputs], Any]
"""A rival, ready for a case."""


class LinearInputs(NamedTuple):
    """Hidden states ``[N, H]`` and heads ``[V, H]``; the student's require grad."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    tokens: Tensor


_select = partial(Case, "select_actions")
_td_loss = partial(Case, "td_loss", top_p=0.8)
_gather_q = partial(Case, "gather_q")
_soft_value = partial(Case, "soft_value", vocab=0)
_td_target = partial(Case, "td_target", vocab=0)
_linear_gather_q = partial(Case, "linear_gather_q")
_linear_td_loss = partial(Case, "linear_td_loss")
_linear_log_probs = partial(Case, "linear_log_probs")
_linear_select = partial(Case, "linear_select_actions", top_p=0.8)
_linear_cross_entropy = partial(Case, "linear_cross_entropy")


def _ways(op: Callable[..., Case], rows: int, vocab: int, k: int, **options: Any) -> Case:
    return op(rows, vocab, k=k, ways=True, compiled=False, **options)


# Rows of the suites for CPUs are such that the logits take about 300 MB in float32.
SUITES: dict[str, list[Case]] = {
    "quick": [
        _select(512, 151_936),
        _select(512, 151_936, dtype="bfloat16"),
        _td_loss(512, 49_152),
    ],
    "cpu": [
        _select(2048, 32_000),
        _select(1536, 49_152),
        _select(512, 128_256),
        _select(512, 151_936),
        _select(256, 262_144),
        _select(512, 151_936, dtype="bfloat16"),
        _select(512, 151_936, dtype="float16"),
        _select(512, 151_936, k=8),
        _select(512, 151_936, k=256),
        _select(512, 151_936, k=1024),
        _select(512, 151_936, logits="random"),
        _td_loss(512, 49_152),
        _td_loss(512, 49_152, dtype="bfloat16"),
        _td_loss(128, 151_936),
    ],
    "adversarial": [
        _select(512, 49_152, logits=kind) for kind in LOGITS if kind not in ("random", "peaked")
    ],
    "head": [
        _linear_gather_q(2048, 49_152),
        _linear_gather_q(2048, 49_152, k=16),
        _linear_gather_q(2048, 49_152, k=256),
        _linear_gather_q(2048, 49_152, dtype="bfloat16"),
        _linear_gather_q(1024, 151_936),
    ],
    "linear": [
        _linear_td_loss(2048, 49_152),
        _linear_td_loss(2048, 49_152, sets="random"),
        _linear_td_loss(2048, 151_936, compiled=False),
        _linear_td_loss(2048, 151_936, sets="random", compiled=False),
        _linear_log_probs(2048, 49_152),
        _linear_select(2048, 49_152),
        _linear_cross_entropy(2048, 49_152),
        _linear_cross_entropy(512, 49_152),
        _linear_td_loss(2048, 49_152, dtype="bfloat16", compiled=False),
    ],
    # where the rule of tdkd.kernels.routes changes its mind, on either side: M / V and k near their
    # bounds there
    "routes": [
        _ways(_linear_td_loss, rows, vocab, k, sets="random", **options)
        for rows, vocab, ks, options in (
            (1024, 49_152, (16, 64, 80, 128), {}),
            (512, 151_936, (64, 448), {}),
            (256, 49_152, (64, 256, 320), {"hidden": 2048}),
            (64, 49_152, (64, 256, 1024), {}),
            (512, 49_152, (64, 144), {"dtype": "bfloat16"}),
        )
        for k in ks
    ]
    + [
        _ways(_linear_gather_q, rows, vocab, k, **options)
        for rows, vocab, ks, options in (
            (1024, 2_000, (125, 250, 500), {}),
            (1024, 8_000, (250, 500, 1000), {}),
            (512, 32_000, (1000, 2000, 4000), {}),
            (256, 151_936, (2000, 6000), {}),
            (128, 49_152, (600, 2400), {"hidden": 2048}),
            (16, 49_152, (256, 2000, 4000), {}),
            (512, 49_152, (1000, 3000), {"dtype": "bfloat16"}),
        )
        for k in ks
    ],
    # the same of k head rows and sampled columns, which together cost what all columns do there
    "sampled": [
        _ways(_linear_td_loss, rows, vocab, k, sets="random", **options)
        for rows, vocab, ks, options in (
            (1024, 4_000, (64, 400, 700), {}),
            (512, 8_000, (250, 700, 1100), {}),
            (512, 32_000, (1000, 1900, 2600), {}),
            (128, 49_152, (600, 2800), {"hidden": 2048}),
            (16, 49_152, (64, 2000, 3500), {}),
            (64, 49_152, (64, 2000, 3500), {}),
            (512, 49_152, (500, 1500, 2000), {"dtype": "bfloat16"}),
        )
        for k in ks
    ],
    "small": [
        _gather_q(512, 49_152),
        _soft_value(8192),
        _td_target(8192),
    ],
    # The most important first, for a budget may end it. A compiler takes its time: a few cases.
    "gpu": [
        _select(8192, 151_936, dtype="bfloat16"),
        _td_loss(8192, 151_936, dtype="bfloat16"),
        # Liger's shape, then Qwen2.5's vocabulary: both heads, loss and gradients
        _linear_td_loss(8192, 128_256, hidden=4096, dtype="bfloat16"),
        _linear_td_loss(8192, 151_936, hidden=3584, dtype="bfloat16", compiled=False),
        # float32 weights in mixed precision, as trainers keep them
        _linear_td_loss(8192, 151_936, hidden=3584, autocast="bfloat16", compiled=False),
        _linear_select(8192, 151_936, hidden=3584, dtype="bfloat16", compiled=False),
        # with a frozen head too; a call of nine minutes has not come to these yet
        _linear_log_probs(8192, 151_936, hidden=3584, dtype="bfloat16", compiled=False),
        _linear_gather_q(8192, 151_936, hidden=3584, dtype="bfloat16", compiled=False),
        _select(8192, 128_256, dtype="bfloat16", compiled=False),
        _select(32_768, 32_000, dtype="bfloat16", compiled=False),
        _select(4096, 262_144, dtype="bfloat16", compiled=False),
        _select(2048, 151_936),
        _td_loss(2048, 49_152),
        _td_loss(4096, 128_256, dtype="bfloat16", compiled=False),
        _select(1, 151_936, dtype="bfloat16", compiled=False),
        _select(8, 151_936, dtype="bfloat16", compiled=False),
        _select(64, 151_936, dtype="bfloat16", compiled=False),
        _select(8192, 151_936, k=8, dtype="bfloat16", compiled=False),
        _select(8192, 151_936, k=256, dtype="bfloat16", compiled=False),
        _select(8192, 151_936, k=1024, dtype="bfloat16", compiled=False),
        _gather_q(8192, 151_936, dtype="bfloat16"),
        _soft_value(8192),
        _td_target(8192),
        _select(8192, 151_936, dtype="bfloat16", logits="random", compiled=False),
        _td_loss(8192, 151_936, dtype="bfloat16", logits="random", compiled=False),
        _soft_value(8192, k=1024, compiled=False),
    ],
    # `routes` and `sampled` on a GPU: either side of its bounds on k / V and on M / V
    "gpu-routes": [
        _ways(op, rows, 151_936, k, sets="random", hidden=3584, dtype="bfloat16")
        for op, rows, ks in (
            (_linear_gather_q, 8192, (64, 380, 760, 1520, 3040)),
            (_linear_td_loss, 8192, (4, 16, 64, 380, 760, 1000)),
            (_linear_gather_q, 512, (64, 760, 3040)),
            (_linear_td_loss, 512, (64, 700, 1000)),
        )
        for k in ks
    ],
}


def choose(
    suite: str, op: str | None = None, *, device: str = "cpu", **fields: Sequence[Any]
) -> list[Case]:
    """The cases of a suite, with fields replaced.

    Args:
        suite: one of ``SUITES``.
        op: keep the cases of this op alone.
        device: cpu or cuda, which must be there.
        fields: values that take the place of a field of :class:`Case`, every combination of them;
            an empty sequence leaves the field as it is, and so does an op that has no use for it.
    Raises:
        UserError: a value is unknown or out of range, or the suite has no case of ``op``.
    """
    _known("suite", suite, SUITES)
    if op is not None:
        _known("op", op, OPS)
    _known("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected cpu, for torch sees no GPU here, got cuda")
    given = {name: values for name, values in fields.items() if values}
    for dtype in given.get("dtype", ()):
        _known("dtype", dtype, DTYPES)
    for kind in given.get("logits", ()):
        _known("logits", kind, LOGITS)
    for sets in given.get("sets", ()):
        if sets not in SET_SOURCES:
            read_sets(Path(sets))
    for name, least in (("rows", 1), ("k", 1), ("vocab", 2)):
        for value in given.get(name, ()):
            if value < least:
                raise UserError(f"{name}: expected a number >= {least}, got {value}")
    kept = [case for case in SUITES[suite] if op in (None, case.op)]
    if not kept:
        raise UserError(f"op: expected one of suite {suite}, got {op}")
    replaced = []
    for case in kept:
        used = {name: values for name, values in given.items() if name in FIELDS[case.op]}
        for values in itertools.product(*used.values()):
            fields_of = dict(zip(used, values, strict=True))
            replaced.append(case._replace(device=device, **fields_of))
    unique: dict[Case, Case] = {}
    for case in replaced:
        unique.setdefault(case._replace(compiled=True), case)
    return list(unique.values())


def read_sets(path: Path) -> dict[str, Tensor]:
    """Sets as ``benchmarks/real_sets.py`` writes them.

    Returns:
        int64 ``members`` ``[M]``, all sets one after the other; ``count`` ``[N]`` of each, and
        ``tokens`` ``[N]``, the one that was taken.
    Raises:
        UserError: there is no such file, or it holds something else.
    """
    import numpy as np

    names = ("members", "count", "tokens")
    try:
        with np.load(path) as kept:
            return {name: torch.from_numpy(kept[name].astype(np.int64)) for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"sets: expected real, random, or an npz of {', '.join(names)}, got {path}: {error}"
        ) from error


def make_inputs(case: Case) -> list[Inputs]:
    """Copies of a case's tensors, as many as exceed the caches together."""
    first = _inputs(case, make_generator(case))
    size = sum(x.nbytes for x in (first.main, first.student) if x is not None)
    copies = min(MAX_COPIES, -(-ROTATED_BYTES // size))
    return [first, *(_copy(first) for _ in range(copies - 1))]


def make_generator(case: Case) -> torch.Generator:
    """Source of randomness on the case's device."""
    return torch.Generator(case.device).manual_seed(0)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    device, rows, vocab = generator.device, case.rows, case.vocab
    dtype = DTYPES[case.dtype]
    if case.op.startswith("linear") and case.op != "linear_gather_q":
        # their rivals make their own, the same in every call, being many products to one byte
        return Inputs(torch.randn(vocab, case.hidden, generator=generator, device=device).to(dtype))
    if case.op == "td_target":
        successor = torch.arange(1, rows + 1, device=device)
        successor[-1] = -1
        values = torch.randn(rows, generator=generator, device=device)
        return Inputs(values, successor=successor)
    if case.op == "soft_value":
        q = torch.randn(rows, case.k, generator=generator, device=device).mul_(STD)
        grad = torch.randn(rows, generator=generator, device=device)
        return Inputs(q.requires_grad_(), grad=grad)
    if case.op in ("gather_q", "linear_gather_q"):
        k = min(case.k, vocab)
        # one id of each of k ranges: distinct
        ids = torch.randint(vocab // k, (rows, k), generator=generator, device=device)
        ids = (ids + torch.arange(k, device=device) * (vocab // k)).int()
        grad = torch.randn(rows, k, generator=generator, device=device)
        if case.op == "linear_gather_q":
            given = make_linear_inputs(case)
            return Inputs(given.student_weight, given.student, ids=ids, grad=grad)
        logits = make_logits("random", rows, vocab, dtype, generator).requires_grad_()
        return Inputs(logits, ids=ids, grad=grad)
    teacher = make_logits(case.logits, rows, vocab, dtype, generator)
    if case.op == "select_actions":
        return Inputs(teacher)
    student = make_logits("random", rows, vocab, dtype, generator).requires_grad_()
    tokens = torch.randint(1, vocab, (rows,), generator=generator, device=device)
    return Inputs(teacher, student, tokens)


def make_linear_inputs(case: Case) -> LinearInputs:
    """Hidden states and heads whose products spread as ordinary logits do."""
    generator = make_generator(case)
    device, dtype = generator.device, DTYPES[case.dtype]
    tokens = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)

    def normal(rows: int, std: float) -> Tensor:
        return (
            torch.randn(rows, case.hidden, generator=generator, device=device).mul_(std).to(dtype)
        )

    student, teacher = (
        (normal(case.rows, 1.0), normal(case.vocab, STD / case.hidden**0.5)) for _ in range(2)
    )
    for tensor in student:
        tensor.requires_grad_()
    return LinearInputs(*student, *teacher, tokens)


def _copy(inputs: Inputs) -> Inputs:
    def apart(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    student = None if inputs.student is None else apart(inputs.student)
    return inputs._replace(main=apart(inputs.main), student=student)


def _known(name: str, value: str, allowed: Sequence[str] | dict[str, Any]) -> None:
    if value not in allowed:
        raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value}")
