"""linear_td_loss on its routes: gradients in forward, the batch vocabulary, the choice."""

import math
from fractions import Fraction

import pytest
import torch

from tdkd import ops
from tdkd import types as ops_types
from tdkd.kernels import backends, head, routes
from tdkd.kernels.batch_vocabulary.reference import student_law
from tdkd.objectives import (
    LK,
    LSIQ,
    CrossEntropy,
    ForwardKL,
    IQLearn,
    Objective,
    ReverseKL,
    SoftTD,
)

ROWS, VOCAB, WIDTH, K = 23, 90, 12, 6
FLOAT32, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
OBJECTIVES = [
    ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0, stop_gradient="next"),
    IQLearn(alpha=1.0, expectation="teacher"),
    ReverseKL(tail=True),
    CrossEntropy(tail=True) + IQLearn("identity"),
    IQLearn("js", alpha=1.0, value="initial"),
    SoftTD(stop_gradient=None) + LK(tail=True),
    LSIQ(),
]


@pytest.fixture(autouse=True)
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 4 * VOCAB)
    monkeypatch.setattr(routes, "MOST_LINKS", 0.3)  # chunks are shorter than any in earnest
    monkeypatch.setattr(routes, "BATCH_BELOW", 0.8)  # as with many rows


@pytest.fixture
def products(monkeypatch):
    """How many rows of logits were made; a part of one, where they are not of all columns."""
    made = []
    logits = head.Head.logits

    def counted(self, hidden, *columns):
        out = logits(self, hidden, *columns)
        made.append(Fraction(out.numel(), self.weight.shape[0]))
        return out

    monkeypatch.setattr(head.Head, "logits", counted)
    return made


