"""Objectives: identities that they must obey, their limits, and objectives as text."""

import doctest
import importlib
import math
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tdkd.objectives
from tdkd import ops
from tdkd.objectives import (
    JSD,
    LK,
    LSIQ,
    SQIL,
    CrossEntropy,
    ForwardKL,
    IQLearn,
    ReverseKL,
    SkewKL,
    SoftTD,
    TotalVariation,
    parse,
)
from tdkd.objectives.inverse import PHIS, STEEPEST
from tdkd.objectives.text import NAMED
from tdkd.verify_objective import verify_objective

V, K, GAMMA = 20, 5, 0.9
DIVERGENCES = (ForwardKL, ReverseKL, JSD, SkewKL, TotalVariation, LK)


@pytest.fixture
def batch():
    """Two responses that end (token 2) and one that was cut off, a prompt between them."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 14, V, generator=generator, dtype=torch.float64) * 2
    tokens = torch.randint(3, V, (14,), generator=generator)
    tokens[[4, 8]] = 2
    tokens[9] = -100
    return student.requires_grad_(), teacher, tokens, ops.successors(tokens, eos_token_id=2)


def rows(batch, objective, **options):
    student, teacher, tokens, successor = batch
    options = {"k": K, "gamma": GAMMA, "reduction": "none", "successor": successor, **options}
    return ops.td_loss(student, teacher, tokens, objective=objective, **options)


def grad(loss, leaf):
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


# phi


F = {
    "chi2": lambda t: (t - 1) ** 2,
    "reverse_kl": lambda t: t * torch.log(t) - t + 1,
    "forward_kl": lambda t: -torch.log(t) + t - 1,
    "hellinger": lambda t: (t.sqrt() - 1) ** 2,
    "js": lambda t: t * torch.log(t) - (t + 1) * torch.log((t + 1) / 2),
    "tv": lambda t: (t - 1).abs() / 2,
}


def slope(phi, x):
    x = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(phi(x).sum(), x)[0]


@pytest.mark.parametrize("name", PHIS)
def test_every_phi_is_concave_finite_and_tangent_to_the_identity_at_zero(name):
    phi = PHIS[name]
    assert float(phi(torch.zeros((), dtype=torch.float64))) == 0
    assert float(slope(phi, 0.0)) == pytest.approx(1)
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    slopes = slope(phi, x)
    assert (slopes.diff() <= 1e-12).all()
    assert phi(torch.tensor([-1e6, 1e6])).isfinite().all()
    assert slope(phi, torch.tensor([-1e6, 1e6])).isfinite().all()
    if name not in ("chi2", "identity"):
        assert slopes.max() <= STEEPEST + 1e-9


@pytest.mark.parametrize("name", [name for name, phi in PHIS.items() if phi.knee > -math.inf])
def test_phi_goes_on_as_its_tangent(name):
    phi, knee = PHIS[name], PHIS[name].knee
    near = torch.tensor([knee - 1e-9, knee, knee + 1e-9], dtype=torch.float64)
    torch.testing.assert_close(
        slope(phi, near.clone()), torch.full((3,), STEEPEST, dtype=torch.float64), rtol=1e-6, atol=0
    )
    values = phi(near)
    torch.testing.assert_close(values[:2], values[1:], rtol=0, atol=2e-8)
    assert float(phi(near[:1] - 3)) == pytest.approx(float(values[1]) - 3 * STEEPEST)


@pytest.mark.parametrize("name", F)
def test_phi_is_the_conjugate_of_its_divergence(name):
    """``phi(x) = -f*(-x) = min_t (t x + f(t))``, by brute force over t."""
    t = torch.logspace(-12, 3, 400_001, dtype=torch.float64)
    low = {"chi2": -3.0, "tv": -0.5}.get(name, PHIS[name].knee)
    for x in torch.linspace(low, 1.5, 12, dtype=torch.float64).tolist():
        assert float(PHIS[name](torch.tensor(x, dtype=torch.float64))) == pytest.approx(
            float((t * x + F[name](t)).min()), abs=1e-6
        )


def test_slopes_are_those_of_the_papers_code():
    """``phi_grad`` of iq.py: "hellinger", "kl_fix", "js"."""
    r = torch.linspace(-0.5, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(slope(PHIS["hellinger"], r), 1 / (1 + r) ** 2)
    torch.testing.assert_close(slope(PHIS["reverse_kl"], r), torch.exp(-r))
    torch.testing.assert_close(slope(PHIS["js"], r), torch.exp(-r) / (2 - torch.exp(-r)))


@pytest.mark.parametrize("phi", PHIS)
def test_weak_regularisation_is_none(batch, phi):
    weak = rows(batch, IQLearn(phi, alpha=1e7)).loss
    torch.testing.assert_close(weak, rows(batch, IQLearn("identity")).loss, rtol=1e-4, atol=1e-4)


# Value forms


LENGTHS = {0: 5, 5: 4, 10: 3}
"""Rows that count of each response of ``batch``, by its first one; the last response is cut off."""


def discounted(lengths, gamma=GAMMA):
    """gamma^t on the rows of each response, times what makes their mean 1; 0 on the others."""
    weights = torch.zeros(14, dtype=torch.float64)
    for start, length in lengths.items():
        powers = gamma ** torch.arange(length, dtype=torch.float64)
        weights[start : start + length] = powers * length / powers.sum()
    return weights


@pytest.mark.parametrize("q", ["log_prob", "logit"])
def test_discounted_value_terms_telescope_to_the_initial_value(batch, q):
    _, _, tokens, _ = batch
    expert = rows(batch, IQLearn("identity"), q=q)
    initial = rows(batch, IQLearn("identity", value="initial"), q=q)
    value = expert.value
    for start, length, end in ((0, 5, 0.0), (5, 4, 0.0), (10, 3, GAMMA**3 * value[13])):
        here = slice(start, start + length)
        weights = discounted({start: length})
        total = (initial.loss + weights * expert.td_error)[here].sum()
        scale = length * (1 - GAMMA) / (1 - GAMMA**length)
        torch.testing.assert_close(total, scale * (value[start] - end))
    assert (tokens[[4, 8]] == 2).all()
    # the gradient as well: beyond V(s_0), and V(s_T) of the cut one, there is none
    of_value = grad(initial.loss + discounted(LENGTHS) * expert.td_error, batch[0])
    assert of_value[[0, 5, 10, 13]].abs().amax(-1).min() > 1e-3
    assert of_value[[1, 2, 3, 4, 6, 7, 8, 9, 11, 12]].abs().max() < 1e-12


@pytest.mark.parametrize("q", ["log_prob", "logit"])
@pytest.mark.parametrize("phi", ["identity", "js"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, GAMMA, 1.0])
def test_from_the_first_state_is_the_experts_form_discounted(batch, phi, gamma, q):
    student = batch[0]
    expert = rows(batch, IQLearn(phi, alpha=1.0), q=q, gamma=gamma)
    initial = rows(batch, IQLearn(phi, alpha=1.0, value="initial"), q=q, gamma=gamma)
    lengths = LENGTHS if gamma else {**LENGTHS, 10: 4}
    weighted = discounted(lengths, gamma) * expert.loss
    torch.testing.assert_close(initial.loss, weighted)
    torch.testing.assert_close(grad(initial.loss, student), grad(weighted, student))


@pytest.mark.parametrize("expectation", ["token", "teacher"])
def test_a_level_is_no_reward_under_the_identity(batch, expectation):
    """Each response's own, and that of all: phi and V see it with the same weights."""
    student, *given = batch
    objective = IQLearn("identity", value="initial", expectation=expectation)
    for level in (3.0, torch.tensor([-4.0] * 5 + [7.0] * 9)[:, None]):
        plain, moved = (
            rows((logits, *given), objective, q="logit", reduction="sum").loss
            for logits in (student, student + level)
        )
        torch.testing.assert_close(plain, moved)


