"""What the options of the ops mean: their defaults, what ``check`` sees, what else is refused."""

import math

import pytest
import torch
from checks import check_refused
from test_ops import LargestTensor

from tdkd import arguments, ops
from tdkd.kernels import backends, routes
from tdkd.kernels.batch_vocabulary.reference import inclusion, systematic
from tdkd.kernels.linear_rows import reference as linear_rows_reference
from tdkd.kernels.linear_rows.reference import position_in, row_chunks
from tdkd.objectives import (
    SQIL,
    CrossEntropy,
    ForwardKL,
    IQLearn,
    Objective,
    ReverseKL,
    as_objective,
)
from tdkd.td_rows import TDRows

V, H = 90, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def dense():
    """Student and teacher logits and tokens; some rows are no states."""
    tokens = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = tokens[1, 3] = -100
    return draw(2, 5, V), draw(2, 5, V, seed=1), tokens


@pytest.fixture
def linear():
    """Hidden states and heads with biases."""
    return {
        "student_hidden": draw(2, 5, H),
        "student_weight": draw(V, H, seed=1),
        "bias": draw(V, seed=2),
        "teacher_hidden": draw(2, 5, H + 2, seed=3),
        "teacher_weight": draw(V, H + 2, seed=4),
        "teacher_bias": draw(V, seed=5),
    }


