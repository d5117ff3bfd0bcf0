"""The kernels' backends: which are here, and which tensors they take.

Schemas and fakes live beside each op and need torch alone. On CPU, ``tdkd._C`` is the C++ extension
that ``setup.py`` builds from ``csrc/``, and registers implementations of those schemas when loaded.
On GPUs each op's ``triton.py`` holds them, and is imported at the first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("tdkd", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_MAX_K = 1024
"""The largest sets of the GPU kernels."""
TRITON = {"cuda"}
"""Devices whose kernels are Triton's: they read hidden states in their dtype (the others in
float32), and select from whole rows (the others a panel of columns at a time)."""
TRITON_OPS: dict[str, str] = {}
"""Each of Triton's ops and the module that holds it, filled by :func:`on_gpu`."""

SCHEMA_VERSION = 1
"""Of the operators that the extension implements, as csrc/module.cpp has it."""


def _load() -> str | None:
    """Loads the extension; what is wrong where that is not possible."""
    try:
        importlib.import_module("tdkd._C")
    except ModuleNotFoundError:
        return "the CPU kernels are not built (no C++20 compiler, or an isolated build)"
    except ImportError as error:
        warnings.warn(f"tdkd: the CPU kernels do not load: {error}", stacklevel=2)
        return f"the CPU kernels do not load: {error}"
    version = getattr(torch.ops.tdkd, "schema_version", lambda: 0)
    if version() != SCHEMA_VERSION:
        stale = "the CPU kernels are of an earlier version: build them again"
        warnings.warn(f"tdkd: {stale}", stacklevel=2)
        return stale
    return None


MISSING = _load()
"""Why there are no CPU kernels; None where there are."""

MULTIPLIES_BFLOAT16 = MISSING is None and torch.ops.tdkd.multiplies_bfloat16()
"""Whether the CPU kernels have a product of bfloat16 matrices with a float32 result."""

GPU_MISSING = (
    None if importlib.util.find_spec("triton") else 'Triton is not installed: pip install "triton"'
)
"""Why there are no GPU kernels; None where there are."""


def why_not(*tensors: Tensor, k: int = 1) -> str | None:
    """Why no kernel takes these tensors and sets of ``k``; None where one does."""
    device = tensors[0].device.type
    for x in tensors:
        if x.is_floating_point() and x.dtype not in DTYPES:
            return f"there is no kernel for {str(x.dtype).removeprefix('torch.')}"
    if device == "cpu":
        return MISSING
    if device != "cuda":
        return f"there is no kernel for {device}"
    if k > GPU_MAX_K:
        return f"GPU kernels take sets of at most {GPU_MAX_K}, got {k}"
    return GPU_MISSING


def capability() -> str:
    """The instruction set of the CPU kernels: portable, avx2 or avx512."""
    return torch.ops.tdkd.cpu_capability()


def fake(op: str, function: object) -> None:
    """Registers what an op returns for tensors without data."""
    torch.library.register_fake(f"tdkd::{op}", function, lib=LIBRARY)  # type: ignore[arg-type]


def on_gpu(package: str, *ops: str) -> None:
    """Registers the functions of ``<package>.triton`` named as the ops; imported at a call."""
    for op in ops:
        TRITON_OPS[op] = f"{package}.triton"
        LIBRARY.impl(op, _later(TRITON_OPS[op], op), "CUDA")


def _later(module: str, function: str) -> object:
    def call(*arguments: object) -> object:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


class _Once(torch.autograd.Function):
    """Gradients that have no gradient of their own."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The first ``count`` are the gradients; the others, what they depend on."""
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            "tdkd: the kernels have no second gradients, got a graph that was made with "
            'create_graph=True and is differentiated again; impl="reference" has them'
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a second differentiation fail, whatever it is by: of what a gradient depends on, all
    that has a graph is saved.

    torch's decorator of that name does so only where the incoming gradient has a graph; elsewhere
    it leaves the second gradient out, and a penalty on gradients would do nothing.
    """

    @wraps(backward)
    def once(ctx: Any, *incoming: Tensor | None) -> Any:
        with torch.no_grad():
            made = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return made
        several = isinstance(made, tuple)
        leaves = [
            x.detach().requires_grad_() if isinstance(x, Tensor) else x
            for x in (made if several else (made,))
        ]
        held = _Once.apply(len(leaves), *leaves, *incoming, *ctx.saved_tensors)
        return held if several else held[0]

    return once
