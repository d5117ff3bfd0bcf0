"""td_target on GPUs.

TD(lambda) returns are ``G_i = b_i + c_i G_{s_i}`` along chains of successors in any order of rows.
Composing that step with itself doubles its reach: log2(N) short launches take the place of a walk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import on_device

_BLOCK = 256


@triton.jit
def _step(
    value_ptr,
    successor_ptr,
    reward_ptr,
    b_ptr,
    c_ptr,
    s_ptr,
    N,
    share,
    carry,
    HAS_REWARD: tl.constexpr,
    BOOTSTRAPS: tl.constexpr,
    CHAINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    s = tl.load(successor_ptr + i, mask=live, other=-1).to(tl.int64)
    linked = live & (s >= 0)
    reward = tl.zeros([BLOCK], tl.float32)
    if HAS_REWARD:
        reward = tl.load(reward_ptr + i, mask=live, other=0.0)
    target = reward
    if BOOTSTRAPS:
        # a successor that is no row has no value
        following = tl.load(value_ptr + s, mask=linked & (s < N), other=float("nan"))
        target = tl.where(linked, reward + share * following, reward)
    own = tl.load(value_ptr + i, mask=live & (s == -2), other=0.0)
    tl.store(b_ptr + i, tl.where(s == -2, own, target), mask=live)
    if CHAINS:
        tl.store(c_ptr + i, tl.where(linked, carry, 0.0), mask=live)
        tl.store(s_ptr + i, tl.where(linked & (s < N), s, -1), mask=live)


@triton.jit
def _double(b_ptr, c_ptr, s_ptr, next_b_ptr, next_c_ptr, next_s_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    s = tl.load(s_ptr + i, mask=live, other=-1)
    linked = s >= 0
    b = tl.load(b_ptr + i, mask=live, other=0.0)
    c = tl.load(c_ptr + i, mask=live, other=0.0)
    ahead = tl.load(b_ptr + s, mask=linked, other=0.0)
    tl.store(next_b_ptr + i, tl.where(linked, b + c * ahead, b), mask=live)
    tl.store(next_c_ptr + i, c * tl.load(c_ptr + s, mask=linked, other=0.0), mask=live)
    tl.store(next_s_ptr + i, tl.load(s_ptr + s, mask=linked, other=-1), mask=live)


@triton.jit
def _spread(grad_ptr, c_ptr, s_ptr, next_grad_ptr, next_c_ptr, next_s_ptr, N, BLOCK: tl.constexpr):
    """The transpose of a step, onto a copy of the gradient."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    s = tl.load(s_ptr + i, mask=live, other=-1)
    linked = s >= 0
    c = tl.load(c_ptr + i, mask=live, other=0.0)
    grad = tl.load(grad_ptr + i, mask=live, other=0.0)
    tl.atomic_add(next_grad_ptr + s, c * grad, mask=linked & (grad != 0.0), sem="relaxed")
    tl.store(next_c_ptr + i, c * tl.load(c_ptr + s, mask=linked, other=0.0), mask=live)
    tl.store(next_s_ptr + i, tl.load(s_ptr + s, mask=linked, other=-1), mask=live)


@triton.jit
def _gradients(
    total_ptr,
    successor_ptr,
    value_ptr,
    reward_ptr,
    N,
    share,
    BLOCK: tl.constexpr,
):
    """From the gradient of each return to those of values and rewards; value begins as zeros."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    s = tl.load(successor_ptr + i, mask=live, other=-1).to(tl.int64)
    total = tl.load(total_ptr + i, mask=live, other=0.0)
    tl.store(reward_ptr + i, tl.where(s == -2, 0.0, total), mask=live)
    target = tl.where(s == -2, i, s)
    amount = tl.where(s == -2, total, share * total)
    live = live & (target >= 0) & (target < N) & (amount != 0.0)
    tl.atomic_add(value_ptr + target, amount, mask=live, sem="relaxed")


def td_target(
    value: Tensor,
    successor: Tensor,
    reward: Tensor | None,
    gamma: float,
    lam: float | None,
) -> Tensor:
    n = value.numel()
    b = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    if not n:
        return b
    share, carry = _shares(gamma, lam)
    c, s = _links(n, value.device) if carry else (b, b)
    grid = (triton.cdiv(n, _BLOCK),)
    with on_device(value):
        _step[grid](
            value.contiguous(),
            successor.contiguous(),
            b if reward is None else reward.contiguous(),
            b,
            c,
            s,
            n,
            share,
            carry,
            HAS_REWARD=reward is not None,
            BOOTSTRAPS=share != 0,
            CHAINS=carry != 0,
            BLOCK=_BLOCK,
        )
        if carry:
            current, other = (b, c, s), (torch.empty_like(b), *_links(n, value.device))
            for _ in range((n - 1).bit_length()):
                _double[grid](*current, *other, n, BLOCK=_BLOCK)
                current, other = other, current
            b = current[0]
    return b


def td_target_backward(
    grad: Tensor, successor: Tensor, gamma: float, lam: float | None
) -> tuple[Tensor, Tensor]:
    """Deterministic where no two rows share a successor, as in sequences."""
    n = grad.numel()
    total = grad.contiguous()
    by_value = torch.zeros(grad.shape, dtype=torch.float32, device=grad.device)
    by_reward = torch.empty_like(by_value)
    if not n:
        return by_value, by_reward
    successor = successor.contiguous()
    share, carry = _shares(gamma, lam)
    grid = (triton.cdiv(n, _BLOCK),)
    with on_device(grad):
        if carry:
            # the links of the forward step, whose targets are of no use here
            links, other = _links(n, grad.device), _links(n, grad.device)
            _step[grid](
                total,
                successor,
                total,
                by_reward,
                *links,
                n,
                share,
                carry,
                HAS_REWARD=False,
                BOOTSTRAPS=False,
                CHAINS=True,
                BLOCK=_BLOCK,
            )
            for _ in range((n - 1).bit_length()):
                following = total.clone()
                _spread[grid](total, *links, following, *other, n, BLOCK=_BLOCK)
                total, links, other = following, other, links
        _gradients[grid](total, successor, by_value, by_reward, n, share, BLOCK=_BLOCK)
    return by_value, by_reward


def _shares(gamma: float, lam: float | None) -> tuple[float, float]:
    """What V' of a successor weighs in a return, and what the successor's own return does. A weight
    of zero keeps an infinite value out."""
    return gamma * (1.0 - (lam or 0.0)), gamma * (lam or 0.0)


def _links(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """c and s of every row."""
    return (
        torch.empty(n, dtype=torch.float32, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
    )