def test_what_weighs_from_the_first_state(batch):
    seen = []

    def objective(rows):
        seen.append(rows.occupancy)
        return rows.value

    for gamma, cut_off in ((GAMMA, 3), (1.0, 3), (0.0, 4)):
        rows(batch, objective, gamma=gamma)
        torch.testing.assert_close(seen.pop(), discounted({0: 5, 5: 4, 10: cut_off}, gamma))
    # nobody pays for what nobody reads
    objective.starts = False
    rows(batch, objective)
    assert seen.pop() is None
    assert not IQLearn().starts
    assert (ForwardKL() + IQLearn(value="initial")).starts


def test_packed_sequences_begin_each_for_itself(batch):
    student, teacher, tokens, _ = batch
    offsets = torch.tensor([0, 2, 14])
    successor = ops.successors(tokens, eos_token_id=2, cu_seqlens=offsets)
    seen = []

    def objective(rows):
        seen.append(rows.occupancy)
        return rows.value

    rows((student, teacher, tokens, successor), objective)
    # the first is cut off behind its second row, whose V' is unknown
    torch.testing.assert_close(seen[0], discounted({0: 1, 2: 3, 5: 4, 10: 3}))


def test_the_students_own_responses_have_a_first_state_and_no_phi(batch):
    own = torch.arange(14) >= 5
    weight = torch.where(own, 0.0, 14 / 5).double()
    initial = rows(batch, IQLearn("js", alpha=1.0, value="initial"), expert_weight=weight).loss
    mixed = rows(batch, IQLearn("js", alpha=1.0, value="mixed"), expert_weight=weight).loss
    torch.testing.assert_close(initial, discounted(LENGTHS) * mixed)


def test_first_states_need_the_students_own_values(batch):
    with pytest.raises(ValueError, match='stop_gradient: expected None with value="initial"'):
        IQLearn(value="initial", stop_gradient="next")
    for objective in (IQLearn(value="initial"), ForwardKL() + 0.1 * IQLearn(value="initial")):
        with pytest.raises(ValueError, match="target_value: expected None with an objective that"):
            rows(batch, objective, target_value=torch.zeros(14))


# Sums


