"""Cases to test and to time with: what models give, what breaks a kernel, and how to judge one."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdkd.errors import UserError
from tdkd.kernels import backends, select_actions
from tdkd.types import Scale

LOGITS = (
    "random",
    "peaked",
    "ascending",
    "descending",
    "constant",
    "spike",
    "masked",
    "nan",
)

STD = 2.5
"""Spread of ordinary logits, nats; about what language models show."""

LIKELY = (0.6, 0.15, 0.07, 0.03)
"""Typical probabilities of a peaked row's first tokens; the rest of the vocabulary shares 0.15."""


def make_logits(
    kind: str, rows: int, vocab: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Logits ``[rows, vocab]`` on the generator's device.

    ``random`` is normal, ``peaked`` has a few likely tokens a row as a language model has (top-1
    mass near 0.6 whatever V is). The others are hard on a selection: ``ascending`` and
    ``descending`` rows (with ties in low precision), ``constant`` ones, a ``spike`` of one huge
    value in the last column, rows that are all -inf (``masked``), and one ``nan`` a row.

    Args:
        kind: one of ``LOGITS``.
        rows: N, >= 0.
        vocab: V, >= 1.
        dtype: of the result; values are drawn in float32.
        generator: source of randomness.
    Raises:
        UserError: ``kind`` is unknown, or ``vocab`` < 1.
    """
    if kind not in LOGITS:
        raise UserError(f"logits: expected one of {', '.join(LOGITS)}, got {kind}")
    if vocab < 1:
        raise UserError(f"vocab: expected a number >= 1, got {vocab}")
    device = generator.device
    if kind in ("ascending", "descending"):
        ends = (-20.0, 20.0) if kind == "ascending" else (20.0, -20.0)
        row = torch.linspace(*ends, vocab, device=device).to(dtype)
        return row.expand(rows, vocab).contiguous()
    if kind in ("constant", "masked"):
        value = 1.0 if kind == "constant" else -torch.inf
        return torch.full((rows, vocab), value, dtype=dtype, device=device)
    logits = torch.randn(rows, vocab, generator=generator, device=device).mul_(STD)
    if kind == "peaked":
        _raise_likely(logits, generator)
    elif kind == "spike":
        logits[:, -1] = 1e4
    elif kind == "nan":
        column = torch.randint(vocab, (rows, 1), generator=generator, device=device)
        logits.scatter_(1, column, torch.nan)
    return logits.to(dtype)


def _raise_likely(logits: Tensor, generator: torch.Generator) -> None:
    """Lifts a few tokens a row above what the normal ones weigh together."""
    rows, vocab = logits.shape
    count = min(len(LIKELY), vocab)
    # one token of each residue class: distinct, so that scatter_ is deterministic
    ids = torch.randint(vocab // count, (rows, count), generator=generator, device=logits.device)
    ids = ids * count + torch.arange(count, device=logits.device)
    odds = torch.tensor(LIKELY[:count], device=logits.device) / (1 - sum(LIKELY))
    rest = math.log(vocab) + STD**2 / 2  # log of sum exp over V normal logits, in expectation
    jitter = torch.randn(rows, count, generator=generator, device=logits.device).mul_(0.5)
    logits.scatter_(1, ids, rest + odds.log() + jitter)


SCALES = (Scale(), Scale(1.7), Scale(0.6, 5.0, 0.8))
"""A plain head, a temperature, and all three numbers at once."""


def hard_rows(vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Logits ``[14, vocab]``: one row of every kind that once broke a selection."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(14, vocab, generator=generator) * 2.5
    spread = torch.arange(vocab, dtype=torch.float32)
    x[1] = 0.0
    x[2] = spread / 100
    x[3] = -spread / 100
    x[4, vocab // 2 :] = -torch.inf
    x[5] = x[5].round()
    x[6] = -torch.inf
    x[7, vocab // 3] = torch.nan
    x[8, -1] = torch.inf
    x[9] = -3e4
    x[9, -1] = 3e4
    x[10] = torch.where(spread % 2 == 0, 0.0, -0.0)
    x[11] = -torch.inf
    x[11, vocab // 2] = -7.0
    x[12] = spread * (2000.0 / max(vocab, 1)) - 1000.0
    x[13] = x[13] * 1e-40 if dtype == torch.float32 else x[13] * 1e-3
    return x.to(dtype)


class StudentCase(NamedTuple):
    """Six rows of student logits with five ids each, and gradients to send back."""

    logits: Tensor
    ids: Tensor
    state: Tensor
    log_weight: Tensor | None
    grad_z: Tensor
    grad_rest: Tensor


def student_case(vocab: int, dtype: torch.dtype, weighted: bool, seed: int) -> StudentCase:
    """A sure row, one with -inf, one at level 100, a duplicate id, and a row that is no state."""
    generator = torch.Generator().manual_seed(seed)
    rows, k = 6, min(5, vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[1] = -30.0
    logits[1, 0] = 30.0
    logits[2, vocab // 2 :] = -torch.inf
    logits[3] += 100.0
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(rows)])
    ids[0, 0] = -1
    ids[1, 0] = 0
    ids[4, -1] = ids[4, 0]  # a duplicate
    state = torch.ones(rows, dtype=torch.bool)
    state[5] = False
    log_weight = torch.rand(vocab, generator=generator) if weighted else None
    grad_z = torch.randn(rows, k, generator=generator)
    grad_rest = torch.randn(rows, generator=generator)
    return StudentCase(logits.to(dtype), ids, state, log_weight, grad_z, grad_rest)


class HeadCase(NamedTuple):
    """Hidden states, a head with bias, the ids of each position, and gradients to send back."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    grad: Tensor


def head_case(dtype: torch.dtype, width: int, seed: int = 0) -> HeadCase:
    """Twelve positions of nine ids: padding, a duplicate, an id of all positions, none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(60, (12, 9), generator=generator)
    ids[:, 0] = 7
    ids[1, 3:] = -1
    ids[2, 4] = ids[2, 5]
    ids[3] = -1
    draw = [torch.randn(shape, generator=generator) for shape in ((12, width), (60, width), (60,))]
    hidden, weight, bias = (x.to(dtype) for x in draw)
    return HeadCase(hidden, weight, bias, ids, torch.randn(ids.shape, generator=generator))


def memory_events(call: Callable[[], object]) -> list[int]:
    """Bytes of each tensor that a call allocates on CPU (positive) and frees, in order.

    Results are freed after the last event. Scratch of a kernel's own is not among them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _nothing_on_stderr(),
        torch.profiler.profile(
            activities=activities, profile_memory=True, acc_events=True
        ) as profiler,
    ):
        result = call()
    del result
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    return [e["args"]["Bytes"] for e in sorted(memory, key=lambda e: e["ts"])]


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """torch's profiler announces itself there, in C++, and no setting silences it."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that the tensors made in a call take at a time, results included."""
    if device.type == "cpu":
        return max(itertools.accumulate(memory_events(call), initial=0))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def raw_ops(
    device: torch.device | None = None, *, triton: bool | None = None
) -> dict[str, tuple[Any, ...]]:
    """Every operator that the ops call on the device (``triton``: of GPUs, wherever they run), with
    arguments for `opcheck`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, v, grad_z, rest = normal(3, 4, 40), normal(6), normal(3, 4, 5), normal(3, 4)
    ids = torch.randint(40, (3, 4, 5), generator=generator).to(device)
    state = (torch.rand(3, 4, generator=generator) < 0.8).to(device)
    weight = torch.rand(40, generator=generator).to(device)
    successor = torch.tensor([1, 2, -1, 4, -2, -2], device=device)
    few, scale = ids[0].remainder(4), (1.3, 5.0, 0.9)
    backward = (grad_z, rest.double(), x, ids, rest.double(), *scale, None, None)
    on_gpus = {"student_rows_backward_as": (*backward, torch.bfloat16)}
    if triton is None:
        triton = device is not None and device.type == "cuda"
    some = x[0].bfloat16()
    panel = (x[0, :, :20], 0, 40, 5, 0.9, *scale, ids[0, :, 0], state[0])
    panels = select_actions.Panels(x[0], 40, 5)
    on_cpus: dict[str, tuple[Any, ...]] = {}
    on_cpus["select_panel_"] = (*panel, *panels.actions, normal(4, 2, dtype=torch.float64))
    if backends.MULTIPLIES_BFLOAT16:
        on_cpus["product_"] = normal(4, 4), some, some.T, True
    return {
        **(on_gpus if triton else on_cpus),
        "select_actions": (x, 5, 0.9, *scale, ids[..., 0], state),
        "gather_q": (x, ids, *scale),
        "gather_q_backward": (grad_z, x, ids, *scale),
        "student_rows": (x, ids, *scale, weight, state),
        "student_rows_backward": backward,
        "student_rows_backward_": backward,
        "head_products": (x[0], x[1], x[0, 0, :4], few),
        "head_products_backward": (grad_z[0], x[0], x[1], few, True),
        "soft_value": (x,),
        "soft_value_backward": (rest, x),
        "td_target": (v, successor, v, 0.9, 0.5),
        "td_target_backward": (v, successor, 0.9, 0.5),
    }


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within the context, CPU tensors go to the Triton kernels, under Triton's interpreter.

    Raises:
        UserError: TRITON_INTERPRET is not set; Triton reads it when it is imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("device: expected cuda, or TRITON_INTERPRET=1 in the environment, got cpu")
    library = torch.library.Library("tdkd", "IMPL")
    missing, backends.MISSING = backends.MISSING, None
    backends.TRITON.add("cpu")
    try:
        for name, module in backends.TRITON_OPS.items():
            kernel = getattr(importlib.import_module(module), name)
            library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        backends.MISSING = missing
        backends.TRITON.discard("cpu")
        library._destroy()


def ulps(got: Tensor, expected: Tensor, wanted: Tensor) -> float:
    """Largest excess of |got - wanted| over |expected - wanted|, in last places of ``wanted``.

    ``wanted`` is the float64 reference, ``expected`` the reference in the dtype of ``got``; entries
    that are not finite must be equal, and NaN where it is NaN.
    """
    finite = wanted.isfinite()
    odd, odd_wanted = got[~finite].double(), wanted[~finite].double()
    if not ((odd == odd_wanted) | (odd.isnan() & odd_wanted.isnan())).all():
        return math.inf
    got, expected, wanted = (x[finite].double() for x in (got, expected, wanted))
    if not wanted.numel():
        return 0.0
    last = wanted.abs().clamp(min=1.0) * torch.finfo(torch.float32).eps
    return float((((got - wanted).abs() - (expected - wanted).abs()) / last).max())