def same(got, expected):
    """Two outputs of an op, or tensors, are equal, bit for bit."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, expected)), strict=True)
    for x, y in pairs:
        assert torch.equal(x, y)


# Defaults are what the documentation says


HEAD_DEFAULTS = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
LOSS_DEFAULTS = {
    "objective": IQLearn(),
    "q": "log_prob",
    "k": 64,
    "top_p": 0.8,
    "gamma": 0.99,
    "teacher_temperature": 1.0,
    "teacher_softcap": None,
    "teacher_logit_scale": 1.0,
    "ignore_index": -100,
    "reduction": "mean",
    **HEAD_DEFAULTS,
}


def test_defaults_of_selection(dense, linear):
    flat = torch.zeros(V)  # 64 of 90 equal tokens
    defaults = {"k": 64, "top_p": 1.0, **HEAD_DEFAULTS}
    for logits in (dense[1], flat):
        same(ops.select_actions(logits), ops.select_actions(logits, **defaults))
    assert ops.select_actions(flat).count == 64
    hidden, weight = linear["teacher_hidden"], linear["teacher_weight"]
    got = ops.linear_select_actions(hidden, weight)
    same(got, ops.linear_select_actions(hidden, weight, **defaults))
    assert (got.count == 64).all()


def test_defaults_of_values_on_ids(dense, linear):
    ids = torch.randint(V, (2, 5, 7), generator=torch.Generator().manual_seed(1))
    hidden, weight = linear["student_hidden"], linear["student_weight"]
    same(ops.gather_q(dense[0], ids), ops.gather_q(dense[0], ids, **HEAD_DEFAULTS))
    for op, given in (
        (ops.linear_gather_q, (hidden, weight, ids)),
        (ops.linear_log_probs, (hidden, weight, ids)),
        (ops.linear_logsumexp, (hidden, weight)),
    ):
        same(op(*given), op(*given, **HEAD_DEFAULTS))


@pytest.mark.parametrize("flat", [False, True])
def test_defaults_of_the_losses(dense, linear, flat):
    student, teacher, tokens = dense
    if flat:  # then a set is full, and its size is k
        teacher, linear["teacher_hidden"] = teacher * 0, linear["teacher_hidden"] * 0
        linear["teacher_bias"] = linear["teacher_bias"] * 0
    same(
        ops.td_loss(student, teacher, tokens),
        ops.td_loss(student, teacher, tokens, **LOSS_DEFAULTS),
    )
    same(
        ops.linear_td_loss(tokens=tokens, **linear),
        ops.linear_td_loss(tokens=tokens, normaliser="exact", **linear, **LOSS_DEFAULTS),
    )
    if flat:
        assert ops.td_loss(student, teacher, tokens).actions.ids.shape[-1] == 64
        assert ops.linear_td_loss(tokens=tokens, **linear).actions.ids.shape[-1] == 64


def test_defaults_of_targets_and_successors():
    value, successor = draw(6), torch.tensor([1, 2, -1, 4, 5, -2])
    same(ops.td_target(value, successor), ops.td_target(value, successor, gamma=0.99, lam=None))
    tokens = torch.tensor([-100, 5, 6, 2, -100, 8])
    assert ops.successors(tokens).tolist() == [-2, 2, 3, -2, -2, -2]
    other = torch.where(tokens == -100, 0, tokens)
    assert ops.successors(other, ignore_index=0).tolist() == [-2, 2, 3, -2, -2, -2]


def test_defaults_of_the_batch_vocabulary(linear, dense):
    """1024 columns are sampled, unless it is said how many."""
    actions = ops.ActionSet(
        torch.tensor([[3, 7]], dtype=torch.int32), torch.zeros(1, 2), torch.tensor([2])
    )
    assert ops.batch_vocabulary(actions, 5000).ids.numel() == 2 + 1024
    weight = draw(5000, H, dtype=torch.float32)
    options = {
        "actions": actions,
        "objective": ForwardKL(tail=True),
        "normaliser": "batch",
    }

    def loss(**more):
        generator = torch.Generator().manual_seed(0)
        hidden = draw(1, H, seed=8, dtype=torch.float32)
        tokens = torch.tensor([3])
        return ops.linear_td_loss(
            hidden, weight, tokens, generator=generator, **options, **more
        ).loss

    assert torch.equal(loss(), loss(extra=1024))
    assert not torch.equal(loss(), loss(extra=1023))


# What options do


def test_the_teachers_options_are_those_of_its_selection(dense, linear):
    student, teacher, tokens = dense
    taken = torch.where(tokens == -100, -1, tokens)
    state = tokens != -100
    hidden, weight = linear["teacher_hidden"], linear["teacher_weight"]
    for name, value in (("temperature", 0.4), ("softcap", 1.5), ("logit_scale", 2.5)):
        option, given = {name: value}, {f"teacher_{name}": value}
        plain = ops.select_actions(teacher, 9, 0.7, include=taken)
        wanted = ops.select_actions(teacher, 9, 0.7, include=taken, **option)
        assert not torch.equal(plain.log_probs, wanted.log_probs)
        got = ops.td_loss(student, teacher, tokens, k=9, top_p=0.7, **given).actions
        same([x[state] for x in got], [x[state] for x in wanted])
        wanted = ops.linear_select_actions(
            hidden, weight, 9, 0.7, bias=linear["teacher_bias"], include=taken, **option
        )
        got = ops.linear_td_loss(tokens=tokens, k=9, top_p=0.7, **linear, **given).actions
        same([x[state] for x in got], [x[state] for x in wanted])


def test_the_students_options_are_those_of_its_logits(dense):
    student, teacher, tokens = dense
    options = {"q": "logit", "k": 5, "objective": CrossEntropy(tail=True)}
    for scaled, given in (
        (student / 0.4, {"temperature": 0.4}),
        (1.5 * torch.tanh(student / 1.5), {"softcap": 1.5}),
        (student * 2.5, {"logit_scale": 2.5}),
    ):
        got = ops.td_loss(student, teacher, tokens, **given, **options)
        torch.testing.assert_close(got, ops.td_loss(scaled, teacher, tokens, **options))


def test_a_row_that_is_ignored_is_so_by_any_mark(dense, linear):
    student, teacher, tokens = dense
    marked = torch.where(tokens == -100, -7, tokens)
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "gamma": 0.5}):
        same(
            ops.td_loss(student, teacher, marked, ignore_index=-7, **options),
            ops.td_loss(student, teacher, tokens, **options),
        )
        same(
            ops.linear_td_loss(tokens=marked, ignore_index=-7, **linear, **options),
            ops.linear_td_loss(tokens=tokens, **linear, **options),
        )


def test_a_loss_without_a_row_that_counts_is_nothing(dense):
    """The mean over no row is 0, not NaN; one row that counts is its own mean."""
    student, teacher, tokens = dense
    nothing = torch.full_like(tokens, -100)
    assert ops.td_loss(student, teacher, nothing).loss == 0
    one = nothing.clone()
    one[0, 2] = 4
    options = {"objective": ForwardKL()}
    mean = ops.td_loss(student, teacher, one, **options).loss
    same(mean, ops.td_loss(student, teacher, one, reduction="sum", **options).loss)
    assert mean > 0


def test_a_plain_function_is_given_everything_and_counts_as_one_that_bootstraps(dense):
    """It sees both logarithms of the mass, and rows that were cut off do not count."""
    student, teacher, tokens = dense
    seen = []

    def objective(rows):
        seen.append(rows)
        return torch.ones_like(rows.value)

    out = ops.td_loss(
        student, teacher, tokens, objective=objective, q="logit", k=5, reduction="none"
    )
    successor = ops.successors(tokens)
    assert torch.equal(out.loss == 1, successor >= 0)
    (rows,) = seen
    one = rows.log_mass.exp() + rows.log_tail.exp()
    torch.testing.assert_close(one[rows.state], torch.ones_like(one)[rows.state])
    assert (rows.log_mass[~rows.state] == 0).all()
    assert (rows.log_tail[~rows.state] == 0).all()
    at_zero = ops.td_loss(
        student, teacher, tokens, objective=objective, gamma=0.0, k=5, reduction="none"
    )
    assert torch.equal(at_zero.loss == 1, tokens != -100)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_frozen_student_and_a_live_teacher_are_no_burden(linear, dense, impl):
    """No gradient reaches the teacher; without gradients at all the loss is the same."""
    tokens = dense[2]
    single = {name: x.float() for name, x in linear.items()}
    out = ops.linear_td_loss(tokens=tokens, impl=impl, **single)
    assert not out.loss.requires_grad
    live = {name: x.clone().requires_grad_() for name, x in single.items()}
    got = ops.linear_td_loss(tokens=tokens, impl=impl, **live)
    torch.testing.assert_close(got.loss, out.loss)
    got.loss.backward()
    for name, x in live.items():
        assert (x.grad is None) == name.startswith("teacher")
    actions = ops.linear_select_actions(
        live["teacher_hidden"], live["teacher_weight"], bias=live["teacher_bias"], impl=impl
    )
    assert not actions.log_probs.requires_grad
    logits = single["student_hidden"] @ single["student_weight"].T
    assert not ops.select_actions(logits.requires_grad_(), impl=impl).log_probs.requires_grad


def test_a_learning_law_gets_no_gradient(linear):
    law = torch.rand(V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    actions = ops.linear_select_actions(linear["teacher_hidden"], linear["teacher_weight"], 4)
    vocabulary = ops.batch_vocabulary(actions, V, extra=9, law=law)
    assert not vocabulary.log_weight.requires_grad


def test_vocab_size_cuts_both_heads(linear, dense):
    tokens = dense[2].clamp(max=V - 11)
    cut = {
        name: x[: V - 10] if "weight" in name or "bias" in name else x for name, x in linear.items()
    }
    options = {"k": 5, "objective": ForwardKL(tail=True)}
    same(
        ops.linear_td_loss(tokens=tokens, vocab_size=V - 10, **linear, **options),
        ops.linear_td_loss(tokens=tokens, **cut, **options),
    )
    # models that pad differently
    mixed = {**linear, "teacher_weight": cut["teacher_weight"], "teacher_bias": cut["teacher_bias"]}
    same(
        ops.linear_td_loss(tokens=tokens, vocab_size=V - 10, **mixed, **options),
        ops.linear_td_loss(tokens=tokens, **cut, **options),
    )
    student, teacher, _ = dense
    same(
        ops.td_loss(student, teacher[..., : V - 10], tokens, vocab_size=V - 10, **options),
        ops.td_loss(student[..., : V - 10], teacher[..., : V - 10], tokens, **options),
    )
    ids = torch.zeros(2, 5, 3, dtype=torch.int64)
    hidden, weight = linear["student_hidden"], linear["student_weight"]
    same(
        ops.linear_log_probs(hidden, weight, ids, vocab_size=V - 10),
        ops.linear_log_probs(hidden, weight[: V - 10], ids),
    )
    same(ops.select_actions(teacher, vocab_size=V), ops.select_actions(teacher))
    same(ops.select_actions(teacher, vocab_size=1), ops.select_actions(teacher[..., :1]))
    same(
        ops.linear_logsumexp(hidden, weight, vocab_size=1),
        ops.linear_logsumexp(hidden, weight[:1]),
    )
    same(ops.linear_logsumexp(hidden, weight, vocab_size=V), ops.linear_logsumexp(hidden, weight))


# What check sees, and what is not looked at without it


def test_check_lets_pass_what_is_right(dense, linear):
    student, teacher, tokens = dense
    tokens[0, 1], tokens[0, 2] = 0, V - 1
    include = torch.where(tokens == -100, -1, tokens)
    spoilt = teacher.clone()
    spoilt[tokens == -100] = torch.nan  # of rows that are no states
    same(
        ops.td_loss(student, spoilt, tokens, check=True),
        ops.td_loss(student, spoilt, tokens),
    )
    linear["teacher_hidden"][tokens == -100] = torch.nan
    same(
        ops.linear_td_loss(tokens=tokens, check=True, **linear),
        ops.linear_td_loss(tokens=tokens, **linear),
    )
    ids = include.unsqueeze(-1)
    hidden, weight = linear["student_hidden"], linear["student_weight"]
    ops.select_actions(teacher, include=include, check=True)
    ops.linear_select_actions(hidden, weight, include=include, check=True)
    ops.gather_q(teacher, ids, check=True)
    ops.linear_gather_q(hidden, weight, ids, check=True)
    ops.linear_log_probs(hidden, weight, ids, check=True)
    ops.gather_q(teacher, ids[..., :0], check=True)


def test_a_state_without_a_usable_teacher_is_refused_on_request(dense, linear):
    student, teacher, tokens = dense
    teacher[1, 1, 5] = torch.inf
    assert ops.td_loss(student, teacher, tokens).loss.isfinite()
    with pytest.raises(ValueError, match="teacher_logits: .* got row 6 of 10"):
        ops.td_loss(student, teacher, tokens, check=True)
    linear["teacher_hidden"][1, 1, 0] = torch.nan
    assert ops.linear_td_loss(tokens=tokens, **linear).loss.isfinite()
    with pytest.raises(ValueError, match="^teacher_hidden: .* got row 6 of 10"):
        ops.linear_td_loss(tokens=tokens, check=True, **linear)
    hidden = linear["teacher_hidden"]
    assert ops.linear_select_actions(hidden, linear["teacher_weight"]).count[1, 1] == 0
    with pytest.raises(ValueError, match="hidden: .* got row 6 of 10"):
        ops.linear_select_actions(hidden, linear["teacher_weight"], check=True)


x, h, w = torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(5, 4)
token, some = torch.tensor([1, 2]), torch.tensor([[1], [2]])
META = {"device": "meta"}
SETS = ops.ActionSet(some.int(), torch.zeros(2, 1), torch.ones(2, dtype=torch.int32))
TWICE = ops.ActionSet(
    torch.tensor([[1, 3, -1, -1], [2, 4, 2, -1]], dtype=torch.int32),
    torch.full((2, 4), -2.0),
    torch.tensor([2, 3], dtype=torch.int32),
)
VOCABULARY = ops.Vocabulary(torch.arange(5, dtype=torch.int32), torch.zeros(5))
LIVE = {"teacher_hidden": h, "teacher_weight": w}

REFUSED = {
    # types and shapes of each op's tensors
    "select bool k": (lambda: ops.select_actions(x, True), "k: expected an int, got bool"),
    "select negative k": (lambda: ops.select_actions(x, -1), "k: .* got -1"),
    "select vocab_size": (lambda: ops.select_actions(x, vocab_size=0), "vocab_size: .* got 0"),
    "select float vocab_size": (
        lambda: ops.select_actions(x, vocab_size=5.0),
        "vocab_size: expected an int, got float",
    ),
    "select include dtype": (
        lambda: ops.select_actions(x, include=token.float()),
        "include: expected int32 or int64, got float32",
    ),
    "select include list": (
        lambda: ops.select_actions(x, include=[1, 2]),
        "include: expected a tensor, got list",
    ),
    "select include device": (
        lambda: ops.select_actions(x, include=token.to("meta")),
        "include: expected a tensor on cpu, got one on meta",
    ),
    "gather dtype": (lambda: ops.gather_q(x.int(), some), "logits: .* got int32"),
    "gather scalar ids": (lambda: ops.gather_q(x[0], token[0]), r"ids: expected \(k\) ids"),
    "gather last id": (
        lambda: ops.gather_q(x, some + 3, check=True),
        "ids: .*size 5, got 5",
    ),
    "value dtype": (lambda: ops.soft_value(some), "q: expected float64, .* got int64"),
    "value scalar": (lambda: ops.soft_value(x[0, 0]), "q: expected at least 1 dimension"),
    "successors dtype": (lambda: ops.successors(x), "tokens: expected int32 or int64"),
    "successors scalar": (lambda: ops.successors(token[0]), "tokens: expected at least one dim"),
    "cu_seqlens dtype": (
        lambda: ops.successors(token, cu_seqlens=torch.tensor([0.0, 2.0])),
        "cu_seqlens: expected int32 or int64, got float32",
    ),
    "cu_seqlens dims": (
        lambda: ops.successors(token, cu_seqlens=torch.tensor([[0, 2]])),
        r"cu_seqlens: expected offsets .* got \(1, 2\)",
    ),
    "cu_seqlens of two rows": (
        lambda: ops.successors(some, cu_seqlens=torch.tensor([0, 2])),
        r"cu_seqlens: expected offsets .* got \(2,\) with tokens \(2, 1\)",
    ),
    "target dtype": (lambda: ops.td_target(token, token), "value: .* got int64"),
    "target successor dtype": (
        lambda: ops.td_target(x[:, 0], x[:, 0]),
        "successor: expected int32 or int64, got float32",
    ),
    "target successor device": (
        lambda: ops.td_target(x[:, 0], token.to("meta")),
        "successor: expected a tensor on cpu, got one on meta",
    ),
    "target reward dtype": (
        lambda: ops.td_target(x[:, 0], token - 3, reward=token),
        "reward: expected float64, .* got int64",
    ),
    "target gamma below": (lambda: ops.td_target(x[:, 0], token - 3, gamma=-0.1), "gamma: .*-0.1"),
    "target lam above": (lambda: ops.td_target(x[:, 0], token - 3, lam=1.1), "lam: .*got 1.1"),
    # td_loss
    "loss student": (lambda: ops.td_loss(x.int(), x, token), "student_logits: .* got int32"),
    "loss teacher": (lambda: ops.td_loss(x, x.int(), token), "teacher_logits: .* got int32"),
    "loss teacher device": (
        lambda: ops.td_loss(x, x.to("meta"), token),
        "teacher_logits: expected a tensor on cpu, got one on meta",
    ),
    "loss tokens": (lambda: ops.td_loss(x, x, token.float()), "tokens: expected int32 or int64"),
    "loss tokens device": (
        lambda: ops.td_loss(x, x, token.to("meta")),
        "tokens: expected a tensor on cpu, got one on meta",
    ),
    "loss token too large": (
        lambda: ops.td_loss(x, x, token + 3, check=True),
        "tokens: expected ids from 0 to 4, or -100, got 5",
    ),
    "loss token negative": (
        lambda: ops.td_loss(x, x, token - 2),
        "tokens: expected ids from 0 to 4, or -100, got -1",
    ),
    "loss token negative, sets": (
        lambda: ops.linear_td_loss(h, w, token - 2, actions=SETS),
        "tokens: expected ids from 0 to 4, or -100, got -1",
    ),
    "loss k": (lambda: ops.td_loss(x, x, token, k=0), "k: .* got 0"),
    "loss top_p kind": (
        lambda: ops.td_loss(x, x, token, top_p="all"),
        "top_p: expected a number, got 'all'",
    ),
    "loss top_p": (lambda: ops.td_loss(x, x, token, top_p=1.5), "top_p: .* got 1.5"),
    "loss gamma": (lambda: ops.td_loss(x, x, token, gamma=1.1), "gamma: .* got 1.1"),
    "loss temperature": (
        lambda: ops.td_loss(x, x, token, temperature=0.0),
        "temperature: .* got 0.0",
    ),
    "loss teacher temperature": (
        lambda: ops.td_loss(x, x, token, teacher_temperature=0.0),
        "teacher_temperature: .* got 0.0",
    ),
    "loss teacher softcap": (
        lambda: ops.td_loss(x, x, token, teacher_softcap=math.inf),
        "teacher_softcap: .* got inf",
    ),
    "loss teacher scale": (
        lambda: ops.td_loss(x, x, token, teacher_logit_scale=-1.0),
        "teacher_logit_scale: .* got -1.0",
    ),
    "loss student's vocab_size": (
        lambda: ops.td_loss(x, torch.zeros(2, 7), token, vocab_size=6),
        "vocab_size: expected 1 to 5, the columns of student_logits, got 6",
    ),
    "loss teacher's vocab_size": (
        lambda: ops.td_loss(torch.zeros(2, 7), x, token, vocab_size=6),
        "vocab_size: expected 1 to 5, the columns of teacher_logits, got 6",
    ),
    "loss successor shape": (
        lambda: ops.td_loss(x, x, token, successor=some),
        "successor: expected the shape of the rows",
    ),
    "loss successor dtype": (
        lambda: ops.td_loss(x, x, token, successor=x[:, 0]),
        "successor: expected int32 or int64, got float32",
    ),
    "loss impl": (lambda: ops.td_loss(x, x, token, impl="c"), "impl: expected one of .* got 'c'"),
    # linear forms
    "linear hidden": (lambda: ops.linear_logsumexp(h.int(), w), "hidden: .* got int32"),
    "linear weight": (lambda: ops.linear_logsumexp(h, w.int()), "weight: .* got int32"),
    "linear weight dims": (lambda: ops.linear_logsumexp(h, w[0]), r"weight: expected \(V, 4\)"),
    "linear weight of three dims": (
        lambda: ops.linear_logsumexp(h, torch.zeros(5, 4, 1)),
        r"weight: expected \(V, 4\) to fit hidden, got \(5, 4, 1\)",
    ),
    "linear weight device": (
        lambda: ops.linear_logsumexp(h, w.to("meta")),
        "weight: expected a tensor on cpu, got one on meta",
    ),
    "linear bias": (lambda: ops.linear_logsumexp(h, w, bias=token), "bias: .* got int64"),
    "linear bias dims": (
        lambda: ops.linear_logsumexp(h, w, bias=torch.zeros(5, 1)),
        r"bias: expected \(5,\) to fit weight, got \(5, 1\)",
    ),
    "linear bias device": (
        lambda: ops.linear_logsumexp(h, w, bias=torch.zeros(5, **META)),
        "bias: expected a tensor on cpu, got one on meta",
    ),
    "linear vocab_size 0": (
        lambda: ops.linear_logsumexp(h, w, vocab_size=0),
        "vocab_size: expected 1 to 5, the rows of weight, got 0",
    ),
    "linear bool vocab_size": (
        lambda: ops.linear_logsumexp(h, w, vocab_size=True),
        "vocab_size: expected an int, got bool",
    ),
    "linear vocab_size 6": (
        lambda: ops.linear_logsumexp(h, w, vocab_size=6),
        "vocab_size: expected 1 to 5, the rows of weight, got 6",
    ),
    "linear temperature": (
        lambda: ops.linear_logsumexp(h, w, temperature=-1.0),
        "temperature: .* got -1.0",
    ),
    "linear select k": (lambda: ops.linear_select_actions(h, w, 0), "k: .* got 0"),
    "linear select include": (
        lambda: ops.linear_select_actions(h, w, include=some),
        r"include: expected one token a position \(2,\), got \(2, 1\)",
    ),
    "linear select include range": (
        lambda: ops.linear_select_actions(h, w, include=token + 3, check=True),
        "include: .*size 5, got 5",
    ),
    "linear select hidden": (
        lambda: ops.linear_select_actions(h * torch.nan, w, check=True),
        "hidden: .* got row 0 of 2",
    ),
    "linear select scale": (
        lambda: ops.linear_select_actions(h, w, softcap=0.0),
        "softcap: .* got 0.0",
    ),
    "linear gather ids": (
        lambda: ops.linear_gather_q(h, w, token),
        r"ids: expected \(2, k\) ids, got \(2,\)",
    ),
    "linear gather range": (
        lambda: ops.linear_gather_q(h, w, some + 3, check=True),
        "ids: .*size 5, got 5",
    ),
    "linear gather scale": (
        lambda: ops.linear_gather_q(h, w, some, logit_scale=0.0),
        "logit_scale: .* got 0.0",
    ),
    "log_probs ids": (lambda: ops.linear_log_probs(h, w, h), "ids: .* got float32"),
    "log_probs range": (
        lambda: ops.linear_log_probs(h, w, some + 3, check=True),
        "ids: .*size 5, got 5",
    ),
    "log_probs scale": (
        lambda: ops.linear_log_probs(h, w, some, temperature=0.0),
        "temperature: .* got 0.0",
    ),
    "log_probs vocabulary": (
        lambda: ops.linear_log_probs(
            h, w, some, vocabulary=ops.Vocabulary(*(x[:2] for x in VOCABULARY))
        ),
        "vocabulary: expected every member .* id 2 is not in it",
    ),
    "a temperature that learns": (
        lambda: ops.gather_q(x, some, temperature=torch.ones((), requires_grad=True)),
        "temperature: expected a constant, got a tensor that requires a gradient",
    ),
    "a temperature of each row": (
        lambda: ops.gather_q(x, some, temperature=torch.ones(2)),
        r"temperature: expected a number, got a tensor of shape \(2,\)",
    ),
    "items below 0": (
        lambda: ops.linear_td_loss(h, w, token, num_items_in_batch=torch.tensor(-3), **LIVE),
        r"num_items_in_batch: expected a number in \[0, inf\], got -3",
    ),
    "vocabulary of a tensor": (
        lambda: ops.batch_vocabulary(SETS.ids, 5),
        "actions: expected an ActionSet, got Tensor",
    ),
    "vocabulary of nothing": (lambda: ops.batch_vocabulary(SETS, 0), "vocab_size: .* got 0"),
    "vocabulary capacity": (
        lambda: ops.batch_vocabulary(SETS, 5, capacity=0),
        "capacity: expected an int >= 1, got 0",
    ),
    "vocabulary law dtype": (
        lambda: ops.batch_vocabulary(SETS, 5, law=torch.ones(5, dtype=torch.int64)),
        "law: .* got int64",
    ),
    "vocabulary law shape": (
        lambda: ops.batch_vocabulary(SETS, 5, law=torch.ones(4)),
        r"law: expected the shape of the vocabulary \(5,\), got \(4,\)",
    ),
    "vocabulary law device": (
        lambda: ops.batch_vocabulary(SETS, 5, law=torch.ones(5, **META)),
        "law: expected a tensor on cpu, got one on meta",
    ),
    "vocabulary law NaN": (
        lambda: ops.batch_vocabulary(SETS, 5, law=torch.tensor([1.0, 0, 0, torch.nan, 1])),
        "law: expected finite numbers >= 0, got nan",
    ),
    "vocabulary law negative": (
        lambda: ops.batch_vocabulary(SETS, 5, law=torch.tensor([1.0, 0, 0, 2, -0.5])),
        "law: expected finite numbers >= 0, got -0.5",
    ),
    "vocabulary law infinite": (
        lambda: ops.linear_td_loss(
            h, w, token, normaliser="batch", law=torch.tensor([1.0, INF, 0, 2, 1]), **LIVE
        ),
        "law: expected finite numbers >= 0, got inf",
    ),
    "vocabulary member": (
        lambda: ops.batch_vocabulary(SETS, 2, extra=0),
        "actions: .*size 2, got 2",
    ),
    # linear_td_loss
    "linear loss tokens": (
        lambda: ops.linear_td_loss(h, w, some, **LIVE),
        "tokens: expected one token a position",
    ),
    "linear loss token range": (
        lambda: ops.linear_td_loss(h, w, token + 3, check=True, **LIVE),
        "tokens: expected ids from 0 to 4, or -100, got 5",
    ),
    "linear loss normaliser": (
        lambda: ops.linear_td_loss(h, w, token, normaliser="some", **LIVE),
        "normaliser: .* got 'some'",
    ),
    "linear loss exact vocabulary": (
        lambda: ops.linear_td_loss(h, w, token, vocabulary=VOCABULARY, **LIVE),
        "vocabulary: expected None",
    ),
    "linear loss two teachers": (
        lambda: ops.linear_td_loss(h, w, token, actions=SETS, **LIVE),
        "teacher: .* got teacher_hidden and teacher_weight and actions",
    ),
    "linear loss a weight alone": (
        lambda: ops.linear_td_loss(h, w, token, teacher_weight=w),
        "teacher: .* got teacher_weight$",
    ),
    "linear loss sets and half a teacher": (
        lambda: ops.linear_td_loss(h, w, token, actions=SETS, teacher_weight=w),
        "teacher: .* got teacher_weight and actions$",
    ),
    "linear loss teacher dtype": (
        lambda: ops.linear_td_loss(h, w, token, teacher_hidden=h.int(), teacher_weight=w),
        "teacher_hidden: .* got int32",
    ),
    "linear loss teacher list": (
        lambda: ops.linear_td_loss(h, w, token, teacher_hidden=[[0.0]], teacher_weight=w),
        "teacher_hidden: expected a tensor, got list",
    ),
    "linear loss teacher weight kind": (
        lambda: ops.linear_td_loss(h, w, token, teacher_hidden=h, teacher_weight=[[0.0]]),
        "teacher_weight: expected a tensor, got list",
    ),
    "linear loss teacher rows": (
        lambda: ops.linear_td_loss(h, w, token, teacher_hidden=h[:1], teacher_weight=w),
        r"teacher_hidden: expected the leading dims of student_hidden \(2,\), got \(1,\)",
    ),
    "linear loss teacher device": (
        lambda: ops.linear_td_loss(
            h, w, token, teacher_hidden=h.to("meta"), teacher_weight=w.to("meta")
        ),
        "teacher_hidden: expected a tensor on cpu, got one on meta",
    ),
    "linear loss teacher bias": (
        lambda: ops.linear_td_loss(h, w, token, teacher_bias=torch.zeros(4), **LIVE),
        r"teacher_bias: expected \(5,\) to fit teacher_weight, got \(4,\)",
    ),
    "linear loss teacher scale": (
        lambda: ops.linear_td_loss(h, w, token, teacher_temperature=0.0, **LIVE),
        "teacher_temperature: .* got 0.0",
    ),
    "linear loss scale": (
        lambda: ops.linear_td_loss(h, w, token, temperature=0.0, **LIVE),
        "temperature: .* got 0.0",
    ),
    "linear loss k": (lambda: ops.linear_td_loss(h, w, token, k=0, **LIVE), "k: .* got 0"),
    "linear loss sets": (
        lambda: ops.linear_td_loss(h, w, token, actions=SETS._replace(ids=some[:1])),
        r"actions: expected \(2, k\) ids, got \(1, 1\)",
    ),
    "linear loss set range": (
        lambda: ops.linear_td_loss(h, w, token, actions=SETS._replace(ids=some + 3), check=True),
        "actions: .*size 5, got 5",
    ),
    "linear loss sets without the tokens": (
        lambda: ops.linear_td_loss(h, w, token.flip(0), actions=SETS),
        r"actions: expected sets that hold the taken tokens \(include=tokens\), got one without 2 "
        "in row 0 of 2",
    ),
    "linear loss a set without its token": (
        lambda: ops.linear_td_loss(
            h, w, torch.tensor([1, 3]), actions=SETS, q="logit", objective=ForwardKL()
        ),
        "actions: expected sets that hold the taken tokens .* without 3 in row 1 of 2",
    ),
    "linear loss a set of id 0 without its token": (
        lambda: ops.linear_td_loss(h, w, token, actions=SETS._replace(ids=SETS.ids * 0)),
        "actions: expected sets that hold the taken tokens .* without 1 in row 0 of 2",
    ),
    "linear loss id 0 twice": (
        lambda: ops.linear_td_loss(
            h, w, token * 0, actions=TWICE._replace(ids=TWICE.ids * 0), check=True
        ),
        "actions: expected distinct ids in a set, got 0 twice",
    ),
    "linear loss a member twice": (
        lambda: ops.linear_td_loss(h, w, token, actions=TWICE, check=True),
        "actions: expected distinct ids in a set, got 2 twice",
    ),
    "linear loss exact law": (
        lambda: ops.linear_td_loss(h, w, token, law="student", **LIVE),
        'law: expected None with normaliser="exact", got str',
    ),
    "linear loss exact capacity": (
        lambda: ops.linear_td_loss(h, w, token, capacity=5, **LIVE),
        'capacity: expected None with normaliser="exact", got int',
    ),
    "linear loss gamma": (
        lambda: ops.linear_td_loss(h, w, token, gamma=-1.0, **LIVE),
        "gamma: .* got -1.0",
    ),
    "linear loss q": (lambda: ops.linear_td_loss(h, w, token, q="p", **LIVE), "q: .* got 'p'"),
    "linear loss reduction": (
        lambda: ops.linear_td_loss(h, w, token, reduction="max", **LIVE),
        "reduction: .* got 'max'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_named(name):
    check_refused(*REFUSED[name])


def test_an_empty_set_is_of_a_teacher_that_knows_nothing():
    """Its row does not count, and is nothing to refuse; nor is padding an id that stands twice."""
    empty = TWICE._replace(ids=torch.tensor([[1, -1, -1, -1], [-1] * 4], dtype=torch.int32))
    options = {"objective": ForwardKL(tail=True), "reduction": "none"}
    got = ops.linear_td_loss(h, w, token, actions=empty, check=True, **options)
    both = empty._replace(ids=torch.tensor([[1, -1, -1, -1], [2, -1, 4, -1]], dtype=torch.int32))
    whole = ops.linear_td_loss(h, w, token, actions=both, check=True, **options)
    assert got.loss[0] == whole.loss[0] != 0
    assert got.loss[1] == 0 != whole.loss[1]


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_no_items_are_no_loss(linear, dense, impl, zero):
    """Of a batch without a state, and of whatever else is not to count."""
    student, teacher, tokens = dense
    student, live = student.float(), {name: part.float() for name, part in linear.items()}
    leaves = [student, live["student_hidden"], live["student_weight"]]
    for leaf in leaves:
        leaf.requires_grad_()
    options = {"num_items_in_batch": zero, "objective": ForwardKL(tail=True), "impl": impl}
    for taken in (torch.full_like(tokens, -100), tokens):
        with routes.forced("batch"):
            outs = [
                ops.td_loss(student, teacher, taken, **options),
                ops.linear_td_loss(tokens=taken, **live, **options),
                ops.linear_td_loss(tokens=taken, normaliser="batch", extra=4, **live, **options),
                ops.linear_td_loss(tokens=taken, **live, **{**options, "q": "logit",
                                                            "objective": ForwardKL()}),
            ]  # fmt: skip
        total = sum(out.loss for out in outs)
        assert total == 0
        for grad in torch.autograd.grad(total, leaves):
            assert not grad.any()


def test_a_vocab_size_that_leaves_nothing_out_makes_no_slice(linear):
    """Whose gradient would be a second one of the head's size, or of the logits'."""
    hidden, weight, bias = (linear[name] for name in ("student_hidden", "student_weight", "bias"))
    names = "hidden", hidden, "weight", weight, "bias", bias
    assert arguments.head(*names, V)[0] is weight
    assert arguments.head(*names, V)[1] is bias
    assert arguments.columns("logits", x, 5) is x
    assert arguments.head(*names, V - 1)[0].shape[0] == V - 1


def test_bounds_themselves_are_allowed():
    ops.select_actions(x, 1, 1.0, vocab_size=5)
    value, successor = x[:, 0], token - 3
    for gamma in (0, 1):
        for lam in (0, 1):
            ops.td_target(value, successor, gamma=gamma, lam=lam)
    ops.td_target(value.sum(), successor[0], reward=value.sum())  # one row without dims
    ops.successors(token[:0], cu_seqlens=torch.tensor([0]))
    one = ops.ActionSet(some[:1].int() * 0, torch.zeros(1, 1), torch.ones(1, dtype=torch.int32))
    vocabulary = ops.batch_vocabulary(one, 1, extra=0, capacity=1)
    assert vocabulary.ids.tolist() == [0]
    full = ops.batch_vocabulary(SETS, 5, extra=1, capacity=3)
    assert (full.ids >= 0).all()


# The parts that the ops are made of


def test_chunks_hold_all_rows_once_and_no_more_logits_than_they_may():
    for rows, columns, elements in ((7, 10, 20), (7, 10, 29), (7, 10, 9), (6, 2, 6), (1, 1, 1)):
        pieces = list(row_chunks(rows, columns, elements))
        assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
        sizes = [piece.stop - piece.start for piece in pieces]
        assert min(sizes) > 0
        assert max(sizes) == min(rows, max(1, elements // columns))
        assert len(set(sizes[:-1])) <= 1
    assert list(row_chunks(0, 10)) == [slice(0, 0)]
    assert list(row_chunks(3, 0, 2)) == [slice(0, 2), slice(2, 3)]
    # 16 million logits a chunk, where nothing is said
    assert [piece.stop for piece in row_chunks(40, 1 << 20)] == [16, 32, 40]


def test_chances_are_proportional_below_one_and_add_up():
    share = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 90.0], dtype=torch.float64)
    torch.testing.assert_close(inclusion(share, 1), share / 100)
    # the last is sure, the others share what is left
    torch.testing.assert_close(inclusion(share, 2), torch.cat([share[:5] / 10, share.new_ones(1)]))
    # and once more: with 3 to give, 4 and 90 are sure; 4/3 of the rest would be 2/3 of 3
    torch.testing.assert_close(
        inclusion(share, 3), torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1], dtype=torch.float64)
    )
    torch.testing.assert_close(inclusion(share, 5), (share > 0).double())
    torch.testing.assert_close(inclusion(share, 9), (share > 0).double())
    for count in range(7):  # a law is known up to a factor
        torch.testing.assert_close(inclusion(share / 1000, count), inclusion(share, count))
    assert not inclusion(share, 0).any()
    assert not inclusion(share * 0, 3).any()
    # where one is sure only once the larger ones are, again and again
    steep = inclusion(10.0 ** torch.arange(13, dtype=torch.float64), 11)
    assert ((steep > 0) & (steep <= 1)).all()
    assert steep.sum().item() == pytest.approx(11)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        share = (torch.randn(30, generator=generator, dtype=torch.float64) * (seed % 7)).exp()
        share = torch.where(torch.rand(30, generator=generator) < 0.3, 0.0, share.ceil())
        count = seed % 33
        chance = inclusion(share, count)
        assert chance.sum().item() == pytest.approx(min(count, int((share > 0).sum())))
        below = (chance < 1) & (chance > 0)
        ratio = chance[below] / share[below]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert (steep.diff() >= 0).all()
    assert 8 < steep.sum() <= 11


def test_systematic_sampling_takes_the_sure_and_never_the_impossible():
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.25, 1.0, 0.0], dtype=torch.float64)
    draws = torch.stack([systematic(chance, generator) for _ in range(2000)])
    assert (draws.sum(-1) == 3).all()
    assert draws[:, chance == 1].all()
    assert not draws[:, chance == 0].any()
    error = (chance * (1 - chance) / 2000).sqrt()
    assert ((draws.double().mean(0) - chance).abs() <= 4 * error).all()
    # not always the same of them together
    assert draws.unique(dim=0).shape[0] == 3
    torch.manual_seed(5)
    first = systematic(chance, None)
    torch.manual_seed(5)
    assert torch.equal(first, systematic(chance, None))


def test_places_in_a_padded_vocabulary():
    for first in (0, 1):
        columns = torch.tensor([first, 4, 6, -1, -1], dtype=torch.int32)
        vocabulary = ops.Vocabulary(columns, torch.zeros(5))
        ids = torch.tensor([[6, -1, first], [4, 1 - first, -3]])
        assert position_in(vocabulary, ids, 7).tolist() == [[2, -1, 0], [1, -1, -1]]


class Stub:
    """What `routes.capacity` asks of ids on a GPU, where there is none."""

    is_cuda = True

    def __init__(self, count):
        self.count = count

    def numel(self):
        return self.count


def test_room_for_a_vocabulary_on_a_gpu():
    """A multiple of the step that holds every id and the sample, if that is small against V."""
    step = routes.CAPACITY_STEP
    assert step == 1024
    for count, extra in ((5, 0), (1000, 23), (1000, 24), (4000, 1024)):
        room = routes.capacity(None, Stub(count), extra, 1 << 20)
        assert room % step == 0
        assert count + extra < room <= count + extra + 1 + step
    assert routes.capacity(None, Stub(5), 0, 4 * step) == step
    assert routes.capacity(None, Stub(5), 0, 4 * step - 1) is None
    assert routes.capacity(None, Stub(1000), 23, 1 << 20) == 1024
    assert routes.capacity(77, Stub(5), 0, 100) == 77
    assert routes.capacity(77, torch.zeros(1), 0, 100) == 77
    assert routes.capacity(None, torch.zeros(1), 0, 1 << 20) is None


# Objectives


def test_what_an_objective_asks_for():
    """Which rows count, which products are needed, and whether a chunk can do it alone."""
    asks = {
        IQLearn(): (True, False, True, True),
        ForwardKL(): (False, False, True, False),
        ReverseKL(tail=True): (False, True, True, False),
        CrossEntropy(tail=True): (False, True, True, False),
        Objective(): (False, False, False, False),
        ForwardKL() + IQLearn(): (False, False, True, True),
        IQLearn() + IQLearn(): (True, False, True, True),
        ForwardKL(tail=True) + ForwardKL(): (False, True, True, False),
        ForwardKL() + Objective(): (False, False, False, False),
    }
    for objective, wanted in asks.items():
        names = ("bootstraps", "normalised", "rowwise", "looks_ahead")
        assert tuple(getattr(objective, name) for name in names) == wanted, objective
    with pytest.raises(NotImplementedError):
        Objective()(None)


def test_sums_and_multiples_of_objectives(dense):
    student, teacher, tokens = dense
    options = {"k": 6, "reduction": "none", "successor": ops.successors(tokens)}

    def loss(objective):
        return ops.td_loss(student, teacher, tokens, objective=objective, **options).loss

    first, second, third = ForwardKL(tail=True), ReverseKL(), CrossEntropy()
    mixed = 3 * (2 * first + second * 0.5) + third
    assert repr(mixed) == (
        "6 * ForwardKL(tail=True) + 1.5 * ReverseKL(tail=False) + 1 * CrossEntropy(tail=False)"
    )
    torch.testing.assert_close(loss(mixed), 6 * loss(first) + 1.5 * loss(second) + loss(third))
    # a sum counts the rows that were cut off, with nothing for the part that needs V'
    both, iq = loss(first + 2 * IQLearn()), loss(IQLearn())
    torch.testing.assert_close(both, loss(first) + 2 * iq)
    cut = (options["successor"] == -2) & (tokens != -100)
    assert cut.any()
    assert (iq[cut] == 0).all()
    assert (both[cut] != 0).all()
    torch.testing.assert_close(loss(2 * IQLearn()), 2 * iq)


def test_defaults_of_objectives():
    assert repr(IQLearn()) == (
        "IQLearn(phi='chi2', alpha=0.1, expectation='token', stop_gradient=None, value='expert')"
    )
    for baseline in (ForwardKL, ReverseKL, CrossEntropy):
        assert repr(baseline()) == f"{baseline.__name__}(tail=False)"
    for options in ({"phi": "identity"}, {"expectation": "teacher"}, {"stop_gradient": "next"}):
        assert repr(IQLearn(**options)) != repr(IQLearn())


# Rows of a loss


def rows_of(ids, tokens, successor, gamma=0.9, objective=None):
    ids = torch.tensor(ids)
    return TDRows.of(
        ids,
        torch.where(ids < 0, -torch.inf, -1.0),
        torch.tensor(tokens),
        torch.tensor(successor),
        ignore_index=-100,
        objective=objective or IQLearn(),
        level="logit",
        gamma=gamma,
        soft_value=ops.soft_value,
    )


def test_rows_know_their_states_slots_and_successors():
    """Row 1 takes a token outside its set, row 3 is marked; neither has a value to offer."""
    rows = rows_of(
        [[4, 2, -1], [5, 6, 7], [1, 0, -1], [2, 3, -1], [9, 8, 7]],
        [2, 1, 0, -100, 9],
        [1, 2, 3, 4, -1],
    )
    assert rows.state.tolist() == [True, False, True, False, True]
    assert rows.slot.tolist() == [1, 0, 1, 0, 0]
    assert rows.successor.tolist() == [-2, -2, -2, -2, -1]
    assert rows.counted.tolist() == [False, False, False, False, True]
    assert rows.looks_ahead
    first = rows_of([[4], [5]], [-100, 5], [1, 0])
    assert first.successor.tolist() == [-2, -2]
    at_zero = rows_of(rows.ids.tolist(), [2, 1, 0, -100, 9], [1, 2, 3, 4, -1], gamma=0.0)
    assert torch.equal(at_zero.counted, at_zero.state)
    assert not at_zero.looks_ahead
    baseline = rows_of(rows.ids.tolist(), [2] * 5, [-2] * 5, objective=ForwardKL())
    assert torch.equal(baseline.counted, baseline.state)
    assert not baseline.looks_ahead
    plain = rows_of(
        rows.ids.tolist(), [2] * 5, [-2] * 5, objective=as_objective(lambda rows: rows.value)
    )
    assert plain.looks_ahead
    assert not plain.counted.any()


def test_some_of_the_rows_are_rows():
    """Links between them are kept, links to others are cut, ends stay ends."""
    rows = rows_of([[i, 9] for i in range(6)], list(range(6)), [1, 2, 3, -1, 5, -2])
    taken = rows.take(torch.tensor([2, 0, 1, 3, 4]))
    assert taken.ids.tolist() == [[2, 9], [0, 9], [1, 9], [3, 9], [4, 9]]
    assert taken.successor.tolist() == [3, 2, 0, -1, -2]
    assert taken.slot.tolist() == [0] * 5
    assert taken.state.all()
    assert taken.log_probs.shape == (5, 2)
    z = torch.tensor([[1.0, 0.5], [0.2, 0.1], [-1.0, 2.0], [0.3, 0.3], [0.0, 1.0], [2.0, 2.0]])
    index = torch.tensor([1, 2, 3])  # a whole tail of a chain
    for part, whole in zip(rows.take(index)(z[index], None), rows(z, None), strict=True):
        torch.testing.assert_close(part, whole if whole is None else whole[index])


# Small cases by hand


NAN, INF = math.nan, math.inf
BY_HAND = [
    # logits, k, top_p, include, ids
    ([0.0, 3.0, 1.0, 3.0], 3, 0.9, -1, [1, 3]),
    ([0.0, 3.0, 1.0, 3.0], 3, 0.9, 0, [1, 3, 0]),
    ([0.0, 3.0, 1.0, 3.0], 2, 0.9, 0, [1, 0]),
    ([0.0, 3.0, 1.0, 3.0], 1, 1.0, 0, [0]),
    ([0.0, 3.0, 1.0, 3.0], 2, 0.9, 3, [1, 3]),
    ([0.0, 3.0, 1.0, 3.0], 3, 1.0, -2, [1, 3, 2]),
    ([0.0, 3.0, 1.0, 3.0], 7, 1.0, -1, [1, 3, 2, 0]),
    ([30.0, 0.0, 0.0, -50.0], 4, 1.0, -1, [0, 1, 2, 3]),  # all of them, however sure
    ([2.0, 2.0, 2.0, 2.0], 3, 0.5, -1, [0, 1]),  # half of it exactly
    ([2.0, 2.0, 2.0, 2.0], 3, 0.51, -1, [0, 1, 2]),
    ([2.0, 2.0, 2.0, 2.0], 4, 0.001, -1, [0]),
    ([1.0, 2.0, 2.0, 3.0], 3, 1.0, -1, [3, 1, 2]),
    ([1.0, 2.0, 2.0, 3.0], 2, 1.0, -1, [3, 1]),
    ([-INF, 1.0, -INF, 0.0], 4, 1.0, -1, [1, 3]),
    ([-INF, 1.0, -INF, 0.0], 4, 1.0, 2, [1, 3, 2]),
    ([-INF, 1.0, -INF, 0.0], 1, 0.1, 0, [0]),
    ([NAN, 1.0, 2.0, 0.0], 4, 1.0, 1, []),
    ([INF, 1.0, 2.0, 0.0], 4, 1.0, 1, []),
    ([-INF, -INF, -INF, -INF], 2, 0.5, 0, []),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", range(len(BY_HAND)))
def test_sets_by_hand(case, dtype):
    row, k, top_p, include, ids = BY_HAND[case]
    logits = torch.tensor([row, row[::-1], row], dtype=dtype)
    logits[1] = 0.0
    taken = torch.tensor([include, -1, include])
    by_logits = ops.select_actions(logits, k, top_p, include=taken)
    # a head of ones and zeros whose bias makes the logits, for the rows that have a set
    hidden = torch.zeros(1, 2, dtype=dtype)
    head = torch.ones(4, 2, dtype=dtype)
    by_head = ops.linear_select_actions(
        hidden, head, k, top_p, bias=logits[0], include=taken[:1], impl="reference"
    )
    for actions in (by_logits, by_head):
        padded = [*ids, *[-1] * (k - len(ids))]
        assert actions.ids[0].tolist() == padded
        assert actions.count[0] == len(ids)
        valid = actions.valid[0]
        assert valid.sum() == len(ids)
        assert (actions.log_probs[0][~valid] == -INF).all()
        log_p = logits[0].double().log_softmax(-1)
        expected = log_p[actions.ids[0][valid].long()]
        torch.testing.assert_close(actions.log_probs[0][valid].double(), expected)
        assert actions.log_probs.dtype == dtype
        assert actions.ids.dtype == actions.count.dtype == torch.int32
        assert all(x.is_contiguous() for x in actions)
    same([x[2] for x in by_logits], [x[0] for x in by_logits])
    assert by_logits.ids[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_vocabulary_of_nothing(dtype):
    """No column, or no slot: empty sets, -inf, and no error."""
    nothing, ids = torch.zeros(2, 0, dtype=dtype), torch.full((2, 3), -1)
    actions = ops.select_actions(nothing, 3)
    assert actions.ids.tolist() == ids.tolist()
    assert (actions.log_probs == -INF).all()
    assert actions.log_probs.dtype == dtype
    assert actions.count.tolist() == [0, 0]
    assert actions.ids.dtype == actions.count.dtype == torch.int32
    q = ops.gather_q(nothing, ids)
    assert q.dtype == dtype
    assert (q == -INF).all()
    assert ops.soft_value(nothing).tolist() == [-INF, -INF]
    half = ops.gather_q(nothing.bfloat16(), ids)
    assert half.dtype == torch.float32
    for kind in (dtype, torch.bfloat16):
        hidden, weight = torch.ones(2, 4, dtype=kind), torch.ones(0, 4, dtype=kind)
        assert ops.linear_select_actions(hidden, weight, 3).count.tolist() == [0, 0]
        assert ops.linear_logsumexp(hidden, weight).tolist() == [-INF, -INF]
        assert (ops.linear_gather_q(hidden, weight, ids) == -INF).all()
        assert (ops.linear_log_probs(hidden, weight, ids).log_probs == -INF).all()
    assert ops.select_actions(nothing.half(), 3).log_probs.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_soft_value_by_hand(dtype):
    q = torch.tensor(
        [[0.0, 0.0], [-INF, -INF], [-INF, 2.0], [1000.0, 1000.0], [-2000.0, -2000.0], [-3.0, 1.0]],
        dtype=dtype,
    ).requires_grad_()
    value = ops.soft_value(q)
    two = math.log(2)
    wanted = [two, -INF, 2.0, 1000 + two, -2000 + two, 1 + math.log1p(math.exp(-4))]
    torch.testing.assert_close(value, torch.tensor(wanted, dtype=dtype))
    torch.where(value.isfinite(), value, 0.0).sum().backward()
    low = 1 / (1 + math.exp(4))
    policy = [[0.5, 0.5], [0, 0], [0, 1], [0.5, 0.5], [0.5, 0.5], [low, 1 - low]]
    torch.testing.assert_close(q.grad, torch.tensor(policy, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_targets_by_hand(dtype, integer):
    """Two chains, one that ends and one that is cut off, in scattered rows."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=dtype)
    reward = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype)
    successor = torch.tensor([4, -2, 0, 1, -1, 3], dtype=integer)  # 2 0 4 end; 5 3 1 cut

    def target(**options):
        return ops.td_target(value, successor, gamma=0.5, **options).tolist()

    assert target() == pytest.approx([2.5, 2.0, 0.5, 1.0, 0.0, 2.0])
    assert target(reward=reward) == pytest.approx([2.6, 2.0, 0.8, 1.4, 0.5, 2.6])
    one = [0.1 + 0.25, 2.0, 0.3 + 0.5 * 0.35, 0.4 + 1.0, 0.5, 0.6 + 0.5 * 1.4]
    assert target(reward=reward, lam=1.0) == pytest.approx(one)
    first = 0.1 + 0.5 * (0.5 * 5 + 0.5 * 0.5)
    second = 0.4 + 0.5 * 2.0
    half = [
        first, 2.0, 0.3 + 0.5 * (0.5 * 1 + 0.5 * first),
        second, 0.5, 0.6 + 0.5 * (0.5 * 4 + 0.5 * second),
    ]  # fmt: skip
    assert target(reward=reward, lam=0.5) == pytest.approx(half)
    at_zero = ops.td_target(value, successor, gamma=0.0, reward=reward, lam=0.5)
    assert at_zero.tolist() == pytest.approx([0.1, 2.0, 0.3, 0.4, 0.5, 0.6])
    assert ops.td_target(value[:0], successor[:0], lam=0.5).shape == (0,)
    # a return that does not bootstrap does not see the values on its way
    empty = value.clone()
    empty[[0, 4]] = -INF
    for impl in ("auto", "reference"):
        got = ops.td_target(empty, successor, gamma=0.5, reward=reward, lam=1.0, impl=impl)
        assert got.tolist() == pytest.approx(one)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17])
