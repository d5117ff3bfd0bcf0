"""gather_q: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.types import Scale


def scaled(logits: Tensor, scale: Scale) -> Tensor:
    """The logits that a head means, in float32 or better: scale, then softcap, then temperature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale.logit_scale != 1.0:
        logits = logits * scale.logit_scale
    if scale.softcap is not None:
        capped = scale.softcap * torch.tanh(logits / scale.softcap)
        # a masked column stays masked
        logits = torch.where(logits == -torch.inf, -torch.inf, capped)
    return logits / scale.temperature if scale.temperature != 1.0 else logits


def gather_q(logits: Tensor, ids: Tensor, scale: Scale) -> Tensor:
    """``logits.gather(-1, ids) / temperature``, -inf where ``ids < 0``."""
    if not logits.shape[-1]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.new_full(ids.shape, -torch.inf, dtype=dtype)
    picked = logits.gather(-1, ids.long().clamp(min=0))
    return torch.where(ids < 0, -torch.inf, scaled(picked, scale))
