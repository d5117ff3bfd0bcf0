"""Rows of a language-model head: values on a set of ids and the log of the rest's mass.

What ``linear_logsumexp``, ``linear_log_probs`` and ``linear_td_loss`` share: logits exist for one
chunk of rows at a time and are computed again in backward.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdkd.kernels.chunks import runs
from tdkd.kernels.student_rows.reference import student_rows
from tdkd.types import Scale, StudentRows, Vocabulary

CHUNK_ELEMENTS = 1 << 24


def row_chunks(rows: int, columns: int, elements: int | None = None) -> Iterator[slice]:
    """Slices over ``rows`` (at least one) that hold at most ``elements`` logits each, or
    ``CHUNK_ELEMENTS``."""
    return runs(rows, max(1, (elements or CHUNK_ELEMENTS) // max(1, columns)))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` in the weight's dtype, whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    vocabulary: Vocabulary | None = None,
) -> StudentRows:
    """``student_rows(hidden @ weight.T + bias, ids)`` over ``hidden [N, H]``, chunk by chunk.

    With a vocabulary only its columns exist, and the rest's mass is its weighted estimate.
    """
    # Cast once, outside the chunks: autograd then sums their head gradients in float32.
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_weight = None
    if vocabulary is not None:
        weight, bias, ids, log_weight = on_vocabulary(vocabulary, weight, bias, ids)
        log_weight = log_weight.to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def part(hidden: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> StudentRows:
        logits = head_logits(hidden, weight, bias)
        return student_rows(logits, ids, scale, log_weight=log_weight)

    parts = [
        checkpoint(
            part,
            hidden[rows],
            ids[rows],
            weight,
            bias,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for rows in row_chunks(hidden.shape[0], weight.shape[0])
    ]
    return StudentRows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def on_vocabulary(
    vocabulary: Vocabulary, weight: Tensor, bias: Tensor | None, ids: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The head of a vocabulary, where ids stand in it, and its log weights."""
    columns = vocabulary.ids.long().clamp(min=0)
    return (
        weight.index_select(0, columns),
        None if bias is None else bias.index_select(0, columns),
        position_in(vocabulary, ids, weight.shape[0]),
        vocabulary.log_weight,
    )


def position_in(vocabulary: Vocabulary, ids: Tensor, size: int) -> Tensor:
    """int64: where each id below ``size`` stands in the vocabulary; -1 where padded."""
    columns = vocabulary.ids.long()
    place = torch.full((size + 1,), -1, dtype=torch.int64, device=ids.device)
    place[torch.where(columns < 0, size, columns)] = torch.arange(
        columns.numel(), device=ids.device
    )
    place[size:].fill_(-1)  # an assignment of a number would wait for a GPU
    return place[torch.where(ids < 0, size, ids.long())]
