"""soft_value: the definition in plain PyTorch."""

import torch
from torch import Tensor


def soft_value(q: Tensor) -> Tensor:
    """``logsumexp(q, -1)`` that is -inf, with a zero gradient, where a row holds nothing finite."""
    peak = q.detach().amax(-1, keepdim=True) if q.shape[-1] else q.new_zeros((*q.shape[:-1], 1))
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    total = (q - peak).exp().sum(-1)
    # log only sees positive numbers, so that an empty row sends no NaN backward
    log_total = torch.where(total > 0, total, 1.0).log()
    return torch.where(total == 0, -torch.inf, log_total + peak.squeeze(-1))