def make(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(ROWS, WIDTH), normal(VOCAB, WIDTH)
    tokens = torch.randint(VOCAB, (ROWS,), generator=generator)
    tokens[[5, 16]] = -100
    tokens[9] = 2
    actions = ops.select_actions(
        normal(ROWS, VOCAB).float() * 2, K, 0.9, include=tokens.clamp(min=-1)
    )
    leaves = [hidden, weight, *([normal(VOCAB)] if bias else [])]
    return [x.requires_grad_() for x in leaves], tokens, actions


def loss(leaves, tokens, actions, **options):
    hidden, weight, *bias = leaves
    return ops.linear_td_loss(
        hidden, weight, tokens, actions=actions, bias=bias[0] if bias else None, **options
    )


def exact_in_float64(leaves, tokens, actions, of, **options):
    """Gradients by the reference in float64 of a function of the output."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = loss(wide, tokens, actions, impl="reference", **options)
    return out, torch.autograd.grad(of(out), wide)


def agree(got, expected):
    """Within 64 units in the last place of a tensor's largest element: float32 sums of some ninety
    terms that cancel."""
    for x, wanted in zip(got, expected, strict=True):
        unit = torch.finfo(torch.float32).eps * float(wanted.detach().abs().max())
        torch.testing.assert_close(x.double(), wanted.double(), rtol=0, atol=64 * unit)


def shuffled(tokens, seed=0):
    """Successors of a random packing: every state's is somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(ROWS, generator=generator)
    successor = torch.empty(ROWS, dtype=torch.int64)
    successor[order[:-1]] = order[1:]
    successor[order[-1]] = -1
    return successor


def numbers(out):
    """All that a loss tells; the mass where it knows it."""
    assert out.log_mass is None or not out.log_mass.requires_grad
    return (*out[:4], out.entropy, *([] if out.log_mass is None else [out.log_mass]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_successors_within_chunks_are_looked_at_where_none_is_in_another(products, objective):
    """Responses that end, or are cut by a row that is no state, where chunks of four rows do."""
    leaves, tokens, actions = make()
    tokens = torch.where(tokens == -100, 3, tokens)
    tokens[3] = -100
    actions = ops.ActionSet(actions.ids.clone(), *actions[1:])
    actions.ids[:, 0] = torch.where((actions.ids == tokens[:, None]).any(-1), actions.ids[:, 0],
                                    tokens.clamp(min=0).int())  # fmt: skip
    successor = torch.arange(1, ROWS + 1)
    successor[3::4], successor[-1] = torch.tensor([-2, -1, -2, -1, -1]), -1
    options = {"objective": objective, "successor": successor, "gamma": 0.9}
    got = loss(leaves, tokens, actions, **options)
    grads = torch.autograd.grad(got.loss, leaves)
    assert sum(products) == ROWS
    out, expected = exact_in_float64(leaves, tokens, actions, lambda out: out.loss, **options)
    agree([got.loss, got.td_error], [out.loss, out.td_error])
    agree(grads, expected)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("q", ["log_prob", "logit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"num_items_in_batch": torch.tensor(7)}, {"softcap": 3.0}],
    ids=["mean", "sum", "items", "softcap"],
)
def test_gradients_in_forward_take_one_pass_over_the_head(products, objective, q, options):
    leaves, tokens, actions = make()
    options = {
        "objective": objective,
        "q": q,
        "successor": ops.successors(tokens, eos_token_id=2),
        **options,
    }
    out = loss(leaves, tokens, actions, **options)
    grads = torch.autograd.grad(3.0 * out.loss, leaves)
    # each row once, and the first row of each of the five later chunks beforehand, but for one
    # whose predecessor is no state
    if q == "logit" and not objective.normalised:
        assert not products
    else:
        assert ROWS <= sum(products) <= ROWS + 5
    wanted, expected = exact_in_float64(leaves, tokens, actions, lambda o: 3.0 * o.loss, **options)
    agree(numbers(out), numbers(wanted))
    agree(grads, expected)


def test_chunks_of_a_wide_head_keep_their_rows(monkeypatch, products):
    leaves, tokens, actions = make()
    options = {"objective": ForwardKL(tail=True)}
    monkeypatch.setitem(head.WIDE_COLUMNS, "cpu", VOCAB // 5)  # a chunk of 4 rows becomes one of 20
    out = loss(leaves, tokens, actions, **options)
    # times 1, where nothing is left to do, and times 3
    grads = [torch.autograd.grad(n * out.loss, leaves, retain_graph=n == 1) for n in (1, 3)]
    assert products[:2] == [20, 3]
    assert sum(products[2:]) == ROWS
    _, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, **options)
    agree(grads[0], expected)
    agree(grads[1], [3 * x for x in expected])


def test_successors_far_away_are_not_worth_it_and_right_all_the_same(products):
    leaves, tokens, actions = make()
    options = {"objective": OBJECTIVES[1], "successor": shuffled(tokens)}
    out = loss(leaves, tokens, actions, **options)
    grads = torch.autograd.grad(out.loss, leaves)
    assert sum(products) == 2 * ROWS
    _, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, **options)
    agree(grads, expected)


def test_any_links_between_chunks_give_the_same_gradients(monkeypatch, products):
    monkeypatch.setattr(routes, "MOST_LINKS", 1.0)
    for seed in range(6):
        leaves, tokens, actions = make(seed=seed)
        options = {"objective": OBJECTIVES[1], "successor": shuffled(tokens, seed)}
        del products[:]
        out = loss(leaves, tokens, actions, **options)
        grads = torch.autograd.grad(out.loss, leaves)
        assert sum(products) < 2 * ROWS
        _, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, **options)
        agree(grads, expected)


@pytest.mark.parametrize("objective", [IQLearn(alpha=1.0), SoftTD()], ids=repr)
def test_a_target_network_s_values_are_cut_into_chunks_too(products, objective):
    leaves, tokens, actions = make()
    options = {
        "objective": objective,
        "successor": ops.successors(tokens, eos_token_id=2),
        "target_value": -torch.rand(ROWS, generator=torch.Generator().manual_seed(2)),
    }
    out = loss(leaves, tokens, actions, **options)
    grads = torch.autograd.grad(out.loss, leaves)
    assert sum(products) < 2 * ROWS
    wanted, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, **options)
    agree(numbers(out), numbers(wanted))
    agree(grads, expected)


def test_second_backward_and_gradients_of_the_other_outputs():
    leaves, tokens, actions = make()
    options = {"objective": OBJECTIVES[0]}
    out = loss(leaves, tokens, actions, **options)
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(0)  # a caller may do what it likes with them
    agree(torch.autograd.grad(out.loss, leaves, retain_graph=True), kept)

    def mixed(o):
        return o.loss + o.q.sum() + (o.value * 0.3).sum() + o.td_error.square().sum()

    _, expected = exact_in_float64(leaves, tokens, actions, mixed, **options)
    agree(torch.autograd.grad(mixed(out), leaves, retain_graph=True), expected)
    _, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.value.sum(), **options)
    agree(torch.autograd.grad(out.value.sum(), leaves), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_that_are_used_twice_and_other_dtypes(kind):
    leaves, tokens, actions = make(kind, bias=False)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    eager = [x.detach().clone().requires_grad_() for x in leaves]
    for some, impl in ((leaves, "auto"), (eager, "reference"), (wide, "reference")):
        options = {"objective": OBJECTIVES[0], "normaliser": "exact", "impl": impl}
        out = loss(some, tokens, actions, **options)
        (out.loss + some[0].to(wide[0].dtype).square().sum()).backward()
    for x, theirs, wanted in zip(leaves, eager, wide, strict=True):
        assert x.grad.dtype == kind
        unit = torch.finfo(kind).eps * wanted.grad.abs().max()
        error, allowed = ((y.grad.double() - wanted.grad).abs().max() for y in (x, theirs))
        assert error <= allowed + 2 * unit


def test_a_loss_scale_keeps_small_gradients_of_float16():
    """Gradients below what float16 holds: made in forward, scaled before they are rounded."""
    leaves, tokens, actions = make(torch.float16, bias=False)
    options = {"objective": OBJECTIVES[0], "num_items_in_batch": 1e9}
    grads = torch.autograd.grad(65536.0 * loss(leaves, tokens, actions, **options).loss, leaves)
    _, expected = exact_in_float64(leaves, tokens, actions, lambda o: 65536.0 * o.loss, **options)
    for got, wanted in zip(grads, expected, strict=True):
        assert wanted.abs().max() / 65536 < 2**-24  # float16 knows nothing so small
        unit = torch.finfo(torch.float16).eps * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= 2 * unit


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    leaves, tokens, actions = make(bias=False)
    leaves[frozen].requires_grad_(False)
    out = loss(leaves, tokens, actions, objective=OBJECTIVES[0])
    out.loss.backward()
    assert leaves[frozen].grad is None
    wanted = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, objective=OBJECTIVES[0])
    agree([leaves[1 - frozen].grad], [wanted[1][1 - frozen]])


def test_per_row_losses_and_objectives_of_ones_own_take_the_other_way(products):
    leaves, tokens, actions = make()
    weights = torch.linspace(0, 1, ROWS)
    builtin = OBJECTIVES[0]

    def own(rows):
        """Rows that know each other: a mean over the batch."""
        return builtin(rows) * (1 + rows.value.detach().mean()) + rows.value.mean()

    for objective, reduction in ((builtin, "none"), (own, "mean")):
        options = {"objective": objective, "reduction": reduction}

        def of(out):
            return (out.loss * weights.to(out.loss.dtype)).sum()

        del products[:]
        grads = torch.autograd.grad(of(loss(leaves, tokens, actions, **options)), leaves)
        assert sum(products) == 2 * ROWS
        agree(grads, exact_in_float64(leaves, tokens, actions, of, **options)[1])


def test_without_gradients_nothing_is_made_for_them(products):
    leaves, tokens, actions = make()
    with torch.no_grad():
        out = loss(leaves, tokens, actions, objective=OBJECTIVES[0])
    assert sum(products) == ROWS
    assert not out.loss.requires_grad


