"""Products of hidden states with a head, a part of them at a time, for the fused linear ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkd.kernels import backends
from tdkd.kernels.backends import LIBRARY, fake
from tdkd.kernels.chunks import runs

LIBRARY.define("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")
fake("product_", lambda out, a, b, add: None)

CHUNK_ELEMENTS = {"cpu": 12 << 20, "cuda": 1 << 28}
"""Logits that exist at a time: 48 MiB on CPU, 256 rows of 49,152, which the library takes a
twentieth faster than 234; on GPUs enough to keep one busy."""
WIDE_COLUMNS = {"cpu": 1 << 16, "cuda": 1 << 62}
"""Columns beyond which a chunk keeps its rows, and grows. Each chunk adds to the whole gradient of
the head, which costs a CPU more than the products where few rows bring it: at 151,936 columns 192
rows a chunk (111 MiB, of gigabytes that dense logits take) are a fifth faster than 75."""
PANEL_COLUMNS = {"cpu": 2048, "cuda": 1 << 62}
"""Columns of logits that one product of float32 makes. The CPU's library is a fifth slower where a
chunk has few rows and the head is whole, and not so where what it reads of that stays cached."""

TILE_ROWS = 4096
"""Rows of a tile of few columns, which has as many elements as a chunk; fewer where there are."""


def chunk_rows(device: torch.device, columns: int) -> int:
    """Rows of one chunk of logits."""
    return max(1, CHUNK_ELEMENTS[device.type] // max(1, min(columns, WIDE_COLUMNS[device.type])))


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices over the rows of ``hidden``, at least one."""
    return runs(hidden.shape[0], chunk_rows(hidden.device, weight.shape[0]))


def tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices over rows and columns of the logits, for what needs no row of them at once.

    On CPUs few columns of many rows: the library lays a head's columns out anew for each product,
    and so does so once. Elsewhere chunks of whole rows. Rows and columns ascend, rows faster.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    if hidden.device.type not in backends.TRITON:
        height = max(1, min(rows, TILE_ROWS))
        panels = -(-columns // max(1, CHUNK_ELEMENTS[hidden.device.type] // height))
        width = -(-columns // max(1, panels))
    else:
        height, width = chunk_rows(hidden.device, columns), columns
    for panel in runs(columns, max(1, width)):
        for some in runs(rows, height):
            yield some, panel


def within(ids: Tensor, columns: slice, size: int) -> Tensor:
    """Where ids stand in a slice of ``size`` columns; -1 where they do not."""
    if columns.stop - columns.start == size:
        return ids
    return torch.where((ids >= columns.start) & (ids < columns.stop), ids - columns.start, -1)


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a product with a head takes its factors, here and now. Backward, which
    runs outside of autocast, must be told what forward took."""
    device = weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return factors_of(device, hidden.dtype, weight.dtype, autocast)


def factors_of(
    device: str, hidden: torch.dtype, weight: torch.dtype, autocast: torch.dtype | None
) -> torch.dtype:
    """The dtype of autocast where it is on, and without it that of the operands where they share
    one; float32 where the device has no product of it with a float32 result. CPUs have that of
    bfloat16 with AVX512-BF16 or AMX, as long as nobody has switched oneDNN off."""
    wanted = autocast or (weight if weight == hidden else torch.float32)
    if device == "cpu" and wanted == torch.bfloat16:
        able = backends.MULTIPLIES_BFLOAT16 and torch.backends.mkldnn.enabled
    else:
        able = device == "cuda"
    return wanted if able else torch.float32


class Head:
    """A head as products take it, and the room for one chunk of logits, used again and again.

    Products are float32, whatever the dtype of the factors and whatever autocast says.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, factors: torch.dtype) -> None:
        """``factors``: of :func:`factor_dtype`; a head of another dtype is copied."""
        self.weight = weight.to(factors)
        self.bias = None if bias is None else bias.float()
        self._room: Tensor | None = None
        self._narrow: Tensor | None = None

    def logits(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """``hidden @ weight.T + bias`` of one chunk; it overwrites the chunk before."""
        columns = slice(None) if columns is None else columns  # torch 2.11 compiles no such default
        weight, hidden = self.weight[columns], hidden.to(self.weight.dtype)
        bias = None if self.bias is None else self.bias[columns]
        shape = hidden.shape[0], weight.shape[0]
        size = shape[0] * shape[1]
        if self._room is None or self._room.numel() < size:
            self._room = hidden.new_empty(size, dtype=torch.float32)
        room = self._room[:size].view(shape)
        width = PANEL_COLUMNS[hidden.device.type] if hidden.dtype == torch.float32 else shape[1]
        for panel in runs(shape[1], max(1, width)):
            out = room[:, panel]
            if bias is not None:
                out.copy_(bias[panel])
            product_(out, hidden, weight[panel].T, add=bias is not None)
        return room

    def narrow(self, grad: Tensor) -> Tensor:
        """The gradient of a chunk's logits in the dtype of the factors; it overwrites the one
        before."""
        if grad.dtype == self.weight.dtype:
            return grad
        if self._narrow is None or self._narrow.numel() < grad.numel():
            self._narrow = grad.new_empty(grad.numel(), dtype=self.weight.dtype)
        return self._narrow[: grad.numel()].view(grad.shape).copy_(grad)


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``: float32, with no tensor of its size beside it."""
    with torch.autocast(out.device.type, enabled=False):
        if a.dtype == torch.float32:
            out.addmm_(a, b, beta=int(add))  # beta = 0 ignores what was there
        elif out.device.type == "cpu" and not torch.backends.mkldnn.enabled:  # since forward
            out.addmm_(a.float(), b.float(), beta=int(add))
        elif out.device.type == "cpu":
            torch.ops.tdkd.product_(out, a, b, add)
        elif torch.compiler.is_compiling():
            # inductor knows no addmm whose result is wider than its factors (pytorch issue 163880)
            made = torch.mm(a, b, out_dtype=torch.float32)
            if add:
                out += made
            else:
                out.copy_(made)
        elif add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)


class Gradients:
    """Gradients of hidden states and head, added up in float32 from those of tiles of logits, which
    come in order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, ...],
        *,
        scaled_later: bool = False,
    ) -> None:
        """``wanted``: whether hidden, weight and bias need one; the others stay None.

        The head's is rounded to its dtype panel by panel, unless a factor is to come.
        """
        self.hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if wanted[0] else None
        dtype = torch.float32 if scaled_later else weight.dtype
        self.weight = weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else None
        self._total: Tensor | None = None  # of the columns whose rows come
        self.bias = None
        if bias is not None and wanted[2]:
            self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def takes(self, head: Head) -> torch.dtype:
        """In which dtype :meth:`add` has use for the gradient of a chunk's logits: that of the
        products, but a bias sums it as it is."""
        return head.weight.dtype if self.bias is None else torch.float32

    def add(
        self,
        grad: Tensor,
        hidden: Tensor,
        head: Head,
        rows: slice,
        columns: slice | None = None,
    ) -> None:
        """Adds the part of a tile, whose logits have the gradient ``grad``."""
        columns = slice(0, None) if columns is None else columns
        if self.bias is not None:
            self.bias[columns] += grad.sum(0)
        grad = head.narrow(grad)
        if self.hidden is not None:
            product_(self.hidden[rows], grad, head.weight[columns], add=columns.start > 0)
        if self.weight is not None:
            out, total = self.weight[columns], self._total
            if total is None:  # the first rows of these columns
                narrow = out.dtype != torch.float32
                total = torch.empty_like(out, dtype=torch.float32) if narrow else out
            product_(total, grad.T, hidden[rows].to(grad.dtype), add=rows.start > 0)
            self._total = total
            if rows.stop == hidden.shape[0]:
                if total.dtype != out.dtype:
                    out.copy_(total)
                self._total = None

    def result(self, *leaves: Tensor | None, factor: Tensor | None = None) -> list[Tensor | None]:
        """Of the leaves hidden, weight and bias, in their dtypes; times a factor, once."""
        made: list[Tensor | None] = []
        if factor is not None and not factor.is_cuda and float(factor) == 1.0:
            factor = None  # spares a pass over the head's gradient
        for grad, leaf in zip((self.hidden, self.weight, self.bias), leaves, strict=True):
            if grad is None or leaf is None:
                made.append(None)
            elif factor is None:
                made.append(grad.to(leaf.dtype))
            else:  # in one pass, and in place where that is possible
                out = grad if grad.dtype == leaf.dtype else torch.empty_like(leaf)
                made.append(torch.mul(grad, factor, out=out))
        return made