def test_a_return_reaches_the_end_of_its_chain(rows):
    reward = torch.arange(1.0, rows + 1, dtype=torch.float64)
    successor = torch.tensor([*range(1, rows), -1])
    got = ops.td_target(reward * 0, successor, gamma=0.5, reward=reward, lam=1.0)
    expected = [sum(0.5**j * float(r) for j, r in enumerate(reward[i:])) for i in range(rows)]
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_successors_and_ids_may_be_int32(dense, linear, impl):
    student, teacher, tokens = (x.float() if x.is_floating_point() else x for x in dense)
    successor = ops.successors(tokens, eos_token_id=7)
    options = {"k": 4, "impl": impl}
    wide = ops.td_loss(student, teacher, tokens, successor=successor, **options)
    narrow = ops.td_loss(student, teacher, tokens.int(), successor=successor.int(), **options)
    same(wide, narrow)
    ids = wide.actions.ids
    same(
        ops.gather_q(student, ids, impl=impl),
        ops.gather_q(student, ids.long(), impl=impl),
    )
    hidden, weight = linear["student_hidden"].float(), linear["student_weight"].float()
    for op in (ops.linear_gather_q, ops.linear_log_probs):
        same(op(hidden, weight, ids, impl=impl), op(hidden, weight, ids.long(), impl=impl))


