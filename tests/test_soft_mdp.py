"""A tabular soft MDP: what the paper proves of the top-p soft Bellman operator, seen on our ops.

Propositions 1 to 4 of arXiv 2505.20335: the operator contracts, and its fixed point is within
``-gamma/(1 - gamma) log p`` of the full operator's when the sets come from the optimal policy.
Transitions are deterministic, as they are in a language model; a successor of -1 ends the response.
"""

import math

import pytest
import torch

from tdkd import ops

STATES, ACTIONS = 10, 7
PS = (0.3, 0.5, 0.8, 0.9, 0.95, 0.99)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class SoftMDP:
    def __init__(self, seed, gamma, *, ends):
        generator = torch.Generator().manual_seed(seed)
        self.gamma = gamma
        self.reward = 2 * normal(STATES, ACTIONS, seed=seed + 1)
        self.successor = ACTIONS * torch.randint(STATES, (STATES, ACTIONS), generator=generator)
        if ends:  # the last action is EOS
            self.successor[:, -1] = -1

    def target(self, value, reward=None):
        """``[S, A]``: ``r + gamma V(s')``; row (s, a) leads to row (s', 0), which holds V(s')."""
        rows = value.unsqueeze(-1).expand(STATES, ACTIONS)
        return ops.td_target(rows, self.successor, gamma=self.gamma, reward=reward)

    def bellman(self, q, ids):
        """The soft Bellman operator whose values are taken on the sets ``ids [S, k]``."""
        return self.target(ops.soft_value(ops.gather_q(q, ids)), self.reward)

    def fixed_point(self, ids):
        q = torch.zeros(STATES, ACTIONS, dtype=torch.float64)
        for _ in range(math.ceil(math.log(1e-14) / math.log(self.gamma))):
            q = self.bellman(q, ids)
        assert (self.bellman(q, ids) - q).abs().max() < 1e-11
        return q


def top_p_sets(logits, p):
    return ops.select_actions(logits, k=ACTIONS, top_p=p).ids


def everything():
    return torch.arange(ACTIONS).expand(STATES, ACTIONS)


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=[(0, 0.9, False), (1, 0.9, True), (2, 0.6, True)], ids=str)
def solved(request):
    """An MDP, its optimal Q*, and for each p the fixed point Q_p* on the optimal policy's sets."""
    seed, gamma, ends = request.param
    mdp = SoftMDP(seed, gamma, ends=ends)
    optimal = mdp.fixed_point(everything())
    return mdp, optimal, {p: mdp.fixed_point(top_p_sets(optimal, p)) for p in PS}


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("p", [0.2, 0.8, 1.0])
def test_top_p_operator_is_a_contraction(gamma, p):
    mdp = SoftMDP(3, gamma, ends=False)
    ids = top_p_sets(2 * normal(STATES, ACTIONS, seed=4), p)  # of any expert
    for seed in range(30):
        scale = 10.0 ** (seed % 4 - 1)
        first, second = scale * normal(2, STATES, ACTIONS, seed=seed)
        shrunk = distance(mdp.bellman(first, ids), mdp.bellman(second, ids))
        assert shrunk <= gamma * distance(first, second) + 1e-12
    # the modulus is gamma itself: a constant shift is shrunk by no more
    shifted = mdp.bellman(first + 3.0, ids) - mdp.bellman(first, ids)
    torch.testing.assert_close(shifted, torch.full_like(shifted, 3.0 * gamma))


def test_top_p_operator_is_monotone():
    mdp = SoftMDP(5, 0.9, ends=True)
    ids = top_p_sets(normal(STATES, ACTIONS, seed=6), 0.7)
    low = normal(STATES, ACTIONS, seed=7)
    high = low + normal(STATES, ACTIONS, seed=8).abs()
    assert (mdp.bellman(low, ids) <= mdp.bellman(high, ids)).all()


@pytest.mark.parametrize("p", PS)
def test_one_step_loses_at_most_minus_log_p(solved, p):
    """``V* - logsumexp over the set = -log of the optimal policy's mass there <= -log p``."""
    _, optimal, _ = solved
    actions = ops.select_actions(optimal, k=ACTIONS, top_p=p)
    lost = optimal.logsumexp(-1) - ops.soft_value(ops.gather_q(optimal, actions.ids))
    torch.testing.assert_close(lost, -actions.mass.log())
    assert (lost >= 0).all()
    assert (lost <= -math.log(p)).all()


@pytest.mark.parametrize("p", PS)
def test_fixed_point_is_within_the_bound(solved, p):
    mdp, optimal, restricted = solved
    gap = optimal - restricted[p]
    bound = -mdp.gamma / (1 - mdp.gamma) * math.log(p)
    assert gap.min() >= -1e-12
    assert gap.max() <= bound + 1e-12
    # not an empty statement: sets did leave actions out
    assert (top_p_sets(optimal, p) < 0).any()
    assert gap.max() > 1e-4


@pytest.mark.parametrize("p", PS)
def test_restricted_policy_is_worth_its_fixed_point_in_the_full_mdp(solved, p):
    """The soft-greedy policy on the sets, evaluated without them, has Q = Q_p*."""
    mdp, optimal, restricted = solved
    ids = top_p_sets(optimal, p)
    on_the_set = ops.gather_q(restricted[p], ids)
    log_policy = on_the_set - ops.soft_value(on_the_set).unsqueeze(-1)
    policy = log_policy.exp()
    entropy = -torch.where(ids < 0, 0.0, policy * log_policy).sum(-1)
    q = torch.zeros_like(optimal)
    for _ in range(500):
        expected = torch.where(ids < 0, 0.0, policy * ops.gather_q(q, ids)).sum(-1)
        q = mdp.target(expected + entropy, mdp.reward)
    torch.testing.assert_close(q, restricted[p], rtol=0, atol=1e-9)
    lost = optimal.logsumexp(-1) - ops.soft_value(on_the_set)
    assert (lost <= -math.log(p) / (1 - mdp.gamma) + 1e-12).all()


def test_gap_shrinks_as_p_grows_and_vanishes_at_one(solved):
    mdp, optimal, restricted = solved
    gaps = [distance(optimal, restricted[p]) for p in PS]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 5 * gaps[-1]
    for smaller, larger in zip(PS, PS[1:], strict=False):
        assert (restricted[smaller] <= restricted[larger] + 1e-12).all()
    assert distance(optimal, mdp.fixed_point(top_p_sets(optimal, 1.0))) < 1e-12


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_inverse_soft_bellman_recovers_the_reward(solved, p):
    """``r = Q - gamma V(s')`` at the fixed point, and any Q is the fixed point of its reward."""
    mdp, optimal, _ = solved
    ids = top_p_sets(optimal, p)
    q = mdp.fixed_point(ids)
    value = ops.soft_value(ops.gather_q(q, ids))
    torch.testing.assert_close(q - mdp.target(value), mdp.reward, rtol=0, atol=1e-10)

    arbitrary = 3 * normal(STATES, ACTIONS, seed=9)
    implied = SoftMDP(0, mdp.gamma, ends=False)
    implied.successor = mdp.successor
    implied.reward = arbitrary - mdp.target(ops.soft_value(ops.gather_q(arbitrary, ids)))
    torch.testing.assert_close(implied.fixed_point(ids), arbitrary, rtol=0, atol=1e-9)
