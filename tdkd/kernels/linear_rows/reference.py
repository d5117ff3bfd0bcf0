"""Rows of a language-model head: values on a set of ids and the log of the rest's mass.

What ``linear_gather_q``, ``linear_logsumexp`` and ``linear_td_loss`` share: logits exist for one
chunk of rows at a time and are computed again in backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdkd.kernels.gather_q.reference import gather_q, scaled
from tdkd.kernels.soft_value.reference import soft_value
from tdkd.types import Scale, Vocabulary

CHUNK_ELEMENTS = 1 << 24


class StudentRows(NamedTuple):
    z: Tensor
    """``[N, k]``: scaled logits at the ids; -inf where padded."""
    log_rest: Tensor
    """``[N]``: logsumexp of the scaled logits at every column but the ids."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over ``rows`` (at least one) that hold at most ``CHUNK_ELEMENTS`` logits each."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(rows, start + step))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` in the weight's dtype, whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)


def dense_rows(
    logits: Tensor, ids: Tensor, scale: Scale, log_weight: Tensor | None = None
) -> StudentRows:
    """The reduction itself, over ``logits [N, V]`` and ``ids [N, k]``."""
    z = gather_q(logits, ids, scale)
    rest = scaled(logits, scale)
    if log_weight is not None:
        rest = rest + log_weight
    if rest.shape[-1] and ids.shape[-1]:
        # padded slots point at a spare column
        inside = torch.zeros(
            (*rest.shape[:-1], rest.shape[-1] + 1), dtype=torch.bool, device=rest.device
        ).scatter_(-1, torch.where(ids < 0, rest.shape[-1], ids.long()), True)[..., :-1]
        rest = rest.masked_fill(inside, -torch.inf)
    return StudentRows(z, soft_value(rest))


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    vocabulary: Vocabulary | None = None,
) -> StudentRows:
    """``dense_rows(hidden @ weight.T + bias, ids)`` over ``hidden [N, H]``, chunk by chunk.

    With a vocabulary only its columns exist, and the rest's mass is its weighted estimate.
    """
    # Cast once, outside the chunks: autograd then sums their head gradients in float32.
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_weight = None
    if vocabulary is not None:
        columns = vocabulary.ids.long()
        ids = position_in(vocabulary, ids)
        weight = weight.index_select(0, columns)
        bias = None if bias is None else bias.index_select(0, columns)
        log_weight = vocabulary.log_weight.to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def part(hidden: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> StudentRows:
        return dense_rows(head_logits(hidden, weight, bias), ids, scale, log_weight)

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


def linear_gather_q(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: Scale
) -> Tensor:
    """``(hidden @ weight.T + bias).gather(-1, ids)``: only the k head rows of each position."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def part(hidden: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        picked = ids.long().clamp(min=0)
        with torch.autocast(hidden.device.type, enabled=False):
            z = torch.einsum("nh,nkh->nk", hidden.to(dtype), weight[picked])
        if bias is not None:
            z = z + bias[picked]
        return torch.where(ids < 0, -torch.inf, scaled(z, scale))

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
        for rows in row_chunks(hidden.shape[0], ids.shape[-1] * hidden.shape[-1])
    ]
    return torch.cat(parts)


def position_in(vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    """int64: where each id stands in the vocabulary; -1 where padded."""
    columns = vocabulary.ids.long()
    wanted = ids.long()
    if not columns.numel():
        position = torch.zeros_like(wanted)
        found = torch.zeros_like(wanted, dtype=torch.bool)
    else:
        position = torch.searchsorted(columns, wanted.clamp(min=0)).clamp(max=columns.numel() - 1)
        found = columns[position] == wanted
    if not bool((found | (wanted < 0)).all()):
        missing = wanted[(wanted >= 0) & ~found].flatten()[0].item()
        raise ValueError(
            f"vocabulary: expected every member of the action sets, but id {missing} is not in it"
        )
    return torch.where(wanted < 0, -1, position)
