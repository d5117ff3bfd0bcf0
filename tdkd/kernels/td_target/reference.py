"""td_target: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.types import following


def td_target(
    value: Tensor, successor: Tensor, reward: Tensor | None, *, gamma: float, lam: float | None
) -> Tensor:
    """Flat rows ``[N]``: ``r + gamma V'``, or the TD(lambda) return of the chain of successors."""
    successor = successor.long()
    reward = torch.zeros_like(value) if reward is None else reward
    known = successor != -2
    future = gamma * following(value, successor) if gamma else torch.zeros_like(value)
    target = torch.where(known, reward + future, value)
    if not lam or not gamma or not value.numel():
        return target
    # G_i = b_i + c_i G_{s_i} along each chain. Composing the step with itself doubles its reach,
    # so that log2(N) gathers replace a loop over rows. A chain that has ended is left alone, since
    # 0 * b would be NaN where another row holds -inf.
    linked = successor >= 0
    ahead = (1 - lam) * following(value, successor) if lam < 1 else torch.zeros_like(value)
    b = torch.where(linked, reward + gamma * ahead, target)
    c = value.new_full(value.shape, gamma * lam)
    s = torch.where(linked, successor, 0)
    for _ in range((value.numel() - 1).bit_length()):
        b = torch.where(linked, b + c * b.gather(0, s), b)
        c = torch.where(linked, c * c.gather(0, s), c)
        linked = linked & linked.gather(0, s)
        s = s.gather(0, s)
    return b
