"""tdkd verify: it passes here, and it finds what is wrong."""

import json

import pytest
import torch

from tdkd import ops, verify
from tdkd.cli.verify import run
from tdkd.errors import UserError
from tdkd.kernels import backends, gather_q, linear_select_actions, select_actions

pytestmark = pytest.mark.skipif(backends.MISSING is not None, reason=str(backends.MISSING))
OPTIONS = {
    "device": "cpu",
    "dtype": [],
    "op": [],
    "cases": None,
    "full": False,
    "seed": 0,
    "output": None,
}


@pytest.mark.parametrize("op", verify.SUBJECTS)
def test_every_op_passes(op):
    for finding in verify.verify(ops_=[op], cases=40):
        assert finding.passed, finding.failures[:3]
        assert finding.cases == 40


def test_memory_graphs_and_operators_pass():
    for source in (verify.memory_findings, verify.graph_findings, verify.raw_findings):
        for finding in source("cpu"):
            assert finding.passed, (finding.op, finding.failures)


def found(op, dtype="float32", cases=12):
    (finding,) = verify.verify(ops_=[op], dtypes=[dtype], cases=cases)
    return finding


def test_a_gradient_that_is_off_by_a_thousandth_is_found(monkeypatch):
    backward = gather_q._GatherQ.backward
    monkeypatch.setattr(
        gather_q._GatherQ,
        "backward",
        staticmethod(lambda ctx, grad: backward(ctx, grad * 1.001)),
    )
    finding = found("gather_q")
    assert not finding.passed
    assert "gradient 0" in finding.failures[0]
    number = int(finding.failures[0].split(":")[0].removeprefix("seed "))
    assert verify.compare("gather_q", "float32", "cpu", number)[1]


def test_ids_in_another_order_are_found(monkeypatch):
    kernel = select_actions.select_actions

    def swapped(*args, **kwargs):
        given = kernel(*args, **kwargs)
        return given._replace(ids=given.ids.flip(-1))

    monkeypatch.setattr(select_actions, "select_actions", swapped)
    assert any("other ids" in failure for failure in found("select_actions").failures)


def test_runs_that_differ_are_found(monkeypatch):
    kernel = gather_q.gather_q

    def noisy(*args, **kwargs):
        q = kernel(*args, **kwargs)
        return q * (1 + torch.rand(()) * 1e-7)

    monkeypatch.setattr(gather_q, "gather_q", noisy)
    assert any("two runs differ" in failure for failure in found("gather_q").failures)


def test_logits_that_exist_whole_are_found(monkeypatch):
    def whole(hidden, weight, *args):
        return select_actions.select_actions(hidden @ weight.T, *args[1:])

    monkeypatch.setattr(linear_select_actions, "linear_select_actions", whole)
    findings = verify.memory_findings("cpu", ["select_actions", "linear_select_actions"])
    passed = {finding.op: finding for finding in findings}
    assert passed["select_actions"].passed
    assert not passed["linear_select_actions"].passed
    assert 2 < passed["linear_select_actions"].worst < 4
    assert "bytes that it may take" in passed["linear_select_actions"].failures[0]


def test_a_kernel_that_raises_is_one_failure_among_others(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gather_q, "gather_q", broken)
    options = {"op": ["gather_q", "soft_value"], "dtype": ["float32"], "cases": 2}
    assert run(**{**OPTIONS, **options}) == 1
    said = capsys.readouterr().err
    assert "no such luck" in said
    assert "tdkd verify --op gather_q --dtype float32 --device cpu --seed 0 --cases 1" in said
    assert "1 of 2 lines failed" in said


def test_the_json_holds_every_line(tmp_path):
    path = tmp_path / "verify.json"
    options = {"op": ["soft_value"], "cases": 2, "output": str(path), "seed": 5}
    assert run(**{**OPTIONS, **options}) == 0
    written = json.loads(path.read_text())
    assert [(f["op"], f["dtype"], f["passed"]) for f in written["findings"]] == [
        ("soft_value", dtype, True) for dtype in verify.DTYPES
    ]
    assert written["seed"] == 5
    assert written["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "options, message",
    [
        ({"op": ["max"]}, "op: expected one of select_actions, .*got max"),
        ({"dtype": ["int8"]}, "dtype: expected one of float32, .*got int8"),
        ({"cases": 0}, "cases: expected a number >= 1, got 0"),
        ({"device": "meta"}, "device: expected one with kernels, got meta"),
        ({"device": "abacus"}, "device: expected one of this machine, got abacus: "),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(UserError, match=message):
        run(**{**OPTIONS, **options})


def test_excess_is_measured_in_last_places_of_a_row():
    exact = torch.tensor([[1.0, 1000.0], [1.0, 2.0]], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    got = exact.float()
    got[1, 0] += 8 * eps
    assert verify.excess(got, exact.float(), exact, 0.0, False) == pytest.approx(4)
    assert verify.excess(got, exact.float(), exact, 0.0, True) == pytest.approx(0.008)
    assert verify.excess(got, got, exact, 0.0, False) == 0
    got[0, 0] = torch.nan
    assert verify.excess(got, exact.float(), exact, 0.0, False) == float("inf")
    assert ops.__all__  # the subjects are public ops
    assert set(verify.SUBJECTS) <= set(ops.__all__)


@pytest.mark.parametrize("op", ["td_loss", "linear_td_loss"])
def test_quick_cases_hold_finite_masks(op):
    draws = [
        verify.Draw(seed, torch.float32, torch.device("cpu"))
        for seed in range(verify.CASES["quick"])
    ]
    assert any("suppressed" in verify.SUBJECTS[op](draw).note for draw in draws)
