"""What is measured: cases and suites as data, and the tensors of a case."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdkd.errors import UserError
from tdkd.testing import LOGITS, STD, make_logits

OPS = ("select_actions", "td_loss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROTATED_BYTES = 256 << 20
"""Copies of the inputs together exceed this, so that no call finds its own in a cache."""
MAX_COPIES = 16
"""Cap for tiny cases, whose time is overhead anyway."""
HIDDEN = 576
"""H of both models where a rival starts from hidden states (SmolLM2-135M)."""


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

    @property
    def logits_bytes(self) -> int:
        """Size of one model's logits."""
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.op} {self.rows} x {self.vocab} {self.dtype} k={self.k} {self.logits}"


class Inputs(NamedTuple):
    """The tensors of a case; what an op does not take is None."""

    teacher: Tensor
    """``[N, V]``."""
    student: Tensor | None = None
    """``[N, V]``, requires grad."""
    tokens: Tensor | None = None
    """int64 ``[N]``, in [1, V): 0 is left for padding."""


class LinearInputs(NamedTuple):
    """Hidden states ``[N, H]`` and heads ``[V, H]``; the student's require grad."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    tokens: Tensor


def _select(rows: int, vocab: int, **options: Any) -> Case:
    return Case("select_actions", rows, vocab, **options)


def _td_loss(rows: int, vocab: int, **options: Any) -> Case:
    return Case("td_loss", rows, vocab, top_p=0.8, **options)


# Rows are such that the logits take about 300 MB in float32.
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
}


def choose(suite: str, op: str | None = None, **fields: Sequence[Any]) -> list[Case]:
    """The cases of a suite, with fields replaced.

    Args:
        suite: one of ``SUITES``.
        op: keep the cases of this op alone.
        fields: values that take the place of a field of :class:`Case`, every combination of them;
            an empty sequence leaves the field as it is.
    Raises:
        UserError: a value is unknown or out of range, or the suite has no case of ``op``.
    """
    _known("suite", suite, SUITES)
    if op is not None:
        _known("op", op, OPS)
    given = {name: values for name, values in fields.items() if values}
    for dtype in given.get("dtype", ()):
        _known("dtype", dtype, DTYPES)
    for kind in given.get("logits", ()):
        _known("logits", kind, LOGITS)
    for name, least in (("rows", 1), ("k", 1), ("vocab", 2)):
        for value in given.get(name, ()):
            if value < least:
                raise UserError(f"{name}: expected a number >= {least}, got {value}")
    kept = [case for case in SUITES[suite] if op in (None, case.op)]
    if not kept:
        raise UserError(f"op: expected one of suite {suite}, got {op}")
    replaced = [
        case._replace(**dict(zip(given, values, strict=True)))
        for case in kept
        for values in itertools.product(*given.values())
    ]
    return list(dict.fromkeys(replaced))


def make_inputs(case: Case, seed: int = 0) -> list[Inputs]:
    """Copies of a case's tensors, as many as exceed the caches together."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    shape = case.rows, case.vocab
    first = Inputs(make_logits(case.logits, *shape, dtype, generator))
    size = case.logits_bytes
    if case.op == "td_loss":
        student = make_logits("random", *shape, dtype, generator).requires_grad_()
        tokens = torch.randint(1, case.vocab, (case.rows,), generator=generator)
        first = first._replace(student=student, tokens=tokens)
        size *= 2
    copies = min(MAX_COPIES, -(-ROTATED_BYTES // size))
    return [first, *(_copy(first) for _ in range(copies - 1))]


def make_linear_inputs(case: Case, tokens: Tensor, seed: int = 0) -> LinearInputs:
    """Hidden states and heads whose products spread as ordinary logits do."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(rows: int, std: float) -> Tensor:
        return torch.randn(rows, HIDDEN, generator=generator).mul_(std).to(dtype)

    student, teacher = (
        (normal(case.rows, 1.0), normal(case.vocab, STD / HIDDEN**0.5)) for _ in range(2)
    )
    for tensor in student:
        tensor.requires_grad_()
    return LinearInputs(*student, *teacher, tokens)


def _copy(inputs: Inputs) -> Inputs:
    student = inputs.student
    if student is not None:
        student = student.detach().clone().requires_grad_()
    return inputs._replace(teacher=inputs.teacher.clone(), student=student)


def _known(name: str, value: str, allowed: Sequence[str] | dict[str, Any]) -> None:
    if value not in allowed:
        raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value}")
