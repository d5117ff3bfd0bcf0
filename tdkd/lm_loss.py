"""The LM loss from hidden states and a head, by the best kernel that is installed.

On CUDA: Cut Cross-Entropy in half precision, else Liger. Elsewhere, and where neither is there: our
own op, cross-entropy being a TD loss on sets of one token. ``F.linear_cross_entropy`` is not used:
it holds several chunks of logits at a time, and a second gradient of the head.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdkd import ops
from tdkd.models import Head
from tdkd.objectives import CrossEntropy

logger = logging.getLogger("tdkd")


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
        half = _factors(hidden) in (torch.bfloat16, torch.float16)
        cce = _imported("cut_cross_entropy", "linear_cross_entropy")
        # the release on PyPI (25.1.1) knows no bias; no release takes a float32 backward
        biased = head.bias is None or (cce and "bias" in inspect.signature(cce).parameters)
        if cce and half and biased and torch.cuda.is_bf16_supported():
            _say("Cut Cross-Entropy")
            return _cut_cross_entropy
        if _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
            _say("Liger")
            return _liger
    _say("tdkd.ops")
    return _ops


def _factors(hidden: Tensor) -> torch.dtype:
    """What kernels of others are given: the dtype of autocast where it is on, else the states'."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype


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
    with torch.autocast("cuda", enabled=False):  # operands are what they are to be
        return kernel(scaled, weight, tokens, softcap=head.softcap, reduction="sum", **options)


def _liger(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    kernel = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    assert kernel is not None
    scaled, weight, bias = _folded(hidden, head)
    with torch.autocast("cuda", enabled=False):
        return kernel(
            scaled,
            weight,
            tokens,
            bias=bias,
            softcap=head.softcap,
            reduction="sum",
            accum_dtype=torch.float32,
        )


def _ops(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    taken = tokens.unsqueeze(-1)
    certain = torch.zeros(taken.shape, device=tokens.device)
    return ops.linear_td_loss(
        hidden,
        head.weight,
        tokens,
        actions=ops.ActionSet(taken.int(), certain, torch.ones_like(tokens, dtype=torch.int32)),
        objective=CrossEntropy(tail=True),
        gamma=0.0,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        reduction="sum",
    ).loss


def _folded(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in one dtype, with the logit scale in them."""
    dtype = _factors(hidden)
    bias = None if head.bias is None else head.bias.to(dtype) * head.logit_scale
    return (hidden * head.logit_scale).to(dtype), head.weight.to(dtype), bias