def test_functions_stand_in_sums(batch):
    def cross_entropy(rows):
        return rows.value - rows.taken(rows.q)

    for total in (ForwardKL(tail=True) + cross_entropy, cross_entropy + ForwardKL(tail=True)):
        flags = [getattr(total, flag) for flag in ("normalised", "starts", "demonstrations")]
        assert flags == [True, None, None]
        assert total.looks_ahead
        assert not total.bootstraps
        assert not total.rowwise
        assert "cross_entropy" in repr(total)
    ahead = batch[3] != -2
    expected = rows(batch, ForwardKL(tail=True)).loss
    expected = torch.where(ahead, expected + 0.5 * rows(batch, cross_entropy).loss, expected)
    got = rows(batch, ForwardKL(tail=True) + 0.5 * (cross_entropy + 0 * JSD())).loss
    torch.testing.assert_close(got, expected)
    # what says more of itself is believed
    for flag in ("bootstraps", "normalised", "starts", "demonstrations", "looks_ahead"):
        setattr(cross_entropy, flag, False)
    cross_entropy.rowwise = True
    total = JSD() + cross_entropy
    assert total.rowwise
    assert not any((total.normalised, total.starts, total.looks_ahead))
    torch.testing.assert_close(
        rows(batch, total).loss, rows(batch, JSD()).loss + rows(batch, cross_entropy).loss
    )


def test_what_a_function_does_not_say_it_is_not_refused_for(batch):
    """Alone and in a sum alike: it may have V' of a target network, and sees the occupancy."""
    seen = []

    def function(rows):
        seen.append(rows.occupancy)
        return rows.taken(rows.q) - rows.next_value

    given = {"target_value": torch.randn(14)}
    alone = rows(batch, function, **given).loss
    torch.testing.assert_close(rows(batch, 0 * JSD() + function, **given).loss, alone)
    assert len(seen) == 2
    assert torch.equal(*seen)
    function.starts = True
    for objective in (function, JSD() + function):
        with pytest.raises(ValueError, match="target_value: expected None with an objective that"):
            rows(batch, objective, **given)
    function.starts = False
    rows(batch, JSD() + function, **given)
    assert seen[-1] is None


def test_a_list_adds_up(batch):
    terms = [ForwardKL(), JSD(), 0.5 * ReverseKL()]
    assert repr(sum(terms)) == repr(terms[0] + terms[1] + terms[2])
    assert sum(terms[:1]) is terms[0]
    for wrong in (1, "KL", None):
        with pytest.raises(TypeError, match="unsupported operand"):
            ForwardKL() + wrong
        with pytest.raises(TypeError, match="unsupported operand|can only concatenate"):
            wrong + ForwardKL()


# Divergences


@pytest.mark.parametrize("tail", [False, True])
def test_limits_of_jsd_and_skew(batch, tail):
    forward, reverse = (rows(batch, kind(tail=tail)).loss for kind in (ForwardKL, ReverseKL))
    state = batch[2] >= 0
    near = {"rtol": 1e-3, "atol": 1e-4}
    for beta, expected in ((1e-6, forward), (1 - 1e-6, reverse)):
        loss = rows(batch, JSD(beta, tail=tail)).loss
        torch.testing.assert_close(loss / min(beta, 1 - beta), expected, **near)
        assert torch.equal(rows(batch, JSD(round(beta), tail=tail)).loss, expected)
    for backwards, expected in ((False, forward), (True, reverse)):
        options = {"reverse": backwards, "tail": tail}
        assert torch.equal(rows(batch, SkewKL(0.0, **options)).loss, expected)
        torch.testing.assert_close(rows(batch, SkewKL(1e-6, **options)).loss, expected, **near)
        assert rows(batch, SkewKL(1 - 1e-6, **options)).loss.abs().max() < 1e-5
        skew = rows(batch, SkewKL(0.1, **options)).loss
        assert (skew <= -math.log(0.1)).all()
        assert (skew[state] < expected[state]).all()
    assert (rows(batch, JSD(tail=tail)).loss <= math.log(2)).all()


@pytest.mark.parametrize("tail", [False, True])
def test_acceptance_is_one_minus_total_variation(batch, tail):
    student = batch[0]
    distance = rows(batch, TotalVariation(tail=tail)).loss
    acceptance = (-rows(batch, LK(tail=tail)).loss).exp()
    torch.testing.assert_close(acceptance, 1 - distance)
    # the gradient of -log A is that of the distance over A
    torch.testing.assert_close(
        grad(rows(batch, LK(tail=tail)).loss, student),
        grad(distance / acceptance.detach(), student),
    )
    kl = rows(batch, ForwardKL(tail=tail)).loss
    assert torch.equal(rows(batch, LK("hybrid", eta=0.0, tail=tail)).loss, kl)
    late = rows(batch, LK("hybrid", eta=1e6, tail=tail)).loss
    torch.testing.assert_close(late, distance)
    hybrid = LK("hybrid", eta=2.0, tail=tail)
    weight = (-2 * acceptance).exp().detach()
    mixture = weight * kl + (1 - weight) * distance
    torch.testing.assert_close(rows(batch, hybrid).loss, mixture)
    torch.testing.assert_close(grad(rows(batch, hybrid).loss, student), grad(mixture, student))


