"""tdkd verify --objective: every objective of ours passes, and each kind of mistake is found."""

import json

import pytest
import torch

from tdkd import cli
from tdkd.cli.verify import run
from tdkd.errors import UserError
from tdkd.objectives import ForwardKL, IQLearn, Objective, SoftTD
from tdkd.objectives.text import NAMED
from tdkd.td_rows import TDRows
from tdkd.verify_objective import QUESTIONS, draw, load, verify_objective

OPTIONS = {
    "device": "cpu",
    "dtype": [],
    "op": [],
    "cases": None,
    "full": False,
    "seed": 0,
    "output": None,
}


def failed(objective, cases=12):
    """The questions that it fails, each with its first failure."""
    findings = list(verify_objective(objective, name="it", cases=cases))
    assert [finding.dtype for finding in findings] == list(QUESTIONS)
    assert all(finding.cases == cases for finding in findings)
    return {finding.dtype: finding.failures[0] for finding in findings if finding.failures}


@pytest.mark.parametrize("name", NAMED)
def test_every_objective_passes(name):
    assert not failed(NAMED[name]())


@pytest.mark.parametrize(
    "objective",
    [
        ForwardKL(tail=True) + 0.1 * IQLearn("js", alpha=1.0, stop_gradient="next"),
        IQLearn(value="initial", expectation="teacher"),
        SoftTD(3) + SoftTD(lam=0.5, stop_gradient=None, huber=1.0),
        lambda rows: rows.value - rows.taken(rows.q),
    ],
    ids=["sum", "initial", "returns", "function"],
)
def test_so_do_sums_options_and_functions(objective):
    assert not failed(objective)


# Mistakes


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Mine(Objective):
    """A sound one, for others to spoil."""

    bootstraps = True
    rowwise = True

    def __call__(self, rows):
        return (rows.taken(rows.q) - rows.gamma * rows.next_value).square()


class WrongGradient(Mine):
    def __call__(self, rows):
        return _Doubled.apply(super().__call__(rows))


class ReadsTheFuture(Mine):
    """It says that it needs no V', and takes 0 for the unknown one."""

    bootstraps = False


class HidesTheFuture(Mine):
    looks_ahead = False


class ReadsTheMass(Mine):
    def __call__(self, rows):
        return super().__call__(rows) - rows.log_mass


class ReadsTheStart(Mine):
    def __call__(self, rows):
        return super().__call__(rows) + rows.occupancy * rows.value


class ReadsTheBatch(Mine):
    def __call__(self, rows):
        return super().__call__(rows) + rows.value.mean()


class MultipliesPadding(Mine):
    """0 * -inf where slots are padded."""

    def __call__(self, rows):
        return super().__call__(rows) + (rows.teacher_weights * rows.q).sum(-1)


class MasksTooLate(Mine):
    """The value is right, but its gradient is 0 * inf."""

    def __call__(self, rows):
        return super().__call__(rows) + torch.where(rows.valid, rows.q.exp().sqrt(), 0).sum(-1)


class ReadsPaddedSlots(Mine):
    def __call__(self, rows):
        return super().__call__(rows) + rows.valid.double().mean(-1) * rows.value


class OneNumber(Mine):
    def __call__(self, rows):
        return super().__call__(rows).sum()


class Raises(Mine):
    def __call__(self, rows):
        raise KeyError("no such field")


SPOILT = {
    WrongGradient: {"gradient": "Jacobian mismatch"},
    ReadsTheFuture: {
        "flags": "looks_ahead: expected True, since it reads rows.next_value, got False"
    },
    HidesTheFuture: {"flags": "looks_ahead: expected True where bootstraps is, got False"},
    ReadsTheMass: {"flags": "normalised: expected True, since it reads rows.log_mass"},
    ReadsTheStart: {"flags": "starts: expected True, since it reads rows.occupancy"},
    ReadsTheBatch: {"flags": "rowwise: expected False, since it reads other rows, got True"},
    MultipliesPadding: {"padding": "loss: expected a finite number, got nan"},
    MasksTooLate: {"padding": "gradient: expected finite numbers"},
    ReadsPaddedSlots: {"linear": "loss from hidden states and more padding: off by"},
    OneNumber: {"flags": "loss: expected one a row (5,), got ()"},
    Raises: dict.fromkeys(QUESTIONS, "KeyError: 'no such field'"),
}


@pytest.mark.parametrize("kind", SPOILT, ids=lambda kind: kind.__name__)
def test_mistakes_are_found(kind):
    found = failed(kind())
    for question, message in SPOILT[kind].items():
        assert message in found[question]
    if kind in (WrongGradient, HidesTheFuture, ReadsTheBatch, ReadsPaddedSlots):
        assert set(found) == set(SPOILT[kind])


def test_a_sound_one_is_not_blamed():
    assert not failed(Mine())


def test_a_sum_that_looks_ahead_where_it_cannot_is_found():
    """bootstraps may be False beside looks_ahead, if V' is not read where it is unknown."""

    class Sum(Mine):
        bootstraps = False
        looks_ahead = True

    assert (
        "bootstraps: expected True, since it reads V' where it is unknown" in failed(Sum())["flags"]
    )