def test_batch_vocabulary_route_equals_its_reference():
    leaves, tokens, actions = make()
    for extra in (0, 8):
        vocabulary = ops.batch_vocabulary(
            actions, VOCAB, extra=extra, generator=torch.Generator().manual_seed(1)
        )
        options = {
            "objective": OBJECTIVES[0],
            "normaliser": "batch",
            "vocabulary": vocabulary,
            "softcap": 4.0,
        }
        out = loss(leaves, tokens, actions, **options)
        grads = torch.autograd.grad(out.loss, leaves)
        wanted, expected = exact_in_float64(leaves, tokens, actions, lambda o: o.loss, **options)
        agree(out[:4], wanted[:4])
        agree(grads, expected)
        outside = torch.ones(VOCAB, dtype=torch.bool)
        outside[vocabulary.ids.long()] = False
        assert outside.any()
        assert (grads[1][outside] == 0).all()


def test_a_padded_vocabulary_is_the_same_vocabulary():
    leaves, tokens, actions = make()
    results = []
    for capacity in (None, 80):
        vocabulary = ops.batch_vocabulary(
            actions, VOCAB, extra=4, capacity=capacity, generator=torch.Generator().manual_seed(1)
        )
        out = loss(leaves, tokens, actions, objective=OBJECTIVES[0], normaliser="batch",
                   vocabulary=vocabulary)  # fmt: skip
        results.append((vocabulary, out.loss, *torch.autograd.grad(out.loss, leaves)))
    bare, padded = (result[0] for result in results)
    size = bare.ids.numel()
    assert padded.ids.shape == padded.log_weight.shape == (80,)
    assert size < 80
    assert torch.equal(padded.ids[:size], bare.ids)
    assert torch.equal(padded.log_weight[:size], bare.log_weight)
    assert (padded.ids[size:] == -1).all()
    assert (padded.log_weight[size:] == -torch.inf).all()
    agree(results[1][1:], results[0][1:])
    with pytest.raises(ValueError, match="capacity: expected room for the union .* got 10"):
        ops.batch_vocabulary(actions, VOCAB, extra=4, capacity=10)


def test_a_law_is_unbiased_and_draws_what_it_says():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    actions = ops.linear_select_actions(hidden, weight, k=5)
    union = actions.ids.unique().long()
    law = torch.softmax(hidden @ weight.T, -1).mean(0) + 1e-4
    impossible = torch.tensor([i for i in range(300) if i not in union.tolist()][:3])
    law[impossible] = 0
    possible = torch.ones(300, dtype=torch.bool)
    possible[impossible] = False
    exact = (hidden @ weight.T)[:, possible].exp().sum(-1)
    spreads = []
    for chances in (law, possible.double()):
        draws = []
        for _ in range(600):
            vocabulary = ops.batch_vocabulary(
                actions, 300, extra=40, law=chances, generator=generator
            )
            ids = vocabulary.ids.tolist()
            assert not set(ids) & set(impossible.tolist())
            assert set(union.tolist()) <= set(ids)
            assert len(set(ids)) == len(ids)
            assert abs(len(ids) - union.numel() - 40) <= 1
            draws.append(ops.linear_logsumexp(hidden, weight, vocabulary=vocabulary).exp())
        estimates = torch.stack(draws)
        error = estimates.std(0) / 600**0.5
        assert ((estimates.mean(0) - exact).abs() < 4 * error).all()
        spreads.append(estimates.std(0))
    assert (spreads[0] < 0.5 * spreads[1]).all()  # a law near to the student's own pays


def test_the_law_of_a_student_is_its_mean_probabilities():
    (hidden, weight, bias), tokens, _ = make()
    scale = ops_types.Scale(2.0, 3.0, 0.5)
    state = tokens != -100
    law = student_law(hidden, weight, bias, scale, state)
    logits = 3 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3) / 2
    wanted = 0.9 * logits.softmax(-1)[state].mean(0) + 0.1 / VOCAB
    torch.testing.assert_close(law, wanted.float())
    torch.testing.assert_close(law.sum(), torch.tensor(1.0))
    # rows that are no states have no say, and nothing at all is the uniform law
    even = torch.full((VOCAB,), 0.1 / VOCAB)
    torch.testing.assert_close(student_law(hidden, weight, bias, scale, state & False), even)
    torch.testing.assert_close(student_law(hidden[:0], weight, bias, scale, state[:0]), even)
    with torch.no_grad():
        hidden[3] = torch.nan
    assert student_law(hidden, weight, bias, scale, state).isfinite().all()


def test_the_law_of_a_student_estimates_better():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 12, generator=generator) + 0.3 * torch.randn(9, 12, generator=generator)
    hidden, weight = hidden.requires_grad_(), torch.randn(900, 12, generator=generator)
    tokens = torch.arange(9)
    actions = ops.select_actions(torch.randn(9, 900, generator=generator), 5, include=tokens)

    def gradient(**options):
        out = ops.linear_td_loss(
            hidden, weight, tokens, actions=actions, objective=ForwardKL(tail=True), **options
        )
        return torch.autograd.grad(out.loss, hidden)[0]

    exact, errors = gradient(), {}
    for law in (None, "student"):
        options = {"normaliser": "batch", "extra": 60, "law": law, "generator": generator}
        drawn = torch.stack([gradient(**options) - exact for _ in range(40)])
        errors[law] = drawn.flatten(1).norm(dim=-1).mean()
    assert errors["student"] < 0.5 * errors[None]
    with pytest.raises(ValueError, match='law: expected one of "student"'):
        gradient(normaliser="batch", law="teacher")


def test_the_vocabulary_must_hold_every_member():
    leaves, tokens, actions = make()
    vocabulary = ops.batch_vocabulary(actions, VOCAB, extra=0)
    missing = int(actions.ids[0, 0])
    less = ops.Vocabulary(*(x[vocabulary.ids != missing] for x in vocabulary))
    with pytest.raises(ValueError, match=f"vocabulary: .* but id {missing} is not in it"):
        loss(leaves, tokens, actions, normaliser="batch", vocabulary=less)


