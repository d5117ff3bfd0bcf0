"""The published loss: the authors' figures, a case by hand, and where it leaves the paper."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tdkd import ops
from tdkd.objectives import IQLearn
from tdkd.published import published_loss

FIXTURE = Path(__file__).resolve().parents[2] / "shared/fixtures/published_bd.npz"
OPTIONS = ("top_p", "epsilon", "temperature", "chi2", "gamma", "alpha")
PAD = 0
DEPARTURES = range(1, 10)
WITHOUT_EFFECT = {
    (2, 3),  # no logit of case 3 is more than 10 below its row's maximum
    (7, 4),  # the last column of case 4 is padding
}

needs_figures = pytest.mark.skipif(not FIXTURE.exists(), reason="the published figures are absent")
every_case = pytest.mark.parametrize("number", range(5))


def figures(number):
    """One case: its arrays, and the options that made it."""
    prefix = f"case{number}/"
    with np.load(FIXTURE) as stored:
        case = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
    options = dict(zip(OPTIONS, case.pop("params").tolist(), strict=True))
    return case, {**options, "chi2": bool(options["chi2"])}


def tensors(case):
    return (torch.from_numpy(case[name]) for name in ("student_logits", "teacher_logits", "tokens"))


def logsumexp(x):
    peak = x.max(-1, keepdims=True)
    return np.log(np.exp(x - peak).sum(-1)) + peak[..., 0]


def in_numpy(case, options, undone=()):
    """The loss again, in numpy; ``undone`` lists departures from the paper to take back."""
    tokens, inside = case["tokens"], case["support"]
    state = tokens != PAD
    if 8 in undone:  # the first padding token was the response's EOS
        state = state | np.pad(state[:, :-1], ((0, 0), (1, 0)))
    z = case["student_logits"] / options["temperature"]
    level = z.max(-1, keepdims=True)
    q = z - level if 2 in undone else np.maximum(z - level, -10.0)
    policy = np.exp(q - logsumexp(q)[..., None]) * inside
    policy /= policy.sum(-1, keepdims=True) if 4 in undone else options["top_p"]
    policy += options["epsilon"]
    policy /= policy.sum(-1, keepdims=True)
    if 1 in undone:
        q = q + level
    if 3 in undone:
        value = logsumexp(np.where(inside, q, -np.inf))
    else:
        value = (policy * (q - np.log(policy))).sum(-1)
    value = value * state

    future = options["gamma"] * np.pad(value[:, 1:], ((0, 0), (0, 1)))
    error = q * (inside & state[..., None]) - future[..., None]
    phi = error - error**2 / (4 * options["alpha"]) if options["chi2"] else error
    if 5 in undone:
        imitation = np.take_along_axis(phi, tokens[..., None], -1)[..., 0]
    else:
        imitation = (phi * inside if 6 in undone else phi).mean(-1)
    counted = state.copy()
    if 7 not in undone:
        counted[:, -1] = False
    if 9 in undone:  # a state before padding was cut off
        counted[:, :-1] &= state[:, 1:]
    return ((value - future - imitation) * counted).sum() / counted.sum()


@needs_figures
@every_case
def test_reproduces_the_published_figures(number):
    case, options = figures(number)
    student, teacher, tokens = tensors(case)
    student.requires_grad_()
    loss, value = published_loss(student, teacher, tokens, pad_token_id=PAD, **options)
    (grad,) = torch.autograd.grad(loss, student)
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    np.testing.assert_allclose(value.item(), case["v_mean"], rtol=1e-6)
    np.testing.assert_allclose(grad, case["grad"], rtol=1e-6, atol=1e-12)
    given = torch.from_numpy(case["support"])
    again = published_loss(student, teacher, tokens, pad_token_id=PAD, support=given, **options)
    assert (again[0], again[1]) == (loss, value)


@needs_figures
@every_case
def test_support_is_our_action_set(number):
    case, options = figures(number)
    teacher = torch.from_numpy(case["teacher_logits"])
    actions = ops.select_actions(teacher, k=teacher.shape[-1], top_p=options["top_p"])
    support = np.zeros(teacher.shape, dtype=bool)
    for position in np.ndindex(*support.shape[:2]):
        support[position][actions.ids[position][: actions.count[position]]] = True
    assert (support == case["support"]).all()


@needs_figures
@every_case
@pytest.mark.parametrize("departure", DEPARTURES)
def test_taking_a_departure_back_changes_the_figure(number, departure):
    case, options = figures(number)
    np.testing.assert_allclose(in_numpy(case, options), case["loss"], rtol=1e-8)
    change = abs(in_numpy(case, options, {departure}) / case["loss"] - 1)
    if (departure, number) in WITHOUT_EFFECT:
        assert change < 1e-8
    else:
        assert change > 1e-6


@needs_figures
@every_case
@pytest.mark.parametrize("ending", [8, 9])
def test_taking_all_departures_back_gives_the_papers_objective(number, ending):
    """Then nothing is left between the published code and our op on raw logits.

    The last two departures exclude each other: padding either begins with EOS or cuts off.
    """
    case, options = figures(number)
    student, teacher, tokens = tensors(case)
    state = tokens != PAD
    if ending == 8:
        state[:, 1:] |= tokens[:, :-1] != PAD
    rows = torch.arange(tokens.numel()).view(tokens.shape)
    successor = torch.full_like(tokens, -1)
    successor[:, :-1] = torch.where(state[:, 1:], rows[:, 1:], -1 if ending == 8 else -2)
    out = ops.td_loss(
        student,
        teacher,
        torch.where(state, tokens, -100),
        objective=IQLearn("chi2" if options["chi2"] else "identity", alpha=options["alpha"]),
        q="logit",
        k=student.shape[-1],
        top_p=options["top_p"],
        gamma=options["gamma"],
        temperature=options["temperature"],
        successor=successor,
    )
    np.put_along_axis(case["support"], case["tokens"][..., None], True, -1)  # our sets hold it
    undone = set(DEPARTURES) - {8, 9} | {ending}
    np.testing.assert_allclose(out.loss.item(), in_numpy(case, options, undone), rtol=1e-10)


@pytest.mark.parametrize("chi2, figure", [(True, -0.14824812), (False, -0.29178763)])
def test_a_case_worked_by_hand(chi2, figure):
    """Two states over three tokens: student (0, -ln 2, -inf) and (0, 0, -ln 2), set {0, 1}."""
    half = math.log(2)
    student = torch.tensor([[[0.0, -half, -math.inf], [0.0, 0.0, -half]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 1.0, -9.0], [1.0, 1.0, -9.0]]])
    options = {"top_p": 0.8, "epsilon": 0.25, "gamma": 0.5, "alpha": 1.0, "pad_token_id": PAD}
    loss, mean_value = published_loss(
        student, teacher, torch.tensor([[5, 6]]), chi2=chi2, **options
    )

    def value(q, softmax):
        smoothed = [softmax[0] / 0.8 + 0.25, softmax[1] / 0.8 + 0.25, 0.25]
        policy = [p / sum(smoothed) for p in smoothed]
        return sum(p * (x - math.log(p)) for p, x in zip(policy, q, strict=True))

    z = 1.5 + math.exp(-10)  # -inf enters at the floor
    here = value([0, -half, -10], [1 / z, 0.5 / z])
    following = value([0, 0, -half], [0.4, 0.4])
    errors = [0 - following / 2, -half - following / 2, 0 - following / 2]
    imitation = sum(x - x * x / 4 if chi2 else x for x in errors) / 3
    assert loss.item() == pytest.approx(here - following / 2 - imitation, rel=1e-12)
    assert loss.item() == pytest.approx(figure, abs=1e-8)
    assert mean_value.item() == pytest.approx((here + following) / 2, rel=1e-12)


def test_value_tends_to_the_soft_value_as_smoothing_vanishes():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 20, generator=generator, dtype=torch.float64)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    _, mean_value = published_loss(student, teacher, tokens, epsilon=1e-14, pad_token_id=PAD)
    ids = ops.select_actions(teacher, k=20, top_p=0.8).ids
    soft = ops.soft_value(ops.gather_q(student - student.amax(-1, keepdim=True), ids))
    assert mean_value.item() == pytest.approx(soft.mean().item(), rel=1e-10)


def test_gradient_in_float64():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 4, 7, generator=generator, dtype=torch.float64) * 4
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, PAD, PAD]])
    assert torch.autograd.gradcheck(
        lambda z: published_loss(z, teacher, tokens, pad_token_id=PAD, temperature=1.5),
        (student.requires_grad_(),),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 2, 4, 30, generator=generator).to(dtype)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, PAD, PAD]])
    loss, mean_value = published_loss(student, teacher, tokens, pad_token_id=PAD)
    exact = published_loss(student.double(), teacher, tokens, pad_token_id=PAD)
    assert loss.dtype == mean_value.dtype == torch.float32
    torch.testing.assert_close((loss.double(), mean_value.double()), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_logits": torch.zeros(4, 5)}, r"student_logits: .*\(B, T, V\), got \(4, 5\)"),
        ({"teacher_logits": torch.zeros(2, 3, 6)}, r"teacher_logits: expected \(2, 3, 5\)"),
        ({"tokens": torch.ones(2, 4)}, r"tokens: expected \(2, 3\) .* got \(2, 4\)"),
        ({"tokens": torch.zeros(2, 3)}, r"tokens: .*not padding \(0\) before the last column"),
        ({"support": torch.ones(5, dtype=torch.bool)}, r"support: .* got \(5,\)"),
        ({"epsilon": 0.0}, "epsilon: expected a number > 0, got 0.0"),
        ({"temperature": -1.0}, "temperature: .*got -1.0"),
        ({"top_p": 0.0}, "top_p: .*got 0.0"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "student_logits": torch.zeros(2, 3, 5),
        "teacher_logits": torch.zeros(2, 3, 5),
        "tokens": torch.ones(2, 3, dtype=torch.int64),
        "pad_token_id": PAD,
    }
    with pytest.raises(ValueError, match=message) as caught:
        published_loss(**{**arguments, **change})
    assert "\n" not in str(caught.value)
