"""Logits to test and to time with: what models give, and what breaks a selection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdkd.errors import UserError

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