def test_routes():
    """The rule, and that the op follows it."""
    assert routes.gathers("cpu", 1024, 49_152, 576, 2048)
    assert not routes.gathers("cpu", 4096, 49_152, 576, 2048)
    assert routes.gathers("cpu", 4096, 49_152, 576, 16)
    assert routes.gathers("cpu", 1024, 49_152, 576, 2048, BRAIN)
    assert not routes.gathers("cpu", 2048, 49_152, 576, 2048, BRAIN)
    assert not routes.gathers("cuda", 64, 4_000, 576, 2048)
    assert routes.gathers("cuda", 64, 49_152, 576, 2048)
    assert routes.pays("cpu", 40_000, 49_152, 2048)
    assert not routes.pays("cpu", 48_000, 49_152, 2048)
    assert not routes.pays("cpu", 45_000, 49_152, 2048, BRAIN)
    assert not routes.pays("cpu", 40_000, 49_152, 256)
    assert routes.pays("cpu", 15_000, 49_152, 1)
    leaves, tokens, actions = make()
    generator = torch.Generator().manual_seed(0)
    # a vocabulary of nearly everything is replaced by everything
    options = {"objective": OBJECTIVES[0], "generator": generator, "extra": VOCAB - 1}
    batch = loss(leaves, tokens, actions, normaliser="batch", **options)
    assert torch.equal(batch.loss, loss(leaves, tokens, actions, objective=OBJECTIVES[0]).loss)


def test_a_way_can_be_forced(products):
    """For measurements: within it alone, and whatever the rule says."""
    (hidden, weight, bias), tokens, actions = make()
    ids = torch.rand(ROWS, VOCAB).topk(3).indices.int()

    def made(call):
        del products[:]
        call()
        return sum(products)

    def gather():
        return made(lambda: ops.linear_gather_q(hidden, weight, ids, bias=bias))

    assert gather() == 0
    with routes.forced("products"):
        assert gather() == ROWS
        with routes.forced("gather"):
            assert gather() == 0
        assert gather() == ROWS
    assert gather() == 0

    members = actions.ids[tokens != -100]
    held = members[members >= 0].unique().numel()

    def touched(extra):
        """Columns of the head that the loss looked at."""
        options = {"objective": OBJECTIVES[0], "normaliser": "batch", "extra": extra}
        out = loss((hidden, weight, bias), tokens, actions, **options)
        return int(torch.autograd.grad(out.loss, weight)[0].any(-1).sum())

    few, most = 0, VOCAB - held - 1
    assert routes.pays("cpu", held, VOCAB, ROWS)
    assert (touched(few), touched(most)) == (held, VOCAB)
    with routes.forced("exact"):
        assert touched(few) == VOCAB
    with routes.forced("batch"):
        assert touched(most) == VOCAB - 1
    with pytest.raises(RuntimeError, match="no more"), routes.forced("exact"):
        raise RuntimeError("no more")
    assert touched(few) == held


@pytest.mark.parametrize("k", [3, 40])
def test_linear_gather_q_is_the_same_on_either_side_of_the_rule(k):
    (hidden, weight, bias), _, _ = make()
    ids = torch.rand(ROWS, VOCAB).topk(k).indices.int()
    ids[3, 1] = -1
    assert routes.gathers("cpu", k, VOCAB, WIDTH, ROWS) == (k == 3)
    grad = torch.randn(ROWS, k)
    q = ops.linear_gather_q(hidden, weight, ids, bias=bias, softcap=3.0)
    got = torch.autograd.grad(q, (hidden, weight, bias), grad)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    dense = ops.gather_q(wide[0] @ wide[1].T + wide[2], ids, softcap=3.0, impl="reference")
    agree((q,), (dense,))
    agree(got, torch.autograd.grad(dense, wide, grad.double()))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_linear_log_probs(impl):
    (hidden, weight, bias), _, actions = make()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (wide[0] @ wide[1].T + wide[2]) / 0.7
    log_p = logits.log_softmax(-1)
    member = torch.zeros(ROWS, VOCAB + 1, dtype=torch.bool)
    member[torch.arange(ROWS)[:, None], actions.ids.long()] = True
    tail = log_p.masked_fill(member[:, :VOCAB], -math.inf).logsumexp(-1)
    picked = log_p.gather(-1, actions.ids.long().clamp(min=0))
    held = actions.ids >= 0
    got = ops.linear_log_probs(hidden, weight, actions.ids, bias=bias, temperature=0.7, impl=impl)
    agree((got.log_probs[held], got.log_tail), (picked[held], tail))
    assert (got.log_probs[~held] == -torch.inf).all()
    grad, of_tail = torch.randn(ROWS, K), torch.randn(ROWS)
    total = (torch.where(held, got.log_probs, 0) * grad).sum() + (got.log_tail * of_tail).sum()
    wanted = (torch.where(held, picked, 0) * grad).sum() + (tail * of_tail).sum()
    agree(torch.autograd.grad(total, (hidden, weight, bias)), torch.autograd.grad(wanted, wide))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_id_that_stands_twice_counts_once(impl, sampled):
    """As the k likeliest and the taken token may give it: values, tail and gradients."""
    (hidden, weight, bias), _, actions = make()
    slots = torch.tensor([2, 0, 1, 2, 3, 4, 5, 0, 5, 0])
    vocabulary = ops.batch_vocabulary(actions, VOCAB, extra=9) if sampled else None
    weights, of_tail = torch.randn(ROWS, slots.numel()), torch.randn(ROWS)
    results = []
    for twice in (True, False):
        ids = actions.ids[:, slots] if twice else actions.ids
        log_probs, tail = ops.linear_log_probs(
            hidden, weight, ids, bias=bias, vocabulary=vocabulary, temperature=0.7, impl=impl
        )
        log_probs = log_probs if twice else log_probs[:, slots]
        log_probs = torch.where(log_probs == -torch.inf, 0, log_probs)
        total = (log_probs * weights).sum() + (tail * of_tail).sum()
        results.append((log_probs, tail, *torch.autograd.grad(total, (hidden, weight, bias))))
    agree(*results)
    ids = torch.tensor([[3, 3, 7, -1, -1], [0, 2, 0, 0, 1]])
    got = ops.linear_log_probs(torch.zeros(2, 4), torch.ones(10, 4), ids, impl=impl)
    torch.testing.assert_close(got.log_probs.exp(), torch.where(ids < 0, 0, torch.tensor(0.1)))
    torch.testing.assert_close(got.log_tail.exp(), torch.tensor([0.8, 0.7]))
    nan = ops.linear_log_probs(torch.full((2, 4), math.nan), torch.ones(10, 4), ids, impl=impl)
    assert torch.equal(nan.log_probs == -math.inf, ids < 0)


