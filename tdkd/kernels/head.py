"""Products of hidden states with a head, a chunk of rows at a time, for the fused linear ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkd.kernels.linear_rows.reference import row_chunks

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits that exist at a time: 32 MB on CPU, twice in backward; on GPUs enough to keep one busy."""


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices over the rows of ``hidden``, at least one."""
    return row_chunks(hidden.shape[0], weight.shape[0], CHUNK_ELEMENTS[hidden.device.type])


def factor(weight: Tensor, hidden: Tensor) -> Tensor:
    """A head as a product takes it: float32 where the factors differ in dtype, and on CPU, which
    has no product of bfloat16 matrices with a float32 result."""
    return weight if weight.is_cuda and weight.dtype == hidden.dtype else weight.float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, whatever the dtype of the factors and whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` in float32; ``weight`` is a :func:`factor`."""
    logits = product(hidden.to(weight.dtype), weight.T)
    return logits if bias is None else logits.add_(bias)
