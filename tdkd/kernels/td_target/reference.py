"""td_target: the definition in plain PyTorch."""

import torch
from torch import Tensor


def next_value(value: Tensor, successor: Tensor) -> Tensor:
    """``value[successor]`` over flat rows; 0 where ``successor < 0``."""
    if not value.numel():
        return value
    return torch.where(successor >= 0, value.gather(0, successor.clamp(min=0)), 0.0)


def td_target(
    value: Tensor, successor: Tensor, reward: Tensor, *, gamma: float, lam: float | None
) -> Tensor:
    """Flat rows ``[N]``: ``r + gamma V'``, or the TD(lambda) return of the chain of successors."""
    known = successor != -2
    target = torch.where(known, reward + gamma * next_value(value, successor), value)
    if not lam or not value.numel():
        return target
    # G_i = b_i + c_i G_{s_i} along each chain. Composing the step with itself doubles its reach,
    # so that log2(N) gathers replace a loop over rows; terminal and truncated rows have c = 0.
    linked = successor >= 0
    b = torch.where(linked, reward + gamma * (1 - lam) * next_value(value, successor), target)
    c = torch.where(linked, gamma * lam, 0.0).to(value.dtype)
    s = torch.where(linked, successor, 0)
    for _ in range((value.numel() - 1).bit_length()):
        b = b + c * b.gather(0, s)
        c = c * c.gather(0, s)
        s = s.gather(0, s)
    return b