def test_acceptance_does_not_underflow():
    """Students of overlap e^-200, where min(p, q) is 0 in float32."""
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1000.0, 1.0, 0.5]])
    out = ops.td_loss(student, teacher, torch.tensor([1]), objective=LK(), k=3, top_p=1.0)
    assert out.loss.item() == pytest.approx(200 - math.log(2), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, student)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize(
    "objective",
    [
        *(kind(tail=tail) for kind in (JSD, TotalVariation, LK) for tail in (False, True)),
        *(SkewKL(0.1, reverse=r, tail=tail) for r in (False, True) for tail in (False, True)),
    ],
    ids=repr,
)
def test_bounded_divergences_stay_finite_where_one_model_excludes_a_token(objective):
    """The student excludes one member of the set, the teacher another; both one more."""
    inf = math.inf
    student = torch.tensor([[-inf, 1.0, -1.5, -inf, 0.3]], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[3.0, -inf, 2.0, -inf, 0.1]], dtype=torch.float64)
    out = ops.td_loss(student, teacher, torch.tensor([1]), objective=objective, k=3, top_p=1.0)
    assert out.actions.ids.tolist() == [[0, 2, 1]]
    assert out.loss.isfinite()
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert gradient.isfinite().all()
    assert (gradient[student == -inf] == 0).all()
    assert gradient.abs().max() > 1e-3


def test_models_without_a_token_in_common_have_no_acceptance():
    inf = math.inf
    student = torch.tensor([[-inf, 1.0], [1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, -inf], [0.0, 1.0]])
    tokens = torch.tensor([1, 0])
    out = ops.td_loss(student, teacher, tokens, objective=LK(), k=2, top_p=1.0, reduction="none")
    assert out.loss[0] == inf
    assert out.loss[1].isfinite()
    (gradient,) = torch.autograd.grad(out.loss.sum(), student)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_models_have_no_divergence(batch, kind):
    _, teacher, tokens, successor = batch
    for tail in (False, True):
        student = (teacher + 3.0).requires_grad_()  # a level is free
        loss = rows((student, teacher, tokens, successor), kind(tail=tail)).loss
        assert loss.abs().max() < 1e-12
        if kind is not TotalVariation and kind is not LK:  # which have a kink there
            assert grad(loss, student).abs().max() < 1e-12


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_tail_makes_a_lower_bound_that_the_full_set_attains(batch, kind):
    """Merging tokens into one bucket loses information, never adds any."""
    state = batch[2] >= 0
    full = {"k": V, "top_p": 1.0}
    whole = rows(batch, kind(), **full).loss
    torch.testing.assert_close(rows(batch, kind(tail=True), **full).loss, whole)
    some = rows(batch, kind(tail=True)).loss
    # equal where total variation sees no sign change among the merged
    assert (some[state] <= whole[state] + 1e-12).all()
    assert (some[state] < whole[state] - 1e-3).sum() > 10
    few = rows(batch, kind(tail=True), k=2).loss
    assert (few[state] <= some[state] + 1e-12).all()


# Soft TD


SOFT = [
    {},
    {"steps": 2},
    {"steps": 7},
    {"lam": 0.0},
    {"lam": 0.6},
    {"lam": 1.0},
    {"steps": 3, "huber": 0.5},
]


@pytest.mark.parametrize("stop", ["next", None])
@pytest.mark.parametrize("options", SOFT, ids=repr)
@pytest.mark.parametrize("k", [V, 3])
def test_a_student_that_equals_its_teacher_has_no_soft_td_error(batch, options, stop, k):
    _, teacher, tokens, successor = batch
    student = (teacher + torch.linspace(-5, 5, 14, dtype=torch.float64)[:, None]).requires_grad_()
    objective = SoftTD(stop_gradient=stop, **options)
    loss = rows((student, teacher, tokens, successor), objective, k=k, top_p=1.0).loss
    assert loss.abs().max() < 1e-24
    assert grad(loss, student).abs().max() < 1e-11