def test_linear_log_probs_keeps_a_tail_that_is_nearly_nothing():
    hidden, weight = torch.eye(2), torch.zeros(40, 2)
    weight[0] = 30.0
    got = ops.linear_log_probs(hidden, weight, torch.zeros(2, 1, dtype=torch.int64))
    torch.testing.assert_close(got.log_tail, torch.full((2,), math.log(39) - 30.0))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": OBJECTIVES[0]},
        {"objective": ForwardKL(), "q": "logit"},
        {"objective": OBJECTIVES[0], "normaliser": "batch", "extra": 0, "capacity": 70},
    ],
    ids=["exact", "gather", "batch"],
)
def test_torch_compile_without_a_graph_break(options):
    leaves, tokens, actions = make()

    def step(*leaves):
        return loss(leaves, tokens, actions, **options).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        result = function(*leaves)
        results.append((result.detach(), *torch.autograd.grad(result, leaves)))
    agree(results[1], results[0])


@pytest.mark.parametrize("tile_rows", [7, 4096])
@pytest.mark.parametrize("op", ["linear_log_probs", "linear_gather_q", "linear_td_loss"])
def test_a_compiled_graph_refuses_ids_of_no_column(monkeypatch, op, tile_rows):
    """Of several tiles none holds such an id, and none of their kernels can tell."""
    monkeypatch.setattr(head, "TILE_ROWS", tile_rows)
    leaves, tokens, actions = make()
    hidden, weight, _ = leaves

    def called(ids):
        if op == "linear_td_loss":
            sets = actions._replace(ids=ids)
            return loss(leaves, tokens, sets, objective=OBJECTIVES[0], reduction="none").loss
        result = getattr(ops, op)(hidden, weight, ids)
        return result if op == "linear_gather_q" else result.log_probs

    wrong = actions.ids.clone()
    wrong[9, -1] = VOCAB + 3
    name = "actions" if op == "linear_td_loss" else "ids"
    told = f"^{name}: expected ids below the vocabulary's size {VOCAB}"
    with pytest.raises(ValueError, match=f"{told}, got {VOCAB + 3}$"):
        called(wrong)
    torch._dynamo.reset()
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    with routes.forced("products"):
        agree([compiled(actions.ids)], [called(actions.ids)])
        with pytest.raises(RuntimeError, match=f"{told}$"):
            compiled(wrong)


@pytest.mark.parametrize("rows,columns", [(0, 5), (5, 0), (0, 0)])
def test_tiles_of_nothing(rows, columns):
    given = list(head.tiles(torch.empty(rows, 2), torch.empty(columns, 2)))
    assert given[0] == (slice(0, min(rows, 4096)), slice(0, columns))
    assert len(given) == 1