def test_what_is_detached_is_held_constant():
    class Weighted(Mine):
        def __call__(self, rows):
            return rows.value.exp().detach() * super().__call__(rows)

    assert not failed(Weighted())

    class Hidden(Mine):
        """Gradients lost without a detach."""

        def __call__(self, rows):
            with torch.no_grad():
                weight = rows.value.exp()
            return weight * super().__call__(rows)

    found = failed(Hidden())
    assert set(found) == {"gradient"}
    assert (
        "under torch.no_grad() counts as a part of the loss here; call .detach()"
        in found["gradient"]
    )


def test_cases_hold_every_level_and_the_values_of_other_networks():
    drawn = [draw(seed, torch.device("cpu")) for seed in range(40)]
    assert {case.options["q"] for case in drawn} == {"log_prob", "logit", "shifted"}
    for name in ("expert_weight", "target_value", "state_value"):
        there = [case.options[name] is not None for case in drawn]
        assert 4 < sum(there) < 30
        assert [name in case.note for case in drawn] == there
    without = [draw(seed, torch.device("cpu"), target=False) for seed in range(40)]
    assert all(case.options["target_value"] is None for case in without)
    assert [case.tokens.tolist() for case in without] == [case.tokens.tolist() for case in drawn]


def test_gradients_of_a_value_head_are_asked_for(monkeypatch):
    """What cuts the value head off has the right gradient in the logits alone."""
    of = TDRows.of

    def cut(*args, state_value=None, **options):
        if state_value is not None:
            state_value = Cut.apply(state_value)
        return of(*args, state_value=state_value, **options)

    monkeypatch.setattr(TDRows, "of", cut)
    found = failed(Mine(), cases=20)
    assert set(found) == {"gradient"}
    assert "state_value" in found["gradient"]


# The command


MODULE = """
from tdkd.objectives import ForwardKL

class Good(ForwardKL):
    pass

class Bad(ForwardKL):
    rowwise = True
    def __call__(self, rows):
        return super().__call__(rows) + rows.value.mean()

class Needs(ForwardKL):
    def __init__(self, option):
        super().__init__()

INSTANCE = 0.5 * ForwardKL(tail=True)
NUMBER = 3

def function(rows):
    return rows.value - rows.taken(rows.q)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the directory where the command runs."""
    name = f"objectives_of_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return name


@pytest.mark.parametrize("name", ["Good", "INSTANCE", "function"])
def test_the_command_takes_classes_instances_and_functions(module, monkeypatch, capsys, name):
    arguments = ["tdkd", "verify", "--objective", f"{module}:{name}", "--cases", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    said = capsys.readouterr().err
    for question in QUESTIONS:
        assert question in said
    assert "12 cases, 0 of 4 lines failed" in said


def test_the_command_fails_and_tells_how_to_see_it_again(module, tmp_path, capsys):
    path = tmp_path / "findings.json"
    options = {"objective": f"{module}:Bad", "cases": 4, "seed": 7, "output": str(path)}
    assert run(**{**OPTIONS, **options}) == 1
    said = capsys.readouterr().err
    assert "Bad flags: seed 7: rowwise: expected False" in said
    again = f"again: tdkd verify --objective {module}:Bad --device cpu --seed 7 --cases 1"
    assert again in said
    written = json.loads(path.read_text())
    assert [(f["dtype"], f["passed"]) for f in written["findings"]] == [
        ("gradient", True),
        ("linear", True),
        ("padding", True),
        ("flags", False),
    ]


@pytest.mark.parametrize(
    "spec, message",
    [
        (":ForwardKL", "objective: expected module:name, got ':ForwardKL'"),
        ("KL(tail=True)", "objective: expected one of ForwardKL, .*got KL"),
        ("nowhere.at.all:X", "objective: expected a module to import, got 'nowhere.at.all:X'"),
        ("tdkd.objectives:KL", "objective: expected a name in tdkd.objectives, got"),
        ("{}:Needs", "objective: expected a class that needs no arguments, got"),
        ("{}:NUMBER", "objective: expected a class, an instance or a function of Rows, got"),
    ],
)
def test_what_is_no_objective_is_refused(module, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        run(**{**OPTIONS, "objective": spec.format(module)})
    assert "\n" not in str(caught.value)


def test_options_of_the_ops_are_refused_beside_an_objective():
    spec = "tdkd.objectives:ForwardKL"
    with pytest.raises(UserError, match="objective: expected neither op nor dtype beside it"):
        run(**{**OPTIONS, "objective": spec, "op": ["gather_q"]})
    with pytest.raises(UserError, match="device: expected one of this machine, got nowhere"):
        run(**{**OPTIONS, "objective": spec, "device": "nowhere"})


def test_load_takes_paths_and_texts(module):
    assert isinstance(load("tdkd.objectives.inverse:IQLearn"), IQLearn)
    text = "0.5 * ForwardKL(tail=True) + 1 * SoftTD(steps=2)"
    assert repr(load(text)) == repr(0.5 * ForwardKL(tail=True) + SoftTD(2))


def test_an_objective_that_reads_successors_and_denies_it_is_found():
    class Ends(ForwardKL):
        def __call__(self, rows):
            return torch.where(rows.successor == -1, 5.0, 1.0) * super().__call__(rows)

    class Honest(Ends):
        successors = True

    for kind, failing in ((Ends, True), (Honest, False)):
        findings = list(verify_objective(kind(tail=True), name="x", cases=20))
        told = [failure for finding in findings for failure in finding.failures]
        assert any("successors: expected True" in failure for failure in told) == failing
        assert bool(told) == failing