def teachers_side(batch, k=K):
    """log pi* of the tokens, and of the sets (0 on rows that are no states)."""
    _, teacher, tokens, _ = batch
    actions = ops.select_actions(teacher, k, 0.8, include=tokens)
    state = tokens >= 0
    log_p = teacher.log_softmax(-1)
    taken = log_p.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    value = torch.where(actions.ids >= 0, log_p.gather(-1, actions.ids.long().clamp(min=0)), -1e9)
    return torch.where(state, taken, 0.0), torch.where(state, value.logsumexp(-1), 0.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_n_step_returns_are_rewards_and_entropy_bonuses_along_the_response(batch, steps):
    """``r_0 + sum_j gamma^j (r_j - log pi*_j) + gamma^n V_n``, in a loop."""
    *_, tokens, successor = batch
    out = rows(batch, SoftTD(steps))
    taken, value = teachers_side(batch)
    future = torch.where(successor >= 0, value[successor.clamp(min=0)], 0.0)
    reward = taken - GAMMA * future
    bonus = -(taken - value)  # entropy of the policy on the set
    for i in ((tokens >= 0) & (successor != -2)).nonzero().flatten().tolist():
        total, at, discount = reward[i], int(successor[i]), GAMMA
        for _ in range(steps - 1):
            if at == -1 or successor[at] == -2:
                break
            total = total + discount * (reward[at] + bonus[at])
            at, discount = int(successor[at]), discount * GAMMA
        if at >= 0:
            total = total + discount * out.value[at]
        torch.testing.assert_close(out.loss[i], (out.q[i] - total) ** 2)


def test_one_step_is_the_inverse_soft_bellman_reward(batch):
    *_, tokens, successor = batch
    out = rows(batch, SoftTD())
    taken, value = teachers_side(batch)
    future = torch.where(successor >= 0, value[successor.clamp(min=0)], 0.0)
    target = ops.td_target(out.value, successor, gamma=GAMMA, reward=taken - GAMMA * future)
    known = (tokens >= 0) & (successor != -2)
    torch.testing.assert_close(out.loss[known], (out.q - target).square()[known])
    assert (out.loss[~known] == 0).all()


def test_lambda_goes_from_one_step_to_regression_on_log_probabilities(batch):
    *_, successor = batch
    one, zero = (rows(batch, SoftTD(**options)).loss for options in ({}, {"lam": 0.0}))
    torch.testing.assert_close(one, zero)
    far, whole = (rows(batch, SoftTD(**options)) for options in ({"steps": 50}, {"lam": 1.0}))
    torch.testing.assert_close(far.loss, whole.loss)
    taken, _ = teachers_side(batch)
    ended = torch.arange(14) < 9
    torch.testing.assert_close(whole.loss[ended], (whole.q - taken).square()[ended])
    assert (successor[~ended] != -1).all()


def test_huber_is_the_square_near_zero_and_linear_far_away(batch):
    error = rows(batch, SoftTD()).loss.detach().sqrt()
    edge = float(error[error > 0].median())
    expected = torch.where(error < edge, error**2, edge * (2 * error - edge))
    torch.testing.assert_close(rows(batch, SoftTD(huber=edge)).loss.detach(), expected)


def test_a_token_that_the_teacher_excludes_gives_no_reward(batch):
    student, teacher, tokens, successor = batch
    excluded = teacher.clone()
    excluded[1, tokens[1]] = -math.inf
    for objective in (SoftTD(), SoftTD(lam=0.5)):
        loss = rows((student, excluded, tokens, successor), objective).loss
        assert loss[1] == 0
        assert loss[0] > 0
        assert grad(loss, student).isfinite().all()


# LS-IQ and SQIL


def test_ls_iq_is_iq_learn_with_both_squares(batch):
    c = 0.4
    out = rows(batch, LSIQ(c, clip=False, stop_gradient=None))
    iq = rows(batch, IQLearn("identity")).loss
    x = out.td_error
    v = torch.where(batch[3] != -2, out.value - (out.q - x), 0.0)
    torch.testing.assert_close(out.loss, iq + c / 2 * (x**2 + v**2))
    known = batch[3] != -2
    squares = c / 2 * ((x - 1 / c) ** 2 + (v + 1 / c) ** 2) - 1 / c
    torch.testing.assert_close(out.loss[known], squares[known])
    # values that are far within the bounds of such rewards are not clipped
    torch.testing.assert_close(rows(batch, LSIQ(0.01, stop_gradient=None)).loss,
                               rows(batch, LSIQ(0.01, clip=False)).loss)  # fmt: skip


def test_ls_iq_clips_values_that_no_reward_could_give(batch):
    student, *rest = batch
    high = (student + 50.0, *rest)
    out = rows(high, LSIQ(1.0), q="logit", gamma=0.5)
    inner = rest[2] >= 0
    future = 0.5 * 2.0  # V' is 1 / (c (1 - gamma)) at most
    x, v = out.q - future, out.value - future
    expected = -x + v + (x**2 + v**2) / 2
    torch.testing.assert_close(out.loss[inner], expected[inner])


def test_ls_iq_with_a_fixed_target_pulls_q_to_its_greatest_value(batch):
    out = rows(batch, LSIQ(0.5, expert="fixed"))
    greatest = 1 / (0.5 * (1 - GAMMA))
    v = out.value - (out.q - out.td_error)
    known = batch[3] != -2
    expected = v + 0.25 * v**2 + 0.25 * (out.q - greatest) ** 2
    torch.testing.assert_close(out.loss[known], expected[known])
    with pytest.raises(ValueError, match='gamma: expected a number < 1 with expert="fixed"'):
        rows(batch, LSIQ(expert="fixed"), gamma=1.0)


def test_sqil_is_a_squared_bellman_error_and_takes_rewards_of_rows(batch):
    known = batch[3] != -2
    for reward in (1.0, 0.0, lambda rows: rows.slot.to(rows.q.dtype)):
        out = rows(batch, SQIL(reward=reward), q="logit")
        if callable(reward):
            number = (out.actions.ids == batch[2][:, None]).int().argmax(-1).double()
        else:
            number = torch.full((14,), reward, dtype=torch.float64)
        torch.testing.assert_close(out.loss[known], (out.td_error - number).square()[known])


# Target networks


TEMPORAL = [
    IQLearn(alpha=1.0),
    IQLearn("js", alpha=1.0, expectation="teacher"),
    LSIQ(stop_gradient=None),
    SQIL(stop_gradient=None),
    SoftTD(stop_gradient=None),
    SoftTD(3, stop_gradient=None),
    SoftTD(lam=0.5, stop_gradient=None),
]


@pytest.mark.parametrize("objective", TEMPORAL, ids=repr)
def test_the_students_own_values_as_target_stop_the_gradient(batch, objective):
    student = batch[0]
    options = {name: value for name, value in vars(objective).items() if name != "stop_gradient"}
    stopped = rows(batch, type(objective)(**options, stop_gradient="next"))
    out = rows(batch, objective, target_value=stopped.value)
    torch.testing.assert_close(out.loss, stopped.loss)
    torch.testing.assert_close(grad(out.loss, student), grad(stopped.loss, student))


@pytest.mark.parametrize("objective", TEMPORAL, ids=repr)
def test_values_of_another_network_reach_the_loss_and_the_linear_form(batch, objective):
    _, teacher, tokens, successor = batch
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(14, generator=generator, dtype=torch.float64) - 1
    hidden = torch.randn(14, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, 4, generator=generator, dtype=torch.float64).requires_grad_()
    dense = (hidden @ weight.T, teacher, tokens, successor)
    actions = rows(dense, objective).actions
    results = []
    for impl in ("dense", "linear", "moved"):
        if impl == "linear":
            out = ops.linear_td_loss(
                hidden, weight, tokens, actions=actions, objective=objective, gamma=GAMMA,
                successor=successor, reduction="none", target_value=target,
            )  # fmt: skip
        else:
            moved = torch.where(tokens < 0, torch.nan, target) if impl == "dense" else target + 1
            out = rows(dense, objective, target_value=moved)
        results.append((out.loss, grad(out.loss, hidden)))
    torch.testing.assert_close(results[0], results[1])
    assert (results[0][0] - results[2][0]).abs().max() > 1e-3
    # V' is the target's, V the student's own
    expected = torch.where(successor >= 0, target[successor.clamp(min=0)], 0.0)
    out = rows(dense, objective, target_value=target)
    known = successor != -2
    torch.testing.assert_close((out.q - out.td_error)[known], GAMMA * expected[known])


def test_a_target_of_another_shape_is_refused(batch):
    with pytest.raises(ValueError, match=r"target_value: expected the shape of the rows \(14,\)"):
        rows(batch, IQLearn(), target_value=torch.zeros(3))
    with pytest.raises(TypeError, match="target_value: expected float64"):
        rows(batch, IQLearn(), target_value=torch.zeros(14, dtype=torch.int64))


# Graphs


@pytest.mark.parametrize(
    "objective",
    [
        IQLearn("js", alpha=1.0, value="initial"),
        SoftTD(2) + SoftTD(lam=0.5),
        LK("hybrid", tail=True) + JSD(0.3) + TotalVariation() + SkewKL(tail=True),
        LSIQ() + SQIL(),
    ],
    ids=repr,
)
def test_torch_compile_without_a_graph_break(batch, objective):
    student, teacher, tokens, successor = (x.detach() for x in batch)
    student, teacher = student.float().requires_grad_(), teacher.float()

    def step(student, teacher):
        return rows((student, teacher, tokens, successor), objective, reduction="mean").loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss = function(student, teacher)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*results)


