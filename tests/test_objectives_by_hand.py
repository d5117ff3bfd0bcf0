"""Objectives on rows that fit on paper, their defaults, and what they refuse.

All is made inside of the tests, where `make mutants` reaches it.
"""

import math

import pytest
import torch

from tdkd import objectives as o
from tdkd import ops
from tdkd.td_rows import TDRows
from tdkd.types import Rows


def make(q=(-1.0, -2.0), p=(-0.5, -1.5), ahead=-0.3, gamma=0.9, **more):
    """One row, two members, the first one taken."""
    q, p = (torch.tensor([x], dtype=torch.float64) for x in (q, p))
    given = {
        "q": q,
        "log_probs": p,
        "valid": torch.tensor([[True, True]]),
        "slot": torch.tensor([0]),
        "value": q.logsumexp(-1),
        "next_value": torch.tensor([ahead], dtype=torch.float64),
        "successor": torch.tensor([0]),
        "state": torch.tensor([True]),
        "gamma": gamma,
        "log_mass": q.logsumexp(-1),
        "log_tail": torch.log1p(-q.exp().sum(-1)),
        "occupancy": torch.tensor([3.0], dtype=torch.float64),
    }
    return Rows(**{**given, **more})


def test_every_phi_at_five_rewards():
    ln = math.log
    knee = {
        "reverse_kl": (-ln(10), -9.0),
        "forward_kl": (-0.9, ln(0.1)),
        "hellinger": (10**-0.5 - 1, (10**-0.5 - 1) / 10**-0.5),
        "js": (ln(0.55), ln(2 - 1 / 0.55)),
    }
    formula = {
        "chi2": lambda x: x - x * x / 4,
        "reverse_kl": lambda x: 1 - math.exp(-x),
        "forward_kl": lambda x: ln(1 + x),
        "hellinger": lambda x: x / (1 + x),
        "js": lambda x: ln(2 - math.exp(-x)),
        "tv": lambda x: min(x, 0.5),
        "identity": lambda x: x,
    }
    for name, phi in formula.items():
        for x in (-4.0, -0.2, 0.0, 0.3, 2.0):
            for alpha in (1.0, 0.5):
                # Q(a) is x where V' is 0
                rows = make(q=(x, -20.0), ahead=0.0)
                at = x / alpha
                wanted = phi(at) if name not in knee or at >= knee[name][0] else None
                if wanted is None:
                    low, height = knee[name]
                    wanted = height + 10 * (at - low)
                loss = float(o.IQLearn(name, alpha=alpha)(rows))
                assert loss == pytest.approx(float(rows.value) - alpha * wanted, abs=1e-9), name


def test_iq_learn_in_both_value_forms():
    rows = make()
    x, v = -1.0 + 0.27, float(rows.value)
    phi = x - x * x / 0.4
    assert float(o.IQLearn()(rows)) == pytest.approx(v + 0.27 - phi)
    assert float(o.IQLearn(value="initial")(rows)) == pytest.approx(3 * (v + 0.27 - phi))
    own = make(expert_weight=torch.zeros(1).double())
    assert float(o.IQLearn(value="initial")(own)) == pytest.approx(3 * (v + 0.27))


def test_ls_iq_and_sqil():
    rows = make()
    x, v = -1.0 + 0.27, float(rows.value) + 0.27
    assert float(o.LSIQ()(rows)) == pytest.approx(v - x + 0.25 * (x * x + v * v))
    assert float(o.LSIQ(1.0)(rows)) == pytest.approx(v - x + 0.5 * (x * x + v * v))
    assert float(o.SQIL()(rows)) == pytest.approx((x - 1) ** 2)
    assert float(o.SQIL(reward=0.5)(rows)) == pytest.approx((x - 0.5) ** 2)


def test_soft_td_in_one_step():
    rows = make()
    teachers = math.log(math.exp(-0.5) + math.exp(-1.5))
    error = -1.0 - -0.5 - 0.9 * (-0.3 - teachers)
    # the successor is the row itself, whose V* is that of the teacher here
    assert float(o.SoftTD()(rows)) == pytest.approx(error**2)
    assert float(o.SoftTD(huber=0.01)(rows)) == pytest.approx(2 * 0.01 * (abs(error) - 0.005))
    still = make(gamma=0.0)
    assert float(o.SoftTD()(still)) == pytest.approx(0.25)
    none = make(p=(-math.inf, -0.1))
    assert float(o.SoftTD()(none)) == 0


def test_divergences_of_two_tokens_and_their_tail():
    rows = make()
    p, q = (torch.tensor(x, dtype=torch.float64).exp() for x in ((-0.5, -1.5), (-1.0, -2.0)))
    whole = [torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q)]
    renormalised = [x / x.sum() for x in (p, q)]

    def kl(a, b):
        return float((a * (a / b).log()).sum())

    for tail, (a, b) in ((False, renormalised), (True, whole)):
        given = {"tail": tail}
        m = 0.5 * (a + b)
        wanted = {
            o.ForwardKL(**given): kl(a, b),
            o.ReverseKL(**given): kl(b, a),
            o.JSD(**given): 0.5 * kl(a, m) + 0.5 * kl(b, m),
            o.SkewKL(**given): kl(a, 0.1 * a + 0.9 * b),
            o.SkewKL(reverse=True, **given): kl(b, 0.9 * a + 0.1 * b),
            o.TotalVariation(**given): float((a - b).abs().sum()) / 2,
            o.LK(form="log", **given): -math.log(float(torch.minimum(a, b).sum())),
            o.CrossEntropy(**given): -math.log(float(b[0])),
        }
        for objective, value in wanted.items():
            assert float(objective(rows)) == pytest.approx(value, abs=1e-9), objective


