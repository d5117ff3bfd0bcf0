"""linear_gather_q: the definition in plain PyTorch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdkd.kernels.gather_q.reference import scaled
from tdkd.kernels.linear_rows.reference import row_chunks
from tdkd.types import Scale


def linear_gather_q(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: Scale
) -> Tensor:
    """``(hidden @ weight.T + bias).gather(-1, ids)``: only the k head rows of each position."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if not weight.shape[0]:
        return hidden.new_full(ids.shape, -torch.inf, dtype=dtype)
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
