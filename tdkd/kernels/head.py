"""Products of hidden states with a head, a chunk of rows at a time, for the fused linear ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkd.kernels.linear_rows.reference import row_chunks

CHUNK_ELEMENTS = {"cpu": 11 << 20, "cuda": 1 << 28}
"""Logits that exist at a time: 44 MiB on CPU; on GPUs enough to keep one busy."""
WIDE_COLUMNS = {"cpu": 1 << 16, "cuda": 1 << 62}
"""Columns beyond which a chunk keeps its rows, and grows. Each chunk adds to the whole gradient of
the head, which costs a CPU more than the products where few rows bring it: at 151,936 columns 176
rows a chunk (102 MiB, of gigabytes that dense logits take) are a fifth faster than 75."""
PANEL_COLUMNS = {"cpu": 2048, "cuda": 1 << 62}
"""Columns of logits that one product makes. The CPU's library is a fifth slower where a chunk has
few rows and the head is whole, and not so where the part of the head that it reads stays cached."""


def chunk_rows(device: torch.device, columns: int) -> int:
    """Rows of one chunk of logits."""
    return max(1, CHUNK_ELEMENTS[device.type] // max(1, min(columns, WIDE_COLUMNS[device.type])))


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices over the rows of ``hidden``, at least one."""
    return row_chunks(hidden.shape[0], 1, chunk_rows(hidden.device, weight.shape[0]))


class Head:
    """A head as products take it, and the room for one chunk of logits, used again and again.

    Products are float32, whatever the dtype of the factors and whatever autocast says. The factors
    are float32 too where they differ in dtype, and on CPU, which has no product of bfloat16
    matrices with a float32 result.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        keep = weight.is_cuda and weight.dtype == hidden.dtype
        self.weight = weight if keep else weight.float()
        self.bias = None if bias is None else bias.float()
        self._room: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden @ weight.T + bias`` of one chunk; it overwrites the chunk before."""
        hidden = hidden.to(self.weight.dtype)
        if self.weight.dtype != torch.float32:
            logits = product(hidden, self.weight.T)
            return logits if self.bias is None else logits.add_(self.bias)
        rows = hidden.shape[0]
        if self._room is None or self._room.shape[0] < rows:
            self._room = hidden.new_empty((rows, self.weight.shape[0]))
        room = self._room[:rows]
        with torch.autocast(hidden.device.type, enabled=False):
            for panel in row_chunks(self.weight.shape[0], 1, PANEL_COLUMNS[hidden.device.type]):
                part, columns = self.weight[panel].T, room[:, panel]
                if self.bias is None:
                    torch.mm(hidden, part, out=columns)
                else:
                    torch.addmm(self.bias[panel], hidden, part, out=columns)
        return room


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32)


class Gradients:
    """Gradients of hidden states and head, added up in float32 from those of chunks of logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        """``wanted``: whether hidden, weight and bias need one; the others stay None."""
        self.hidden = torch.empty_like(hidden, dtype=torch.float32) if wanted[0] else None
        self.weight = torch.empty_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = None
        self._begun = False
        if bias is not None and wanted[2]:
            self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, grad: Tensor, rows: slice, hidden: Tensor, head: Head) -> None:
        """Adds the part of ``rows``, whose logits have the gradient ``grad``."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(head.weight.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            if self.hidden is not None:
                if grad.dtype == torch.float32:
                    torch.mm(grad, head.weight, out=self.hidden[rows])
                else:
                    self.hidden[rows] = product(grad, head.weight)
            if self.weight is not None:
                given, begun = hidden[rows].to(grad.dtype), int(self._begun)
                if grad.dtype == torch.float32:
                    # beta = 0 ignores what was there, which is nothing at first
                    self.weight.addmm_(grad.T, given, beta=begun)
                elif begun:
                    self.weight += product(grad.T, given)
                else:
                    self.weight.copy_(product(grad.T, given))
        self._begun = True

    def result(self, *leaves: Tensor | None, factor: Tensor | None = None) -> list[Tensor | None]:
        """Of the leaves hidden, weight and bias, in their dtypes; times a factor, once."""
        made = []
        if factor is not None and not factor.is_cuda and float(factor) == 1.0:
            factor = None  # spares a pass over the head's gradient
        for grad, leaf in zip((self.hidden, self.weight, self.bias), leaves, strict=True):
            if grad is not None and factor is not None:
                grad.mul_(factor)
            made.append(None if grad is None or leaf is None else grad.to(leaf.dtype))
        return made
