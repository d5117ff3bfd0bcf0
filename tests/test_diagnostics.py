"""What a step tells, against plain sums over rows."""

import logging
import math

import pytest
import torch

from tdkd import ops
from tdkd.diagnostics import Drift
from tdkd.diagnostics import diagnostics as shares
from tdkd.objectives import ForwardKL

GAMMA = 0.9


def diagnostics(*args, **options):
    """Of one micro-batch."""
    return {n: x[0] / x[1].clamp(min=1e-30) for n, x in shares(*args, **options).items()}


def make(q="log_prob", objective=None, gamma=GAMMA):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(9, 40, generator=generator) for _ in range(2))
    tokens = torch.randint(40, (9,), generator=generator)
    teacher[4, tokens[4]] = -torch.inf  # a token that the teacher excludes
    successor = torch.tensor([1, 2, -1, 4, 5, -2, 7, 8, -2])
    options = {"q": q, "successor": successor, "k": 6, "top_p": 0.9, "gamma": gamma}
    objective = objective or ForwardKL(tail=True)
    out = ops.td_loss(student, teacher, tokens, objective=objective, **options)
    return out, student, teacher, tokens, successor


@pytest.mark.parametrize("q", ["log_prob", "logit"])
def test_every_number(q):
    out, student, teacher, tokens, successor = make(q)
    told = diagnostics(out, tokens, successor, log_prob=q == "log_prob", gamma=GAMMA)
    told = {name: value.item() for name, value in told.items()}
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    sets = [row[row >= 0].long() for row in out.actions.ids]
    mass = torch.stack([log_p[i, ids].exp().sum() for i, ids in enumerate(sets)])
    mine = torch.stack([log_q[i, ids].exp().sum() for i, ids in enumerate(sets)])
    assert told["set_size"] == pytest.approx(sum(map(len, sets)) / 9)
    assert told["teacher_mass"] == pytest.approx(mass.mean().item(), rel=1e-5)
    assert told["kappa"] == pytest.approx(-9 * mass.log().mean().item(), rel=1e-5)
    ratios = [
        log_p[i, a] - mass[i].log() - log_q[i, a] + mine[i].log()
        for i, a in enumerate(tokens.tolist())
        if i != 4
    ]
    assert told["set_kl"] == pytest.approx(sum(map(float, ratios)) / 8, rel=1e-4)
    errors = out.td_error[successor != -2]
    assert told["td_error"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert told[f"td_error_{name}"] == pytest.approx(errors.quantile(share).item(), rel=1e-5)
    # the tail bucket computed log Z, whatever Q is
    assert told["student_mass"] == pytest.approx(mine.mean().item(), rel=1e-5)
    gap = (mine.log() - mass.log()).mean().item()
    assert told["value_gap"] == pytest.approx(gap, rel=1e-4)


def test_no_mass_is_told_where_the_loss_knows_none():
    out, _, _, tokens, successor = make("logit", objective=ForwardKL())
    assert out.log_mass is None
    told = diagnostics(out, tokens, successor, log_prob=False, gamma=GAMMA)
    assert not {"student_mass", "value_gap"} & set(told)


def test_at_gamma_zero_rows_that_were_cut_off_count_in_the_mean_too():
    out, _, _, tokens, successor = make(gamma=0.0)
    told = diagnostics(out, tokens, successor, log_prob=True, gamma=0.0)
    # nothing comes after, known or not: the error is Q
    torch.testing.assert_close(out.td_error, out.q)
    assert told["td_error"].item() == pytest.approx(out.q.abs().mean().item(), rel=1e-6)
    assert told["td_error_p50"].item() == pytest.approx(out.q.median().item(), rel=1e-6)


def test_without_discount_there_is_no_bound_and_without_rows_nothing():
    out, _, _, tokens, successor = make()
    assert "kappa" not in diagnostics(out, tokens, successor, log_prob=True, gamma=1.0)
    none = out._replace(
        q=out.q[:0], value=out.value[:0], td_error=out.td_error[:0], entropy=out.entropy[:0],
        log_mass=out.log_mass[:0], actions=ops.ActionSet(*(x[:0] for x in out.actions)),
    )  # fmt: skip
    told = diagnostics(none, tokens[:0], successor[:0], log_prob=True, gamma=GAMMA)
    assert all(math.isfinite(value) and value == 0 for value in told.values())
    assert set(told) == set(diagnostics(out, tokens, successor, log_prob=True, gamma=GAMMA))


def by_hand(q, log_prob, **more):
    """Two states over five tokens, of which the last has too little for the sets: halves and
    quarters, whose entropies are multiples of log 2, and a slot that is padded."""
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 4, 0, 0], [1 / 2, 1 / 2, 0, 0, 0]]).double()
    student = torch.tensor([[1, 1, 1, 1, 12], [1, 3, 4, 4, 4]]).double() / 16
    level = torch.tensor([[5.0], [-300.0]]).double()  # which nothing may see
    out = ops.td_loss(
        (student.log() + level).requires_grad_(), teacher.log(), torch.tensor([0, 1]),
        objective=ForwardKL(tail=True), successor=torch.tensor([1, -1]), q=q, k=4, top_p=0.99,
        **more,
    )  # fmt: skip
    assert out.actions.count.tolist() == [3, 2]
    told = diagnostics(
        out,
        torch.tensor([0, 1]),
        torch.tensor([1, -1]),
        log_prob=log_prob,
        gamma=GAMMA,
        state_value=more.get("state_value"),
    )
    return out, told


