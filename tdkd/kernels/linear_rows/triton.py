"""The loss of rows, and its gradient, in one launch on a GPU: the forward KL of a set.

A hundred small operators on ``[N, k]`` take a GPU less time than its host needs to launch them, for
every chunk of rows. What this computes is :class:`tdkd.objectives.ForwardKL` on the rows that
:class:`tdkd.td_rows.TDRows` makes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkd.kernels.rows import on_device, slot_warps
from tdkd.objectives import ForwardKL
from tdkd.td_rows import RowTerms, TDRows

_EPS = tl.constexpr(1.1920928955078125e-07)  # float32 knows 1 - mass to its epsilon


@triton.jit
def _logsumexp(x):
    top = tl.max(x, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def _forward_kl(
    z_ptr,
    rest_ptr,
    log_probs_ptr,
    slot_ptr,
    state_ptr,
    factor_ptr,
    loss_ptr,
    q_ptr,
    value_ptr,
    entropy_ptr,
    log_mass_ptr,
    grad_z_ptr,
    grad_rest_ptr,
    k,
    TAIL: tl.constexpr,
    LOG_PROB: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0)
    wide = row.to(tl.int64) * k
    j = tl.arange(0, K)
    inside = j < k
    live = tl.load(state_ptr + row) != 0
    known = j < tl.where(live, k, 0)
    z = tl.load(z_ptr + wide + j, mask=known, other=float("-inf"))
    log_p = tl.load(log_probs_ptr + wide + j, mask=known, other=float("-inf"))
    # relative to the set, as in TDRows
    level = tl.max(z, 0)
    level = tl.where(tl.abs(level) < float("inf"), level, 0.0)
    z = z - level
    rest = (tl.load(rest_ptr + row).to(tl.float64) - level.to(tl.float64)).to(tl.float32)
    value = _logsumexp(z)
    top = tl.maximum(value, rest)
    top = tl.where(top == float("-inf"), 0.0, top)
    log_z = top + tl.log(tl.exp(value - top) + tl.exp(rest - top))
    teacher = _logsumexp(log_p)  # -inf where the teacher excludes every member

    held = log_p > float("-inf")
    if TAIL:
        p = tl.where(held, tl.exp(log_p), 0.0)
        within = tl.where(held, p * (log_p - (z - log_z)), 0.0)
        # 1 - mass, where mass is near to 1 too
        log_p_rest = tl.log(tl.maximum(_one_less_exp(teacher), _EPS))
        p_rest = tl.where(rest == float("-inf"), 0.0, tl.exp(log_p_rest))
        beyond = tl.where(rest == float("-inf"), 0.0, p_rest * (log_p_rest - (rest - log_z)))
        loss = tl.sum(within, 0) + beyond
        whole = tl.sum(p, 0) + p_rest
        grad_z = whole * tl.exp(z - log_z) - p
        grad_rest = whole * tl.exp(rest - log_z) - p_rest
    else:
        p = tl.where(held, tl.exp(log_p - teacher), 0.0)
        loss = tl.sum(tl.where(held, p * ((log_p - teacher) - (z - value)), 0.0), 0)
        grad_z = tl.sum(p, 0) * tl.exp(z - value) - p
        grad_rest = 0.0
        if LOG_PROB:  # a NaN outside the set is one of every log-probability
            loss = tl.where(rest != rest, rest, loss)
            grad_z = tl.where(rest != rest, rest, grad_z)
    share = tl.where(z == float("-inf"), 0.0, tl.exp(z - value))
    entropy = -tl.sum(tl.where(share == 0.0, 0.0, share * (z - value)), 0)
    taken = tl.sum(tl.where(j == tl.load(slot_ptr + row), z, 0.0), 0)
    log_mass = value - log_z
    factor = tl.load(factor_ptr)
    tl.store(grad_z_ptr + wide + j, tl.where(live, grad_z * factor, 0.0), mask=inside)
    tl.store(grad_rest_ptr + row, tl.where(live, grad_rest * factor, 0.0))
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    tl.store(q_ptr + row, tl.where(live, taken - (log_z if LOG_PROB else -level), 0.0))
    tl.store(value_ptr + row, tl.where(live, log_mass if LOG_PROB else value + level, 0.0))
    tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0))
    tl.store(log_mass_ptr + row, tl.where(live, log_mass, 0.0))


@triton.jit
def _one_less_exp(x):
    """``1 - e^x`` of x <= 0, to its last places near 0 as well."""
    small = x > -0.25
    # the series of expm1, whose next term is below 2^-24 of the first there
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(small, series, 1.0 - tl.exp(x))


def forward_kl(
    rows: TDRows, z: Tensor, rest: Tensor, factor: Tensor
) -> tuple[RowTerms, Tensor, Tensor]:
    """The terms of every row, and ``factor`` times the gradient of its loss by ``z`` and ``rest``.

    As ``rows(z, rest)`` under autograd; TD errors are left to the caller, and are 0 here.
    """
    assert isinstance(rows.objective, ForwardKL)
    z, rest = z.contiguous(), rest.contiguous()  # gradients have their layout
    count, k = z.shape
    loss, q, value, entropy, log_mass, nothing = z.new_zeros(6, count)
    grad_z, grad_rest = torch.empty_like(z), torch.empty_like(rest)
    if count:
        half = rows.log_probs.element_size() == 2
        log_probs = rows.log_probs.float() if half else rows.log_probs
        block = triton.next_power_of_2(max(k, 16))
        with on_device(z):
            _forward_kl[(count,)](
                z,
                rest,
                log_probs.contiguous(),
                rows.slot.contiguous(),
                rows.state.contiguous(),
                factor,
                loss,
                q,
                value,
                entropy,
                log_mass,
                grad_z,
                grad_rest,
                k,
                TAIL=rows.objective.tail,
                LOG_PROB=rows.level == "log_prob",
                K=block,
                num_warps=slot_warps(block),
            )
    return RowTerms(loss, q, value, nothing, entropy, log_mass), grad_z, grad_rest