def test_a_vocabulary_without_token_0_is_refused():
    actions = ops.ActionSet(SETS.ids - 1, SETS.log_probs, SETS.count)
    vocabulary = ops.Vocabulary(*(x[1:] for x in VOCABULARY))
    with pytest.raises(ValueError, match="vocabulary: .* but id 0 is not in it"):
        ops.linear_td_loss(
            h, w, token - 1, actions=actions, normaliser="batch", vocabulary=vocabulary
        )


@pytest.mark.parametrize("q", ["logit", "log_prob"])
def test_baselines_by_hand(q):
    """Teacher (1/2, 1/4, 1/4) and student (1/4, 1/2, 1/4), the set {0, 1}, token 1."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log() + 3.0
    token, two = torch.tensor([1]), math.log(2)
    third = math.log(2 / 3)
    expected = {
        CrossEntropy(tail=True): two,
        CrossEntropy(): -third,
        ForwardKL(tail=True): 0.25 * two,
        ForwardKL(): two / 3,
        ReverseKL(tail=True): 0.25 * two,
        ReverseKL(): two / 3,
        IQLearn("identity"): -third,
        IQLearn("identity", expectation="teacher"): 2 / 3 * math.log(3) + 1 / 3 * -third,
    }
    for objective, wanted in expected.items():
        options = {"objective": objective, "q": q, "k": 2, "gamma": 0.0}
        loss = ops.td_loss(student, teacher, token, **options).loss
        assert loss.item() == pytest.approx(wanted), objective


def test_the_chi2_regulariser_by_hand():
    """Two rows, the second is the end; Q are the logits, and V of a set of one is its Q."""
    student = torch.tensor([[0.7, -9.0], [-1.2, -9.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -INF], [0.0, -INF]], dtype=torch.float64)
    options = {
        "q": "logit",
        "k": 1,
        "gamma": 0.5,
        "successor": torch.tensor([1, -1]),
        "reduction": "none",
    }
    first, second = 0.7 + 0.6, -1.2  # Q - gamma V'
    for expectation in ("token", "teacher"):
        out = ops.td_loss(
            student, teacher, torch.tensor([0, 0]),
            objective=IQLearn(alpha=0.4, expectation=expectation), **options,
        )  # fmt: skip
        # V - gamma V' - (x - x^2 / (4 alpha)), where V = Q
        assert out.loss.tolist() == pytest.approx([first**2 / 1.6, second**2 / 1.6])
        assert out.td_error.tolist() == pytest.approx([first, second])
        assert out.value.tolist() == out.q.tolist() == pytest.approx([0.7, -1.2])


def test_a_tail_that_one_of_the_models_lacks():
    """A set that is the whole vocabulary has no tail, of the student nor of the teacher."""
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    for objective, (p, q) in {
        ForwardKL(tail=True): ((0.5, 0.5), (0.25, 0.75)),
        ReverseKL(tail=True): ((0.25, 0.75), (0.5, 0.5)),
    }.items():
        loss = ops.td_loss(student, teacher, torch.tensor([0]), objective=objective, k=2, top_p=1.0)
        assert loss.loss.item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        )


# Precision and routes


def test_low_precision_heads_are_read_in_float32():
    """Products of the reference too: bfloat16 would round the logits to a 256th."""
    hidden, weight = draw(7, 33, seed=1).bfloat16(), draw(50, 33, seed=2).bfloat16()
    bias = draw(50, seed=3).bfloat16()
    logits = hidden.float() @ weight.float().T + bias.float()
    ids = torch.randint(50, (7, 4), generator=torch.Generator().manual_seed(0))
    options = {"bias": bias, "impl": "reference"}
    actions = ops.linear_select_actions(hidden, weight, 9, 0.9, **options)
    wanted = ops.select_actions(logits, 9, 0.9)
    assert torch.equal(actions.ids, wanted.ids)
    torch.testing.assert_close(actions.log_probs, wanted.log_probs)
    log_p = logits.log_softmax(-1)
    got = ops.linear_log_probs(hidden, weight, ids, **options)
    torch.testing.assert_close(got.log_probs, log_p.gather(-1, ids))
    q = ops.linear_gather_q(hidden, weight, ids, **options)
    torch.testing.assert_close(q, logits.gather(-1, ids))
    log_z = ops.linear_logsumexp(hidden, weight, **options)
    torch.testing.assert_close(log_z, logits.logsumexp(-1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_logsumexp(hidden, weight, **options), log_z)
        assert torch.equal(ops.linear_gather_q(hidden, weight, ids, **options), q)
    for dtype in (torch.bfloat16, torch.float16):
        low = q.to(dtype)
        for impl in ("auto", "reference"):
            value = ops.soft_value(low, impl=impl)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, low.float().logsumexp(-1))
        target = ops.td_target(low[:, 0], ids[:, 0] * 0 - 2)
        assert target.dtype == torch.float32


def test_a_vocabulary_of_most_columns_is_no_estimate(linear, dense):
    """At half of the columns, of so few rows, the loss is the exact one; at a third it is not."""
    actions = ops.ActionSet(
        dense[2].clamp(min=0).int().unsqueeze(-1), torch.zeros(2, 5, 1), torch.ones(2, 5).int()
    )
    student = {n: linear[n] for n in ("student_hidden", "student_weight", "bias")}

    def loss(**options):
        return ops.linear_td_loss(
            tokens=dense[2],
            actions=actions,
            objective=CrossEntropy(tail=True),
            **student,
            **options,
        ).loss

    members = actions.ids[dense[2] != -100].unique().numel()
    generator = torch.Generator().manual_seed(0)
    options = {"normaliser": "batch", "generator": generator}
    assert torch.equal(loss(extra=45 - members, **options), loss())
    assert not torch.equal(loss(extra=30 - members, **options), loss())


@pytest.mark.parametrize("number", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_temperature_and_scale_is_applied(number, impl):
    logits, ids = draw(3, 8).float(), torch.tensor([[0, 7], [1, 2], [5, 5]])
    picked = logits.gather(-1, ids)
    for got, wanted in (
        (ops.gather_q(logits, ids, temperature=number, impl=impl), picked / number),
        (ops.gather_q(logits, ids, logit_scale=number, impl=impl), picked * number),
        (
            ops.gather_q(logits, ids, softcap=number, impl=impl),
            number * torch.tanh(picked / number),
        ),
    ):
        torch.testing.assert_close(got, wanted)


def test_the_reference_is_what_is_asked_for(monkeypatch):
    """With impl="reference" no kernel is called."""
    from tdkd.kernels import gather_q, select_actions, soft_value, td_target

    def kernel(*args, **kwargs):
        raise AssertionError("a kernel")

    for module, name in (
        (gather_q, "gather_q"),
        (select_actions, "select_actions"),
        (soft_value, "soft_value"),
        (td_target, "td_target"),
    ):
        monkeypatch.setattr(module, name, kernel)
    logits, ids = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    for call in (
        lambda impl: ops.gather_q(logits, ids, impl=impl),
        lambda impl: ops.select_actions(logits, impl=impl),
        lambda impl: ops.soft_value(logits, impl=impl),
        lambda impl: ops.td_target(logits[:, 0], ids[:, 0] - 1, impl=impl),
    ):
        call("reference")
        if backends.MISSING is None:
            with pytest.raises(AssertionError, match="a kernel"):
                call("auto")


def test_head_rows_exist_for_a_few_positions_at_a_time(monkeypatch):
    """The reference of the row gather holds no more than a chunk of them."""
    monkeypatch.setattr(linear_rows_reference, "CHUNK_ELEMENTS", 2 * 64 * 12)
    hidden, weight = draw(8, 12).requires_grad_(), draw(70, 12, seed=1).requires_grad_()
    ids = torch.randint(70, (8, 64), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as seen:
        ops.linear_gather_q(hidden, weight, ids, impl="reference").sum().backward()
    assert seen.elements <= 2 * 64 * 12


def test_routes_are_told_for_a_cpu_unless_asked():
    assert ops.routes() == ops.routes("cpu") != ops.routes("cuda")
    assert ops.routes("mps") == ops.routes("cuda")
    assert "k head rows" in ops.routes()


def test_indices_of_rows_are_int64(dense):
    """As the record says, whatever the successors came as."""
    student, teacher, tokens = dense
    seen = []

    def objective(rows):
        seen.append(rows)
        return rows.value

    ops.td_loss(
        student, teacher, tokens, objective=objective, successor=ops.successors(tokens).int()
    )
    assert seen[0].successor.dtype == seen[0].slot.dtype == torch.int64


def test_rows_that_are_no_states_hold_zeros(dense):
    """And nothing valid; slots that are padded hold -inf in the others."""
    student, teacher, tokens = dense
    seen = []

    def objective(rows):
        seen.append(rows)
        return rows.value

    out = ops.td_loss(student, teacher, tokens, objective=objective, k=70, top_p=0.6)
    (rows,) = seen
    assert torch.equal(rows.state, (tokens != -100).flatten())
    for x in (rows.q, rows.log_probs, rows.value, rows.slot, rows.valid):
        assert not x[~rows.state].any()
    padded = (out.actions.ids.view(10, 70) < 0) & rows.state.unsqueeze(-1)
    assert padded.any()
    assert torch.equal(rows.valid[rows.state], ~padded[rows.state])
    assert (rows.q[padded] == -INF).all()
    assert (rows.log_probs[padded] == -INF).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_one_row_needs_no_leading_dims(dense, impl):
    student, teacher, tokens = dense
    for objective in (ForwardKL(tail=True), ForwardKL()):
        options = {"objective": objective, "k": 5, "impl": impl}
        one = ops.td_loss(student[0, 1], teacher[0, 1], tokens[0, 1], **options)
        row = ops.td_loss(student[:1, 1], teacher[:1, 1], tokens[:1, 1], **options)
        assert one.loss.shape == one.q.shape == ()
        torch.testing.assert_close([x for x in one[:4]], [x.squeeze() for x in row[:4]])


def test_ids_are_not_looked_at_unless_asked():
    """An id too large is an error of the kernel or of torch then."""
    for dtype in (torch.float32, torch.float64):
        logits, hidden, weight = x.to(dtype), h.to(dtype), w.to(dtype)
        for call in (
            lambda logits=logits: ops.gather_q(logits, some + 3),
            lambda logits=logits: ops.select_actions(logits, 2, include=token + 3),
            lambda a=hidden, b=weight: ops.linear_select_actions(a, b, 2, include=token + 3),
        ):
            with pytest.raises((RuntimeError, IndexError)):
                call()


@pytest.mark.parametrize("way", ["gather", "products"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_id_out_of_range_is_one_error_on_every_way(way, impl):
    sets = SETS._replace(ids=SETS.ids + 3)
    told = "expected ids below the vocabulary's size 5, got 5"
    with routes.forced(way):
        for op in (ops.linear_gather_q, ops.linear_log_probs):
            with pytest.raises(ValueError, match=f"^ids: {told}$"):
                op(h, w, some + 3, impl=impl)
        for options in ({}, {"normaliser": "batch"}, {"q": "logit", "objective": ForwardKL()}):
            with pytest.raises(ValueError, match=f"^actions: {told}$"):
                ops.linear_td_loss(h, w, token, actions=sets, impl=impl, **options)
            with pytest.raises(ValueError, match="^tokens: expected ids from 0 to 4, .*, got 5$"):
                ops.linear_td_loss(h, w, token + 3, actions=sets, impl=impl, **options)
    # rows that are no states are not looked at
    ops.linear_td_loss(h, w, torch.tensor([4, -100]), actions=sets, impl=impl)


def test_linear_selection_reads_the_columns_of_its_head(linear):
    hidden, weight, bias = (linear[f"teacher_{name}"] for name in ("hidden", "weight", "bias"))
    same(
        ops.linear_select_actions(hidden, weight, 7, bias=bias, vocab_size=V - 60),
        ops.linear_select_actions(hidden, weight[: V - 60], 7, bias=bias[: V - 60]),
    )
    with pytest.raises(ValueError, match=r"weight: expected \(V, 8\) to fit hidden"):
        ops.linear_select_actions(hidden, weight[:, :-1], 7)


@pytest.mark.parametrize("k", [20, 64, 300])
def test_many_ties_are_taken_in_order(k):
    """Whole numbers, a hundred tokens of each: ids ascend among equals."""
    logits = (draw(3, 700) * 1.5).round()
    got = ops.select_actions(logits, k, impl="reference").ids
    for row, ids in zip(logits.tolist(), got.tolist(), strict=True):
        assert ids == sorted(range(700), key=lambda i: (-row[i], i))[:k]


# What a caller hands over ready-made


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_weighted_columns_are_looked_at(linear, impl):
    hidden = linear["student_hidden"].detach().float()
    weight = linear["student_weight"].detach().float()
    ids = torch.arange(weight.shape[0], dtype=torch.int32)
    zeros = torch.zeros(ids.numel())
    given = {"impl": impl, "vocabulary": ops.Vocabulary(ids, zeros)}
    expected = ops.linear_logsumexp(hidden, weight, **given)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        same_dtype = ops.Vocabulary(ids, torch.full_like(zeros, 0.5, dtype=dtype))
        got = ops.linear_logsumexp(hidden, weight, impl=impl, vocabulary=same_dtype)
        torch.testing.assert_close(got, expected + 0.5)
    twice, cut = ids.clone(), ids.clone()
    twice[1], cut[0] = 0, -1
    for wrong, error, message in (
        ((ids, zeros), TypeError, "vocabulary: expected a Vocabulary, .*got tuple"),
        (ops.Vocabulary(ids, zeros[:-1]), ValueError, "vocabulary.log_weight: expected the shape"),
        (ops.Vocabulary(ids, ids), TypeError, "vocabulary.log_weight: expected float"),
        (ops.Vocabulary(ids.float(), zeros), TypeError, "vocabulary.ids: expected int32"),
        (ops.Vocabulary(ids + 1, zeros), ValueError, "vocabulary.ids: expected ids below"),
        (ops.Vocabulary(twice, zeros), ValueError, "vocabulary.ids: expected ascending, distinct"),
        (ops.Vocabulary(cut, zeros), ValueError, "vocabulary.log_weight: expected -inf where"),
        (ops.Vocabulary(ids.view(1, -1), zeros), ValueError, r"vocabulary.ids: expected \(M,\)"),
    ):
        with pytest.raises(error, match=message):
            ops.linear_logsumexp(hidden, weight, vocabulary=wrong, impl=impl)


def test_sets_are_looked_at(linear, dense):
    tokens = dense[2]
    hidden = linear["student_hidden"].detach().requires_grad_()
    weight = linear["student_weight"].detach()
    sets = ops.linear_select_actions(
        linear["teacher_hidden"], linear["teacher_weight"], 4, include=tokens.clamp(min=-1)
    )

    def loss(actions, **options):
        return ops.linear_td_loss(hidden, weight, tokens, actions=actions, **options).loss

    nan = sets._replace(log_probs=torch.full_like(sets.log_probs, torch.nan))
    for wrong, error, message in (
        (tuple(sets), TypeError, "actions: expected an ActionSet, got tuple"),
        (
            sets._replace(log_probs=sets.log_probs[..., :-1]),
            ValueError,
            r"actions.log_probs: expected the shape of actions.ids \(",
        ),
        (
            sets._replace(log_probs=sets.log_probs.to("meta")),
            ValueError,
            "actions.log_probs: expected a tensor on cpu, got one on meta",
        ),
        (
            sets._replace(log_probs=sets.log_probs.int()),
            TypeError,
            "actions.log_probs: expected fl",
        ),
        (nan, ValueError, "actions.log_probs: expected log-probabilities, at most 0, got nan"),
        (
            sets._replace(log_probs=sets.log_probs.exp()),
            ValueError,
            "actions.log_probs: expected log-probabilities, at most 0, got 0",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            loss(wrong, check=True)
    # a teacher has no gradient
    learns = sets.log_probs.clone().requires_grad_()
    for impl in ("auto", "reference"):
        loss(sets._replace(log_probs=learns), impl=impl).backward()
    assert learns.grad is None


def test_what_no_member_says_is_not_looked_at():
    """Log-probabilities of padding and of rows that are no states; those of id 0 are."""
    # 1e-3 is what rounding may make of 0
    log_probs = torch.tensor([[-1.0, 1e-3, 5.0], [-1.0, 5.0, 5.0]])
    ids = torch.tensor([[1, 2, -1], [2, 3, -1]], dtype=torch.int32)
    sets = ops.ActionSet(ids, log_probs, torch.tensor([2, 2], dtype=torch.int32))
    ops.linear_td_loss(h, w, torch.tensor([1, -100]), actions=sets, check=True)
    sets = sets._replace(ids=torch.tensor([[1, 2, 0], [2, 3, -1]], dtype=torch.int32))
    with pytest.raises(ValueError, match="^actions.log_probs: .* got 5"):
        ops.linear_td_loss(h, w, torch.tensor([1, -100]), actions=sets, check=True)


def test_an_ignore_index_above_the_vocabulary(dense, linear):
    student, teacher, tokens = dense
    outside = tokens.where(tokens != -100, V)
    for op, given in ((ops.td_loss, (student, teacher)), (ops.linear_td_loss, ())):
        options = {} if given else linear
        plain = op(*given, tokens=tokens, **options).loss
        assert torch.equal(op(*given, tokens=outside, ignore_index=V, **options).loss, plain)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_rows_that_are_none_are_refused(dense, impl):
    student, teacher, tokens = dense
    rows = tokens.numel()
    for wrong in (rows, -3):
        successor = torch.full_like(tokens, -2)
        successor.view(-1)[0] = wrong
        with pytest.raises(ValueError, match=f"successor: expected rows from 0 .*got {wrong}"):
            ops.td_loss(student, teacher, tokens, successor=successor, impl=impl)
        with pytest.raises(ValueError, match=f"successor: expected rows from 0 .*got {wrong}"):
            ops.td_target(tokens.float(), successor, impl=impl)
    for name, value, message in (
        ("num_items_in_batch", torch.ones(2), "expected one number, got a tensor of shape"),
        ("num_items_in_batch", -3, r"expected a number in \[0, inf\], got -3"),
        ("num_items_in_batch", math.nan, r"expected a number in \[0, inf\], got nan"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            ops.td_loss(student, teacher, tokens, impl=impl, **{name: value})
    for name in ("gamma", "temperature", "softcap", "top_p"):
        with pytest.raises(TypeError, match=f"{name}: expected a number, got 'a'"):
            ops.td_loss(student, teacher, tokens, impl=impl, **{name: "a"})
    nan = student.clone()
    nan.view(-1, nan.shape[-1])[int((tokens.view(-1) != -100).int().argmax())] = torch.nan
    with pytest.raises(ValueError, match="student_logits: expected rows without NaN"):
        ops.td_loss(nan, teacher, tokens, impl=impl, check=True)
    with pytest.raises(TypeError, match="objective: expected a tensor, got float"):
        ops.td_loss(student, teacher, tokens, objective=lambda rows: 1.0, impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_has_no_say(dtype):
    logits = torch.randn(1, 700, 40)
    tokens = torch.randint(40, (1, 700))
    actions = ops.select_actions(logits, 4, include=tokens)

    def all_of_it():
        generator = torch.Generator().manual_seed(0)
        sampled = ops.batch_vocabulary(actions, 40, extra=3, capacity=40, generator=generator)
        objective = IQLearn(alpha=1.0, value="initial")
        return sampled, ops.td_loss(logits, -logits, tokens, objective=objective, k=4).loss

    expected = all_of_it()
    torch.set_default_dtype(dtype)
    try:
        got = all_of_it()
    finally:
        torch.set_default_dtype(torch.float32)
    same(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_what_learns_within_an_objective_gets_its_gradient_in_the_linear_form():
    hidden, weight = torch.randn(6, 4), torch.randn(30, 4)
    tokens = torch.randint(30, (6,))
    given = {"k": 5, "successor": torch.tensor([1, 2, -1, 4, 5, -2])}
    rate = torch.nn.Parameter(torch.tensor(0.5))
    learned = torch.nn.Parameter(torch.tensor(0.3))
    for made, leaf in (
        (lambda: rate * ForwardKL(tail=True) + IQLearn(alpha=1.0), rate),
        (lambda: SQIL(reward=lambda rows: learned * rows.value.detach()), learned),
    ):
        grads = []
        for linear_form in (True, False):
            objective = made()
            assert not objective.rowwise
            student = hidden.clone().requires_grad_()
            if linear_form:
                out = ops.linear_td_loss(
                    student, weight, tokens, teacher_hidden=-hidden, teacher_weight=weight,
                    objective=objective, **given,
                )  # fmt: skip
            else:
                logits = student @ weight.T, -hidden @ weight.T
                out = ops.td_loss(*logits, tokens, objective=objective, **given)
            grads.append(torch.autograd.grad(out.loss, leaf)[0])
        torch.testing.assert_close(*grads)
        assert grads[0] != 0


SECOND = {
    "gather_q": (lambda x, impl: ops.gather_q(x, SOME.clamp(max=7), softcap=3.0, impl=impl)),
    "soft_value": (lambda x, impl: ops.soft_value(x, impl=impl)),
    "linear_gather_q": (lambda x, impl: ops.linear_gather_q(x, torch.ones(9, 8), SOME, impl=impl)),
    "linear_logsumexp": (lambda x, impl: ops.linear_logsumexp(x, torch.eye(8), impl=impl)),
    "td_loss": (lambda x, impl: ops.td_loss(x, -x.detach(), TAKEN, k=3, impl=impl).loss),
    "linear_td_loss": (
        lambda x, impl: ops.linear_td_loss(
            x, torch.eye(8), TAKEN, teacher_hidden=-x.detach(), teacher_weight=torch.eye(8), k=3,
            objective=ForwardKL(tail=True), impl=impl,
        ).loss
    ),
}  # fmt: skip
SOME = torch.tensor([[0, 3], [8, 1], [2, 2], [5, 0]])
TAKEN = torch.tensor([1, 7, 0, 3])


@pytest.mark.parametrize("name", SECOND)
def test_second_gradients_are_those_of_the_reference_or_refused(name):
    """Never left out: a penalty on gradients would do nothing."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(impl):
        (first,) = torch.autograd.grad(SECOND[name](x, impl).sum(), x, create_graph=True)
        return first

    (plain,) = torch.autograd.grad(SECOND[name](x, "auto").sum(), x)
    torch.testing.assert_close(gradient("auto").detach(), plain)
    torch.testing.assert_close(gradient("reference").detach(), plain)
    if gradient("reference").requires_grad:
        gradient("reference").square().sum().backward()
    if backends.why_not(x) is not None:
        return
    # torch's own guard sees only what goes through a gradient to no input by name
    for second in (
        lambda total: total.backward(),
        lambda total: total.backward(inputs=[x]),
        lambda total: torch.autograd.grad(total, x),
    ):
        with pytest.raises(RuntimeError, match="no second gradients, .*impl=.reference. has them"):
            second(gradient("auto").square().sum() + SECOND[name](x, "auto").sum())


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_was_made_in_inference_mode_serves(dense, linear, impl):
    """Sets of a teacher are often made there, and autograd refuses to keep such tensors."""
    student, teacher, tokens = (x.flatten(0, 1)[:5] for x in dense)
    hidden, weight = linear["student_hidden"].flatten(0, 1)[:5], linear["student_weight"]
    options = {"q": "log_prob", "objective": ForwardKL(tail=True) + IQLearn(), "impl": impl}

    def made():
        taken = torch.where(tokens < 0, -1, tokens)
        actions = ops.select_actions(teacher.float(), 6, include=taken)
        chosen = ops.batch_vocabulary(
            actions, V, extra=9, generator=torch.Generator().manual_seed(1)
        )
        level = draw(5, seed=7, dtype=torch.float32)
        return actions, chosen, ops.successors(tokens), level, level.abs(), teacher.float()

    def gradients(actions, chosen, successor, level, share, teacher):
        leaves = [x.float().requires_grad_() for x in (student, hidden, weight)]
        z, h, w = leaves
        rows = {"successor": successor, "target_value": level, "expert_weight": share, **options}
        parts = (
            ops.gather_q(z, actions.ids, impl=impl),
            ops.linear_gather_q(h, w, actions.ids, impl=impl),
            ops.linear_log_probs(h, w, actions.ids, impl=impl).log_probs,
            ops.td_target(z[:, 0], successor, gamma=0.9, impl=impl),
            ops.td_loss(z, teacher, tokens, k=6, **rows).loss,
            ops.linear_td_loss(h, w, tokens, actions=actions, **rows).loss,
            ops.linear_td_loss(
                h, w, tokens, actions=actions, normaliser="batch", vocabulary=chosen, **rows
            ).loss,
        )
        total = sum(torch.where(x.isfinite(), x, 0.0).square().sum() for x in parts)
        return torch.autograd.grad(total, leaves)

    expected = gradients(*made())
    with torch.inference_mode():
        given = made()
    assert given[0].ids.is_inference()
    for got, wanted in zip(gradients(*given), expected, strict=True):
        assert torch.equal(got, wanted)