@pytest.mark.parametrize("q", ["log_prob", "logit", "shifted"])
def test_the_entropy_gap_by_hand(q):
    # the student on the sets: thirds, and a quarter with three
    mine = [math.log(3), 2 * math.log(2) - 0.75 * math.log(3)]
    theirs = [1.5 * math.log(2), math.log(2)]
    out, told = by_hand(q, q == "log_prob")
    torch.testing.assert_close(out.entropy, torch.tensor(mine).double())
    assert out.value.requires_grad
    assert not out.entropy.requires_grad
    expected = (mine[0] - theirs[0] + mine[1] - theirs[1]) / 2
    assert told["entropy_gap"].item() == pytest.approx(expected, rel=1e-6)


def test_a_value_head_moves_neither_mass_nor_entropy():
    plain, without = by_hand("log_prob", True)
    v = torch.tensor([2.0, -1.0]).double()
    out, told = by_hand("log_prob", True, state_value=v)
    torch.testing.assert_close(out.entropy, plain.entropy)
    torch.testing.assert_close(out.value, plain.value + v)
    for name in ("student_mass", "entropy_gap", "set_kl", "teacher_mass"):
        torch.testing.assert_close(told[name], without[name])
    assert without["student_mass"].item() == pytest.approx((3 / 16 + 4 / 16) / 2)
    assert told["state_value"].item() == 0.5
    assert told["value_gap"].item() == pytest.approx(without["value_gap"].item() + 0.5)


@pytest.mark.parametrize(
    "level, value_head, metric, why",
    [
        ("logit", False, "value", "q_level: log_prob has none"),
        ("logit", True, "value", "q_level: log_prob has none"),
        ("log_prob", True, "state_value", "The value head adds it to every Q"),
        ("shifted", True, "state_value", "The value head adds it to every Q"),
    ],
)
def test_a_level_that_drifts_is_told_once(caplog, level, value_head, metric, why):
    drift = Drift(level, value_head=value_head, looks_ahead=True)
    assert drift.metric == metric
    log = [{"loss": 1.0, "step": 1}]

    def see(value):
        drift.see(value, log)
        log.append({metric: value})

    with caplog.at_level(logging.WARNING, "tdkd"):
        for value in (3.0, 12.9, -6.9):
            see(value)
        assert not caplog.records
        see(13.1)
        see(99.0)
    (record,) = caplog.records
    assert f"{metric}: its mean went from 3.0 to 13.1 nats" in record.getMessage()
    assert why in record.getMessage()


@pytest.mark.parametrize(
    "level, value_head, looks_ahead",
    [
        ("log_prob", False, True),  # the mass on the sets of a cold start, which rises
        ("shifted", False, True),
        ("logit", False, False),
        ("log_prob", True, False),
    ],
)
def test_where_no_level_is_free_or_seen_nothing_is_looked_at(level, value_head, looks_ahead):
    assert not Drift(level, value_head=value_head, looks_ahead=looks_ahead).metric


def test_a_run_that_goes_on_is_held_to_where_it_began(caplog):
    drift = Drift("logit", value_head=False, looks_ahead=True)
    with caplog.at_level(logging.WARNING, "tdkd"):
        drift.see(14.0, [{"value": 3.0, "step": 1}, {"value": 12.0, "step": 2}])
    assert "from 3.0 to 14.0" in caplog.text