# Text


@pytest.mark.parametrize("name", NAMED)
def test_every_objective_is_known_by_name(name):
    kind = NAMED[name]
    assert type(parse(name)) is kind
    assert repr(parse(f"{name}()")) == repr(kind())
    # what an objective shows is what makes it again
    assert repr(parse(repr(kind()))) == repr(kind())


def test_a_text_is_weights_names_and_options():
    got = parse(
        "ForwardKL(tail=True) + 0.1 * (IQLearn('js', alpha=2) + SoftTD(lam=0.9)) * 2 + -1*JSD"
    )
    expected = (
        ForwardKL(tail=True) + 0.2 * (IQLearn("js", alpha=2) + SoftTD(lam=0.9)) + -1.0 * JSD()
    )
    assert repr(got) == repr(expected)
    assert repr(parse(repr(got))) == repr(got)


TEXTS = {
    "": "objective: expected a sum such as",
    "ForwardKL(tail=True": "objective: expected a sum such as .*was never closed",
    "KL": "objective: expected one of ForwardKL, .*got KL$",
    "2": "objective: expected one of .*got 2$",
    "__import__('os').getcwd()": "objective: expected one of .*got __import__",
    "ForwardKL - JSD": "objective: expected one of .*got ForwardKL - JSD$",
    "ForwardKL * JSD": "objective: expected a number times an objective, got ForwardKL \\* JSD",
    "True * JSD": "objective: expected a number times an objective",
    "IQLearn(alfa=1)": "objective: expected options of IQLearn \\(phi, alpha, .*got alfa$",
    "IQLearn(alpha=-1)": "objective: in IQLearn\\(alpha=-1\\): alpha: expected a finite number > 0",
    "IQLearn(alpha='1')": "alpha: expected a finite number > 0, got '1'",
    "1e999 * JSD()": "expected a number times an objective, got 1e309 \\* JSD",
    "JSD({[]: 1})": "expected a number, a string, True, False or None as an option",
    "{[]: 1} * JSD()": "expected a number times an objective",
    "IQLearn(alpha=1e999)": "alpha: expected a finite number > 0, got inf",
    "IQLearn(alpha=open('x'))": "expected a number, a string, True, False or None .*got open",
    "JSD(**{'beta': 1})": "expected options of JSD \\(beta, tail\\), got \\*\\*",
    "JSD(True)": "beta: expected a number in \\[0, 1\\], got True",
    "JSD(1.5)": "beta: expected a number in \\[0, 1\\], got 1.5",
    "SkewKL(1.0)": "alpha: expected a number in \\[0, 1\\), got 1.0",
    "SkewKL(reverse='no')": "reverse: expected one of False, True, got 'no'",
    "ForwardKL(tail='no')": "tail: expected one of False, True, got 'no'",
    "ForwardKL(True)": "objective: in ForwardKL\\(True\\): too many positional arguments",
    "LK('alpha')": "form: expected one of 'log', 'hybrid', got 'alpha'",
    "LK(eta=-1)": "eta: expected a number in \\[0, inf\\), got -1",
    "SoftTD(0)": "steps: expected an int >= 1, got 0",
    "SoftTD(1.5)": "steps: expected an int, got float",
    "SoftTD(lam=2)": "lam: expected a number in \\[0, 1\\], got 2",
    "SoftTD(2, lam=0.5)": "steps: expected 1 with lam=0.5, got 2",
    "SoftTD(huber=0)": "huber: expected a finite number > 0, got 0",
    "SoftTD(stop_gradient='all')": "stop_gradient: expected one of None, 'next', got 'all'",
    "LSIQ(0)": "c: expected a finite number > 0, got 0",
    "LSIQ(expert='free')": "expert: expected one of 'bootstrap', 'fixed', got 'free'",
    "LSIQ(clip=2)": "clip: expected one of False, True, got 2",
    "SQIL(reward='1')": "reward: expected a number or a function of Rows, got str",
    "IQLearn(value='initial', stop_gradient='next')": "stop_gradient: expected None with value=",
    "IQLearn(value='last')": "value: expected one of 'expert', 'initial', 'mixed', got 'last'",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_wrong_text_is_named(text):
    with pytest.raises(ValueError, match=TEXTS[text]) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_weight_is_a_number_or_a_tensor_and_is_told():
    assert repr(np.float32(0.5) * ForwardKL()) == "0.5 * ForwardKL(tail=False)"
    assert repr(torch.nn.Parameter(torch.full((1,), 0.5)) * JSD()).startswith("0.5 * JSD(")
    assert repr(torch.ones(2) * JSD()).startswith("tensor([1., 1.]) * JSD(")
    assert IQLearn(alpha=np.float32(0.5)).alpha == 0.5
    for other in (JSD(), None):
        with pytest.raises(TypeError, match="unsupported operand"):
            ForwardKL() * other
    for endless in (float("nan"), float("inf"), -np.float32("inf")):
        with pytest.raises(ValueError, match=r"weight: expected a finite number, got .*(nan|inf)"):
            ForwardKL() + endless * JSD()


# Documentation


GUIDE = Path(__file__).parents[1] / "docs" / "objectives.md"


def test_the_example_of_the_guide_passes_its_own_check():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    made = {}
    exec(code, made)
    for finding in verify_objective(made["Expectile"](), name="Expectile", cases=12):
        assert finding.passed, finding.failures[0]


def test_the_table_of_the_guide_has_every_objective_with_its_flags():
    cells = {}
    for line in GUIDE.read_text().splitlines():
        found = re.match(r"\| `([A-Z]\w+)` \|", line)
        if found:
            cells[found[1]] = re.split(r"(?<!\\)\|", line)[4]
    assert set(cells) == set(NAMED)
    flags = ("bootstraps", "normalised", "rowwise", "starts", "demonstrations")
    for name, kind in NAMED.items():
        plain = {flag for flag in re.split(r", ", cells[name].strip()) if " " not in flag}
        said = plain | {"rowwise"} if name == "SoftTD" else plain
        assert said == {flag for flag in flags if getattr(kind(), flag)}, name
    for name in ("ForwardKL", "ReverseKL", "JSD", "SkewKL", "TotalVariation", "LK", "CrossEntropy"):
        assert "normalised with `tail`" in cells[name]
        assert NAMED[name](tail=True).normalised
    assert "rowwise with one step" in cells["SoftTD"]
    assert not SoftTD(2).rowwise
    assert not SoftTD(lam=0.5).rowwise


def test_the_phis_of_the_guide_and_their_tangents():
    rows_of_phi = re.findall(
        r'^\| `"(\w+)"` \| .*? \| (-?[\d.]*) ?\| ', GUIDE.read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows_of_phi} == set(PHIS)
    for name, knee in rows_of_phi:
        if name == "tv":
            assert knee == "-0.5"
        elif knee:
            assert float(knee) == pytest.approx(PHIS[name].knee, abs=6e-4)
        else:
            assert PHIS[name].knee == -math.inf


def test_docstrings_of_objectives_run():
    modules = [m.name for m in pkgutil.iter_modules(tdkd.objectives.__path__, "tdkd.objectives.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in modules]
    assert not any(result.failed for result in results)
    for name, kind in NAMED.items():
        (example,) = doctest.DocTestFinder(recurse=False).find(kind, name)
        assert ".loss.item()" in "".join(line.source for line in example.examples), name


@pytest.mark.parametrize("name", ["tdkd.ops", "tdkd.nn", "tdkd.published"])
def test_docstrings_of_the_ops_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


# Logits of -inf, and levels


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_set_that_the_student_excludes(impl):
    """Infinite where the definition is, and otherwise what is left of it; never NaN."""
    student = torch.tensor([[-math.inf, 1.0, 0.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    p = teacher.softmax(-1)[0, 0].item()
    bounded = {
        TotalVariation(tail=True): p,
        LK(tail=True): -math.log(1 - p),
        SkewKL(0.1, tail=True): -p * math.log(0.1) + (1 - p) * math.log((1 - p) / (1 - 0.1 * p)),
        SkewKL(0.1, reverse=True, tail=True): -math.log(0.9 * (1 - p) + 0.1),
        JSD(0.5, tail=True): 0.5
        * (p * math.log(2) + (1 - p) * math.log((1 - p) / (1 - p / 2)) - math.log(1 - p / 2)),
    }
    endless = (ForwardKL(tail=True), ForwardKL(), CrossEntropy(tail=True), CrossEntropy())
    for objective, expected in {**bounded, **dict.fromkeys(endless, math.inf)}.items():
        options = {"k": 1, "top_p": 1.0, "objective": objective, "impl": impl}
        loss = ops.td_loss(student, teacher, torch.tensor([0]), **options).loss
        assert loss.item() == pytest.approx(expected, abs=1e-6), objective
        assert grad(loss, student).isfinite().all(), objective


@pytest.mark.parametrize("level", ["log_prob", "logit"])
@pytest.mark.parametrize(
    "objective",
    [
        IQLearn(alpha=1.0),
        IQLearn(expectation="teacher"),
        SQIL(),
        LSIQ(),
        SoftTD(),
        SoftTD(lam=0.5),
        JSD(tail=True) + 0.1 * IQLearn(),
        ReverseKL(tail=True) + SoftTD(),
    ],
    ids=repr,
)
def test_a_row_without_a_successor_sends_nothing_back_whatever_it_holds(objective, level):
    """A response that was cut off ends in a row that does not count: 0 times infinity is NaN."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, generator=generator)
    student[2, 1] = -math.inf
    student.requires_grad_()
    options = {"objective": objective, "q": level, "k": 6, "top_p": 1.0}
    out = ops.td_loss(
        student, teacher, torch.tensor([0, 2, 1]), successor=torch.tensor([1, -1, -2]), **options
    )
    assert out.loss.isfinite()
    assert not grad(out.loss, student).isnan().any()


def test_a_state_without_a_set_sends_nothing_back():
    """Its teacher's logits are NaN, and its student's hidden state is too."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(6, 4, generator=generator), torch.randn(6, 9, generator=generator)
    hidden[5], teacher[5] = math.nan, math.nan
    hidden.requires_grad_()
    weight = torch.randn(9, 4, generator=generator, requires_grad=True)
    options = {"objective": ForwardKL(tail=True), "k": 4}
    out = ops.linear_td_loss(
        hidden, weight, torch.arange(6), teacher_hidden=teacher, teacher_weight=torch.eye(9),
        **options,
    )  # fmt: skip
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, weight)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("level", [30.0, 1e3, -1e4])
def test_a_level_of_all_logits_costs_no_precision(level, impl):
    """Models' logits may lie near -100: differences are taken before anything is rounded."""
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(64, 1000, generator=generator) + level).requires_grad_()
    tokens = torch.randint(1000, (64,), generator=generator)
    exact = student.detach().double().requires_grad_()
    wanted = cross_entropy(exact, tokens)
    options = {"objective": CrossEntropy(tail=True), "k": 8, "impl": impl}
    loss = ops.td_loss(student, student.detach(), tokens, **options).loss
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-6)
    torch.testing.assert_close(
        64 * grad(loss, student).double(), 64 * grad(wanted, exact), rtol=0, atol=5e-7
    )
    hidden = torch.eye(1000)[:64]
    ids = ops.select_actions(student.detach(), 8).ids
    tensors = hidden, student.detach().T.contiguous().T.new_zeros(1000, 1000)
    tensors[1][:, :64] = student.detach().T
    rows = ops.linear_log_probs(*tensors, ids, impl=impl)
    found = exact.detach().log_softmax(-1).gather(-1, ids.long())
    torch.testing.assert_close(rows.log_probs.double(), found, rtol=0, atol=3e-6)