def test_mixtures_where_a_model_excludes_a_token():
    rows = make(p=(-0.5, -math.inf))
    b = float(torch.tensor([-1.0, -2.0]).double().softmax(-1)[0])
    loss = float(o.JSD()(rows))
    wanted = 0.5 * math.log(1 / (0.5 + 0.5 * b)) + 0.5 * (
        b * math.log(b / (0.5 + 0.5 * b)) + (1 - b) * math.log(2)
    )
    assert loss == pytest.approx(wanted)
    assert float(o.LK(form="log")(rows)) == pytest.approx(-math.log(b))
    assert float(o.TotalVariation()(rows)) == pytest.approx(1 - b)


def test_what_constructors_refuse():
    refused = {
        "phi: expected one of": lambda: o.IQLearn("chi3"),
        "alpha: expected": lambda: o.IQLearn(alpha=0.0),
        "expectation: expected one of": lambda: o.IQLearn(expectation="student"),
        "stop_gradient: expected one of": lambda: o.IQLearn(stop_gradient="all"),
        "value: expected one of": lambda: o.IQLearn(value="first"),
        "c: expected": lambda: o.LSIQ(0.0),
        "expert: expected one of": lambda: o.LSIQ(expert="none"),
        "clip: expected one of": lambda: o.LSIQ(clip="yes"),
        "beta: expected": lambda: o.JSD(1.5),
        "form: expected one of": lambda: o.LK(form="square"),
        "eta: expected": lambda: o.LK(eta=-1.0),
        "reverse: expected one of": lambda: o.SkewKL(reverse="yes"),
        "tail: expected one of": lambda: o.ForwardKL(tail="yes"),
        "lam: expected": lambda: o.SoftTD(lam=1.5),
        "huber: expected": lambda: o.SoftTD(huber=0.0),
    }
    for message, build in refused.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            build()
    with pytest.raises(ValueError, match=r"^alpha: expected .*\[0, 1\), got 1"):
        o.SkewKL(1.0)
    for build in (o.LSIQ, o.SQIL, o.SoftTD):
        with pytest.raises(ValueError, match="^stop_gradient: expected one of"):
            build(stop_gradient="all")


def test_defaults():
    said = {
        o.IQLearn(): "IQLearn(phi='chi2', alpha=0.1, expectation='token', stop_gradient=None, "
        "value='expert')",
        o.LSIQ(): "LSIQ(c=0.5, expert='bootstrap', clip=True, stop_gradient='next')",
        o.SQIL(): "SQIL(reward=1.0, stop_gradient='next')",
        o.SoftTD(): "SoftTD(steps=1, lam=None, stop_gradient='next', huber=None)",
        o.ForwardKL(): "ForwardKL(tail=False)",
    }
    for objective, text in said.items():
        assert repr(objective) == text
    assert o.SkewKL().reverse is False
    assert o.SkewKL().alpha == 0.1
    assert o.JSD().beta == 0.5


def test_a_response_begins_where_no_row_leads_though_rows_are_in_any_order():
    ids = torch.zeros(4, 1, dtype=torch.int32)

    def of(gamma, **more):
        return TDRows.of(
            ids,
            torch.zeros(4, 1),
            torch.tensor([0, 0, -100, 0]),
            torch.tensor([-1, 0, -2, -2]),
            ignore_index=-100,
            objective=o.IQLearn(value="initial"),
            level="logit",
            gamma=gamma,
            soft_value=ops.soft_value,
            **more,
        )

    rows = of(0.9, target_value=torch.tensor([1.0, 2.0, 5.0, 3.0]))
    assert rows.occupancy.tolist() == pytest.approx([2 * 0.9 / 1.9, 2 / 1.9, 0, 0])
    assert rows.target_value.tolist() == [1, 2, 0, 3]
    assert of(1.0).occupancy.tolist() == [1, 1, 0, 0]
    assert of(0.0).occupancy.tolist() == [0, 2, 0, 1]
    assert rows.take(torch.tensor([1, 0])).occupancy.tolist() == rows.occupancy[[1, 0]].tolist()


def test_shifted_values_with_padded_slots_and_rows_that_are_no_states():
    student = torch.tensor([[5.0, 3.0, -20.0], [1.0, 2.0, 3.0]])
    teacher = torch.zeros(2, 3)
    out = ops.td_loss(
        student,
        teacher,
        torch.tensor([1, -100]),
        objective=o.IQLearn(),
        q="shifted",
        k=5,
        top_p=1.0,
    )
    assert out.q.tolist() == [-2, 0]
    value = math.log(1 + math.exp(-2) + math.exp(-10))
    assert out.value.tolist() == pytest.approx([value, 0])
    for name in ("target_value", "state_value"):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ops.td_loss(student, teacher, torch.tensor([1, 0]), **{name: torch.zeros(3)})
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ops.td_loss(
                student, teacher, torch.tensor([1, 0]), **{name: torch.zeros(2, device="meta")}
            )
    scalar = ops.td_loss(
        student[0],
        teacher[0],
        torch.tensor(1),
        objective=o.ForwardKL(),
        state_value=torch.zeros(()),
    )
    assert scalar.loss.isfinite()
