"""The LM loss from hidden states and a head, by the best kernel that is installed.

On CUDA: Cut Cross-Entropy in half precision, else Liger. Elsewhere, and where neither fits:
``F.linear_cross_entropy``, or with a softcap (or before torch 2.13) our own ops, in chunks of rows.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdkd import ops
from tdkd.models import Head

logger = logging.getLogger("tdkd")

# Rows of logits that the loss holds at a time, where no kernel does without.
LM_ROWS = 256


def lm_cross_entropy(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """Summed ``F.cross_entropy`` of the head's logits, without all of them in memory.

    Args:
        hidden: last hidden states ``(N, H)``.
        head: the student's.
        tokens: taken tokens ``(N,)``, int64.
    """
    return _kernel(hidden, head)(hidden, head, tokens)


def _kernel(hidden: Tensor, head: Head) -> Callable[[Tensor, Head, Tensor], Tensor]:
    if hidden.is_cuda and hidden.shape[0] and hidden.dtype != torch.float64:
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        cce = _imported("cut_cross_entropy", "linear_cross_entropy")
        # the release on PyPI (25.1.1) knows no bias; no release takes a float32 backward
        biased = head.bias is None or (cce and "bias" in inspect.signature(cce).parameters)
        if cce and half and biased and torch.cuda.is_bf16_supported():
            _say("Cut Cross-Entropy")
            return _cut_cross_entropy
        if _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
            _say("Liger")
            return _liger
    if hasattr(F, "linear_cross_entropy") and head.softcap is None:
        _say("torch.nn.functional.linear_cross_entropy")
        return _torch
    _say("tdkd.ops")
    return _ops


@cache
def _imported(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


@cache
def _say(kernel: str) -> None:
    logger.info("LM loss: %s", kernel)


def _cut_cross_entropy(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    kernel = _imported("cut_cross_entropy", "linear_cross_entropy")
    assert kernel is not None
    known = inspect.signature(kernel).parameters
    wanted = {"accum_e_fp32": True, "accum_c_fp32": True}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    scaled, weight, bias = _folded(hidden, head)
    if bias is not None:
        options["bias"] = bias
    return kernel(scaled, weight, tokens, softcap=head.softcap, reduction="sum", **options)


def _liger(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    kernel = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    assert kernel is not None
    scaled, weight, bias = _folded(hidden, head)
    return kernel(
        scaled,
        weight,
        tokens,
        bias=bias,
        softcap=head.softcap,
        reduction="sum",
        accum_dtype=torch.float32,
    )


def _torch(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    def part(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
        # torch's own chunks (LinearCrossEntropyOptions) took 7 s where this takes 1.3: 512 rows,
        # V = 49,152, 2 CPU cores, torch 2.13
        scaled, weight, bias = _folded(hidden, head)
        return F.linear_cross_entropy(scaled, weight, tokens, linear_bias=bias, reduction="sum")

    return _in_chunks(part, hidden, head, tokens)


def _ops(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    def part(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "bias": head.bias,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
        }
        q = ops.linear_gather_q(hidden, head.weight, tokens.unsqueeze(-1), **options)
        return (ops.linear_logsumexp(hidden, head.weight, **options) - q.squeeze(-1)).sum()

    return _in_chunks(part, hidden, head, tokens)


def _folded(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in the dtype of ``hidden``, with the logit scale in them."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype) * head.logit_scale
    return hidden * head.logit_scale, head.weight.to(hidden.dtype), bias


def _in_chunks(
    part: Callable[[Tensor, Head, Tensor], Tensor], hidden: Tensor, head: Head, tokens: Tensor
) -> Tensor:
    """``LM_ROWS`` rows at a time, computed again in backward."""
    # cast once, so that the chunks' head gradients add up in float32
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    head = head._replace(weight=head.weight.to(dtype), bias=bias)
    parts = [
        checkpoint(part, rows.to(dtype), head, taken, use_reentrant=False)
        for rows, taken in zip(hidden.split(LM_ROWS), tokens.split(LM_ROWS), strict=True)
    ]
    return torch.stack(parts).sum()
