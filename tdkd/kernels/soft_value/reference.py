"""soft_value: the definition in plain PyTorch."""

import torch
from torch import Tensor


def soft_value(q: Tensor) -> Tensor:
    """``logsumexp(q, -1)`` that is -inf, with a zero gradient, where a row holds nothing finite."""
    above, peak = above_peak(q)
    return above + peak


def above_peak(q: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`soft_value` less the largest of each row, and that: the sum may be a wider one."""
    peak = q.detach().amax(-1) if q.shape[-1] else q.new_zeros(q.shape[:-1])
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    total = (q - peak.unsqueeze(-1)).exp().sum(-1)
    # log only sees positive numbers, so that an empty row sends no NaN backward
    log_total = torch.where(total > 0, total, 1.0).log()
    return torch.where(total == 0, -torch.inf, log_total), peak