@pytest.mark.parametrize("dtype", [FLOAT32, BRAIN])
@pytest.mark.parametrize("tile_rows", [1, 7, ROWS, 4096])
def test_tiles_give_what_whole_rows_do(monkeypatch, products, tile_rows, dtype):
    """Rows and columns in several runs, of ids in some of these, in all, and in none."""
    leaves, tokens, actions = make(dtype=dtype)
    hidden, weight, bias = leaves
    teacher = hidden.detach(), weight.detach()

    def outputs():
        given = ops.linear_log_probs(hidden, weight, actions.ids, bias=bias)
        z = ops.linear_logsumexp(hidden, weight, bias=bias, softcap=5.0)
        q = ops.linear_gather_q(hidden, weight, actions.ids, bias=bias)
        loss = torch.where(actions.valid, given.log_probs, 0.0).sum() + given.log_tail.sum()
        loss = loss + (z * z).sum() + torch.where(actions.valid, q, 0.0).sin().sum()
        sets = ops.linear_select_actions(*teacher, 9, 0.9, include=tokens, bias=bias.detach())
        return sets, (loss.detach(), *torch.autograd.grad(loss, leaves))

    results = []
    with routes.forced("products"):
        for elements in (4 * VOCAB, 1 << 20):
            monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", elements)
            monkeypatch.setattr(head, "TILE_ROWS", tile_rows if elements < 1000 else 4096)
            del products[:]
            results.append(outputs())
            assert max(products) == ROWS if elements > 1000 else max(products) <= 4
    (sets, numbers_), (whole, expected) = results
    assert torch.equal(sets.ids, whole.ids)
    assert torch.equal(sets.count, whole.count)
    torch.testing.assert_close(sets.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(numbers_, expected, strict=True):
        unit = torch.finfo(dtype).eps
        assert (got - wanted).abs().max() <= 8 * unit * wanted.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_torch_compile_of_a_head_that_is_multiplied_in_panels(monkeypatch, bias):
    monkeypatch.setitem(head.PANEL_COLUMNS, "cpu", 32)
    leaves, _, actions = make(bias=bias)

    def step(hidden, weight, *bias):
        given = ops.linear_log_probs(hidden, weight, actions.ids, bias=bias[0] if bias else None)
        return given.log_tail.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        result = function(*leaves)
        results.append((result.detach(), *torch.autograd.grad(result, leaves)))
    agree(results[1], results[0])


FROZEN_WAYS = {
    "log_probs": lambda h, w, b, t, a, **o: ops.linear_log_probs(h, w, a.ids, bias=b, **o).log_tail,
    "logsumexp": lambda h, w, b, t, a, **o: ops.linear_logsumexp(h, w, bias=b, **o),
    "loss a row": lambda h, w, b, t, a, **o: (
        loss([h, w, b], t, a, objective=OBJECTIVES[0], reduction="none", **o).loss
    ),
    "log Z of a batch": lambda h, w, b, t, a, **o: (
        loss(
            [h, w, b],
            t,
            a,
            objective=ReverseKL(tail=True),
            reduction="none",
            vocabulary=ops.batch_vocabulary(
                a, VOCAB, extra=9, generator=torch.Generator().manual_seed(3)
            ),
            normaliser="batch",
            **o,
        ).loss
    ),
}


@pytest.mark.parametrize("way", FROZEN_WAYS)
@pytest.mark.parametrize("scale", [{}, {"softcap": 2.0, "temperature": 1.7, "logit_scale": 0.4}])
@pytest.mark.parametrize("kind", [FLOAT32, BRAIN])
def test_a_frozen_head_needs_its_logits_once(products, way, scale, kind):
    (hidden, weight, bias), tokens, actions = make(kind)
    frozen = weight.detach(), bias.detach(), tokens, actions
    out = FROZEN_WAYS[way](hidden, *frozen, **scale)
    into = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    into[2] = 0.0
    (grad,) = torch.autograd.grad(out, hidden, into, retain_graph=True)
    (again,) = torch.autograd.grad(out, hidden, into)
    assert sum(products) == ROWS
    assert torch.equal(grad, again)
    assert grad.dtype == kind
    found = []
    for dtype in (kind, torch.float64):
        leaf = hidden.detach().to(dtype).requires_grad_()
        heads = [x.detach().to(dtype) for x in (weight, bias)]
        wanted = FROZEN_WAYS[way](leaf, *heads, *frozen[2:], impl="reference", **scale)
        found.append(torch.autograd.grad(wanted, leaf, into.to(wanted.dtype))[0])
    eager, exact = found
    allowed = (eager - exact).norm() + 4 * torch.finfo(kind).eps * exact.norm()
    assert (grad - exact).norm() <= allowed


def test_a_frozen_head_leaves_rows_without_a_gradient_alone():
    """Whatever their logits are; and a bias that learns takes the other way."""
    (hidden, weight, bias), _, _ = make()
    with torch.no_grad():
        hidden[3] = torch.nan
    log_z = ops.linear_logsumexp(hidden, weight.detach(), bias=bias.detach())
    counted = log_z.isfinite()
    (grad,) = torch.autograd.grad(torch.where(counted, log_z, 0.0).sum(), hidden)
    assert counted.sum() == ROWS - 1
    assert not grad[3].any()
    assert grad.isfinite().all()
    learning = ops.linear_logsumexp(hidden[:3], weight.detach(), bias=bias)
    assert torch.autograd.grad(learning.sum(), bias)[0].sum() == pytest.approx(3.0)


def test_a_frozen_head_gives_nothing_for_an_empty_rest():
    """Neither for a gradient of NaN, which `where` sends to what it masks."""
    (hidden, weight, _), _, _ = make()
    nothing = torch.full((VOCAB,), -torch.inf)
    log_z = ops.linear_logsumexp(hidden, weight.detach(), bias=nothing)
    masked = torch.where(log_z.isfinite(), log_z * log_z.exp(), 0.0)
    assert not torch.autograd.grad(masked.sum(), hidden)[0].any()


@pytest.mark.parametrize("kind", [FLOAT32, BRAIN])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("learns", [True, False])
def test_heads_and_hidden_states_that_lie_transposed(kind, turned, learns):
    leaves, tokens, actions = make(kind, bias=False)
    found = []
    for lay in (lambda x: x, lambda x: x.T.contiguous().T):
        mine = [x.detach() for x in leaves]
        mine[turned] = lay(mine[turned])
        mine = [x.requires_grad_(learns or i == 0) for i, x in enumerate(mine)]
        for reduction in ("mean", "none"):
            options = {"objective": OBJECTIVES[0], "reduction": reduction}
            total = loss(mine, tokens, actions, **options).loss.sum()
            found.append(torch.autograd.grad(total, mine if learns else mine[:1]))
    for straight, other in zip(found[:2], found[2:], strict=True):
        for x, y in zip(straight, other, strict=True):
            assert x.dtype == kind
            torch.testing.assert_close(x, y)


def test_one_dnn_may_be_switched_off_before_backward(monkeypatch):
    leaves, tokens, actions = make(BRAIN, bias=False)
    options = {"objective": OBJECTIVES[0], "reduction": "none"}
    totals = [loss(leaves, tokens, actions, **options).loss.sum() for _ in range(2)]
    wanted = torch.autograd.grad(totals[0], leaves)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    for x, y in zip(torch.autograd.grad(totals[1], leaves), wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", [FLOAT32, BRAIN])
@pytest.mark.parametrize("learns", [True, False])
def test_log_probs_under_a_compiler(kind, learns):
    (hidden, weight, bias), _, actions = make(kind)
    leaves = [hidden, weight.detach().requires_grad_(learns), bias.detach()]

    def tail(hidden, weight, bias):
        return ops.linear_log_probs(hidden, weight, actions.ids, bias=bias).log_tail.sum()

    compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
    inputs = leaves[: 1 + learns]
    wanted, got = (torch.autograd.grad(f(*leaves), inputs) for f in (tail, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_no_chunk_of_logits_waits_for_backward():
    """In bfloat16, whose gradients are narrowed for the products: between the passes there are the
    gradients of the leaves alone."""
    leaves, tokens, actions = make(BRAIN)
    nodes, made = [loss(leaves, tokens, actions, objective=OBJECTIVES[0]).loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        made += [node.made] if hasattr(node, "made") else []
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert len(made) == 1
    held = [x.shape for x in vars(made[0]).values() if isinstance(x, torch.Tensor)]
    assert held == [x.shape for x in leaves]


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_takes_one_pass_too(products, frozen):
    leaves, tokens, actions = make(bias=False)
    leaves[frozen].requires_grad_(False)
    loss(leaves, tokens, actions, objective=ForwardKL(tail=True)).loss.backward()
    assert sum(products) == ROWS


@pytest.mark.parametrize(
    "device,hidden,weight,autocast,factors",
    [
        ("cpu", FLOAT32, FLOAT32, None, FLOAT32),
        ("cpu", BRAIN, BRAIN, None, BRAIN),
        ("cpu", HALF, HALF, None, FLOAT32),
        ("cpu", FLOAT32, FLOAT32, BRAIN, BRAIN),
        ("cpu", FLOAT32, FLOAT32, HALF, FLOAT32),
        ("mps", BRAIN, BRAIN, None, FLOAT32),
        ("cuda", FLOAT32, FLOAT32, None, FLOAT32),
        ("cuda", BRAIN, BRAIN, None, BRAIN),
        ("cuda", HALF, HALF, None, HALF),
        ("cuda", BRAIN, FLOAT32, None, FLOAT32),
        # mixed precision: weights and last hidden states are float32
        ("cuda", FLOAT32, FLOAT32, BRAIN, BRAIN),
        ("cuda", FLOAT32, FLOAT32, HALF, HALF),
        ("cuda", BRAIN, FLOAT32, BRAIN, BRAIN),
    ],
)
def test_the_factors_of_products(monkeypatch, device, hidden, weight, autocast, factors):
    given, others = (device, hidden, weight, autocast), FLOAT32 if device == "cpu" else factors
    monkeypatch.setattr(backends, "MULTIPLIES_BFLOAT16", True)
    assert head.factors_of(*given) == factors
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "enabled", False)
        assert head.factors_of(*given) == others
    monkeypatch.setattr(backends, "MULTIPLIES_BFLOAT16", False)
    assert head.factors_of(*given) == others


class On:
    """What the choice of factors asks of a tensor."""

    def __init__(self, device, dtype=FLOAT32):
        self.device, self.dtype, self.requires_grad = torch.device(device), dtype, True
        self.is_cuda = device == "cuda"


def test_the_factors_are_asked_of_the_devices_autocast(autocast):
    gpu, cpu = On("cuda"), On("cpu")
    assert head.factor_dtype(gpu, gpu) == FLOAT32
    autocast(BRAIN)
    assert head.factor_dtype(gpu, gpu) == BRAIN
    assert head.factor_dtype(cpu, cpu) == FLOAT32


def test_float16_factors_wait_for_the_loss_scale(autocast):
    """Their gradients are made in backward, where the scale is there; others in forward."""

    class Terms:
        objective, state_value, linked = ForwardKL(), None, False

    gpu = On("cuda")
    assert routes.in_forward(Terms, gpu, gpu)
    assert not routes.in_forward(Terms, On("cuda", HALF), On("cuda", HALF))
    autocast(BRAIN)
    assert routes.in_forward(Terms, gpu, gpu)
    autocast(HALF)
    assert not routes.in_forward(Terms, gpu, gpu)


@pytest.fixture
def mixed(monkeypatch):
    """A CPU that multiplies as a GPU under bfloat16 autocast, in forward alone; what it took."""
    taken = []

    def product(out, a, b, *, add=False):
        assert a.dtype == b.dtype
        assert out.dtype == FLOAT32
        taken.append(a.dtype)
        out.addmm_(a.float(), b.float(), beta=int(add))

    monkeypatch.setattr(head, "product_", product)
    monkeypatch.setattr(head, "factors_of", lambda *given: BRAIN)
    yield taken
    assert set(taken) == {BRAIN}


WAYS = {
    "in forward": {"objective": OBJECTIVES[0]},
    "in backward": {"objective": OBJECTIVES[0], "reduction": "none"},
    "batch": {"objective": OBJECTIVES[0], "normaliser": "batch", "extra": 4, "reduction": "none"},
    "all columns": {"objective": ForwardKL(), "q": "logit"},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_mixed_precision_rounds_factors_alone(monkeypatch, mixed, way, bias):
    """The loss is that of rounded operands, and gradients reach float32 leaves in float32."""
    leaves, tokens, actions = make(bias=bias)
    options = dict(WAYS[way])
    if way == "batch":
        draw = torch.Generator().manual_seed(3)
        options["vocabulary"] = ops.batch_vocabulary(actions, VOCAB, extra=4, generator=draw)
    if way == "all columns":
        monkeypatch.setattr(routes, "gathers", lambda *given: False)
    total = loss(leaves, tokens, actions, **options).loss.sum()
    # backward runs outside of autocast
    monkeypatch.setattr(head, "factors_of", lambda *given: FLOAT32)
    before = len(mixed)
    grads = torch.autograd.grad(total, leaves)
    assert len(mixed) > before or way == "in forward"
    rounded = [x.detach().to(BRAIN).float().requires_grad_() for x in leaves[:2]]
    rounded += [x.detach().requires_grad_() for x in leaves[2:]]
    wanted, expected = exact_in_float64(
        rounded, tokens, actions, lambda out: out.loss.sum(), **options
    )
    torch.testing.assert_close(total.double(), wanted.loss.sum(), rtol=1e-5, atol=0)
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == FLOAT32
        # the gradient of the logits is rounded too, once, before its products
        assert (grad - exact).norm() <= torch.finfo(BRAIN).eps * exact.norm()


def test_mixed_precision_of_log_probs_and_sets(mixed):
    (hidden, weight, bias), _, actions = make()
    given = ops.linear_log_probs(hidden, weight, actions.ids, bias=bias)
    given.log_tail.sum().backward()
    rounded = [x.detach().to(BRAIN).double() for x in (hidden, weight)]
    wanted = ops.linear_log_probs(*rounded, actions.ids, bias=bias.double(), impl="reference")
    torch.testing.assert_close(given.log_tail.double(), wanted.log_tail, rtol=1e-5, atol=1e-6)
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == FLOAT32
    got = ops.linear_select_actions(hidden, weight, 5, bias=bias)
    expected = ops.linear_select_actions(*rounded, 5, bias=bias.double())
    assert torch.equal(got.ids, expected.ids)


def test_mixed_precision_reads_gathered_members_as_they_are(mixed):
    """And rounds what the sampled columns are multiplied with."""
    (hidden, weight, bias), _, actions = make()
    vocabulary = ops.sampled_vocabulary(VOCAB, 40, generator=torch.Generator().manual_seed(3))
    options = {"vocabulary": vocabulary, "gathered": True}
    got = ops.linear_log_probs(hidden, weight, actions.ids, bias=bias, **options)
    z = ops.linear_gather_q(hidden, weight, actions.ids, bias=bias)
    torch.testing.assert_close(got.log_probs - got.log_probs[:, :1], z - z[:, :1])
    rounded = [x.detach().to(BRAIN).double() for x in (hidden, weight)]
    wanted = ops.linear_log_probs(
        *rounded, actions.ids, bias=bias.double(), impl="reference", **options
    )
    own = ops.linear_gather_q(*rounded, actions.ids, bias=bias.double(), impl="reference")
    rest = wanted.log_tail - wanted.log_probs[:, 0] + own[:, 0]
    tail = got.log_tail - got.log_probs[:, 0] + z[:, 0]
    torch.testing.assert_close(tail.double(), rest, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_in_buckets():
    ids = torch.arange(1500, dtype=torch.int32)
    given = ops.Vocabulary(ids, -torch.rand(1500))
    padded = ops._bucketed(given)
    assert padded.ids.shape == padded.log_weight.shape == (2048,)
    assert padded.ids.dtype == torch.int32
    for got, wanted, blank in zip(padded, given, (-1, -torch.inf), strict=True):
        assert torch.equal(got[:1500], wanted)
        assert (got[1500:] == blank).all()
    assert torch.equal(ops._bucketed(padded).ids, padded.ids)


@pytest.fixture
def told(caplog):
    """What was logged; nothing was before."""
    ops._log.cache_clear()
    with caplog.at_level("INFO", logger="tdkd"):
        yield lambda: [record.getMessage() for record in caplog.records]
    ops._log.cache_clear()


@pytest.mark.parametrize(
    "options,route",
    [
        ({}, "log Z over all columns, gradients in forward"),
        ({"reduction": "none"}, "log Z over all columns, logits made again in backward"),
        (
            {"normaliser": "batch", "extra": 1},
            "log Z from the batch vocabulary, gradients in forward",
        ),
        (
            {"normaliser": "batch", "extra": VOCAB},
            "log Z over all columns, for the batch vocabulary would cost more, gradients in "
            "forward",
        ),
        ({"objective": ForwardKL(), "q": "logit"}, "no log Z, k head rows a position"),
    ],
)
def test_the_route_is_told_once(told, options, route):
    leaves, tokens, actions = make()
    few = ops.ActionSet(actions.ids[:4], actions.log_probs[:4], actions.count[:4])
    given = [leaves[0][:4], *leaves[1:]]
    for _ in range(2):
        loss(given, tokens[:4], few, **{"objective": OBJECTIVES[0], **options})
    assert told() == [f"linear_td_loss, V = {VOCAB}, H = {WIDTH}, cpu: {route}"]
    with torch.no_grad():
        loss(given, tokens[:4], few, objective=OBJECTIVES[0], q="logit")
    assert len(told()) == 1


def test_the_route_of_a_frozen_head_is_told(told):
    """The columns of a batch vocabulary, not all, decide whether k head rows are few."""
    leaves, tokens, actions = make()
    frozen = [leaves[0], *(x.detach() for x in leaves[1:])]
    options = {"objective": OBJECTIVES[0], "reduction": "none"}
    loss(frozen, tokens, actions, **options)
    assert told()[0].endswith("over all columns, logits made once, for the head learns nothing")
    one = ops.ActionSet(*(x[:1] for x in actions))
    few = ops.batch_vocabulary(one, VOCAB, extra=0)
    assert routes.gathers("cpu", K, VOCAB, WIDTH, 1)
    assert not routes.gathers("cpu", K, few.ids.numel(), WIDTH, 1)
    options |= {"normaliser": "batch", "vocabulary": few}
    loss([frozen[0][:1], *frozen[1:]], tokens[:1], one, **options)
    assert told()[1].endswith("log Z from the batch vocabulary, logits made again in backward")


def test_a_gpu_that_takes_plain_pytorch_says_so_once(told):
    gpu = On("cuda")
    gpu.is_floating_point = lambda: True
    for _ in range(2):
        assert not ops._fused("auto", gpu, k=1025)
    assert told() == [
        'impl="auto" takes plain PyTorch: GPU kernels take sets of at most 1024, got 1025'
    ]
    assert not ops._fused("reference", gpu, k=1026)
    assert len(told()) == 1


class EndsCount(Objective):
    """KL that counts five times where a response ends: it reads successors, and not V'."""

    rowwise = True
    normalised = True

    def __call__(self, rows):
        return torch.where(rows.successor == -1, 5.0, 1.0) * ForwardKL(tail=True)(rows)


class MassAhead(Objective):
    """KL weighed by the teacher's mass on the next set."""

    rowwise = True
    normalised = True

    def __call__(self, rows):
        return (1 + rows.following(rows.teacher_log_mass).exp()) * ForwardKL(tail=True)(rows)


class EndReward(Objective):
    """A soft Bellman error with a reward at the end, which at gamma = 0 looks at no V'."""

    rowwise = True
    bootstraps = True

    def __call__(self, rows):
        reward = torch.where(rows.successor == -1, 5.0, 0.0)
        return (rows.taken(rows.q) - reward - rows.gamma * rows.next_value).square()


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("kind", [EndsCount, MassAhead, EndReward])
def test_objectives_of_others_may_read_successors(kind, gamma):
    leaves, tokens, actions = make()
    for objective in (kind(), ForwardKL() + 0.5 * kind()):
        options = {"objective": objective, "gamma": gamma}
        out = loss(leaves, tokens, actions, **options)
        expected, grads = exact_in_float64(leaves, tokens, actions, lambda out: out.loss, **options)
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=0)
        agree(torch.autograd.grad(out.loss, leaves), grads)


def test_a_term_of_another_shape_is_refused_in_a_sum():
    leaves, tokens, actions = make()
    objective = ForwardKL(tail=True) + (lambda rows: rows.value.mean())
    with pytest.raises(ValueError, match=r"^objective: expected one loss a row \(23,\) of .*\(\)$"):
        loss(leaves, tokens, actions, objective=objective)