def test_sizes_are_whole_numbers_and_sets_have_room(dense):
    _, teacher, tokens = dense
    actions = ops.select_actions(teacher.float(), 3)
    for name, wrong in (("vocab_size", float(V)), ("extra", 1.5), ("capacity", True)):
        sizes = {"vocab_size": V, name: wrong}
        with pytest.raises(
            TypeError, match=f"^{name}: expected an int, got {type(wrong).__name__}"
        ):
            ops.batch_vocabulary(actions, **sizes)
    nothing = ops.ActionSet(
        torch.empty(2, 5, 0, dtype=torch.int32), torch.empty(2, 5, 0), torch.zeros(2, 5)
    )
    with pytest.raises(ValueError, match="^actions: expected sets with room for at least one id"):
        ops.linear_td_loss(torch.ones(2, 5, 3), torch.ones(V, 3), tokens, actions=nothing)


@pytest.mark.parametrize("given", ["</s>", [2, None], 2.5, True, torch.tensor([2.0])])
def test_what_ends_a_response_is_an_integer(given):
    with pytest.raises(TypeError, match="^eos_token_id: expected"):
        ops.successors(torch.tensor([1, 2]), eos_token_id=given)


def test_several_tokens_may_end_a_response():
    tokens = torch.tensor([1, 2, 3, 4])
    for given in ([2, 4], (2, 4), torch.tensor([[2], [4]])):
        assert ops.successors(tokens, eos_token_id=given).tolist() == [1, -1, 3, -1]
    assert ops.successors(tokens, eos_token_id=[]).tolist() == [1, 2, 3, -2]


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_weights_of_experts_are_shares(dense, wrong):
    student, teacher, tokens = dense
    weight = torch.ones(2, 5)
    weight[0, 0] = wrong  # no state
    ops.td_loss(student, teacher, tokens, k=4, expert_weight=weight)
    weight[0, 1] = wrong
    with pytest.raises(ValueError, match="^expert_weight: expected finite numbers >= 0, got"):
        ops.td_loss(student, teacher, tokens, k=4, expert_weight=weight)
