"""log Z from each row's own set and sampled columns: the op, its columns, its law, the choice."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tdkd import ops
from tdkd.kernels import head, routes
from tdkd.objectives import ForwardKL, IQLearn, ReverseKL, SoftTD

ROWS, VOCAB, WIDTH, K = 23, 90, 12, 6
KL = ForwardKL(tail=True)
OBJECTIVES = [KL, KL + 0.1 * IQLearn(alpha=1.0), ReverseKL(tail=True), SoftTD(stop_gradient=None)]
SCALES = [{}, {"softcap": 2.0, "temperature": 1.7, "logit_scale": 0.4}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def chunks_of_four_rows(monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 4 * 32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(dtype=torch.float32, bias=True):
    """Leaves, taken tokens and sets, some of whose members are sampled and some are not."""
    generator = seeded()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [normal(ROWS, WIDTH), normal(VOCAB, WIDTH), *([normal(VOCAB)] if bias else [])]
    tokens = torch.randint(VOCAB, (ROWS,), generator=generator)
    tokens[[5, 16]] = -100
    teacher = 2 * normal(ROWS, VOCAB).float()
    actions = ops.select_actions(teacher, K, 0.9, include=tokens.clamp(min=-1))
    return [x.requires_grad_() for x in leaves], tokens, actions


def columns(extra=30, seed=1):
    return ops.sampled_vocabulary(VOCAB, extra, generator=seeded(seed))


COLUMNS = columns()


def loss(leaves, tokens, actions, **options):
    hidden, weight, *bias = leaves
    given = {"normaliser": "sampled", "objective": KL, "vocabulary": COLUMNS, **options}
    return ops.linear_td_loss(
        hidden, weight, tokens, actions=actions, bias=bias[0] if bias else None, **given
    )


def estimate(leaves, ids, vocabulary, **scale):
    """z ``[N, k]`` and the log of the weighted mass outside ``[N]``, from all logits in float64."""
    hidden, weight, *bias = leaves
    logits = hidden @ weight.T + (bias[0] if bias else 0.0)
    logits = ops.gather_q(
        logits, torch.arange(VOCAB).expand(len(logits), -1), impl="reference", **scale
    )
    member = torch.zeros(len(logits), VOCAB + 1, dtype=torch.bool)
    member[torch.arange(len(logits))[:, None], ids.long()] = True
    log_weight = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
    held = vocabulary.ids >= 0
    log_weight[vocabulary.ids[held].long()] = vocabulary.log_weight[held].double()
    rest = (logits + log_weight).masked_fill(member[:, :VOCAB], -math.inf).logsumexp(-1)
    return logits.gather(-1, ids.long().clamp(min=0)), rest


def within_budget(got, reference, exact, dtype):
    """No further from float64 than the reference of the same dtype, and some units of the last
    place of the largest element."""
    for x, same, wanted in zip(got, reference, exact, strict=True):
        unit = torch.finfo(dtype).eps * float(wanted.detach().abs().max())
        allowed = (same.double() - wanted).abs().max() + 64 * unit * (dtype == torch.float32)
        allowed += 4 * unit
        assert (x.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_loss_and_its_gradients_are_those_of_the_reference(objective, scale, bias, dtype):
    leaves, tokens, actions = make(dtype, bias)
    into = torch.randn(ROWS, generator=seeded(2))
    results = []
    for impl, kind in (("fused", dtype), ("reference", dtype), ("reference", torch.float64)):
        some = [x.detach().to(kind).requires_grad_() for x in leaves]
        out = loss(some, tokens, actions, objective=objective, impl=impl, reduction="none", **scale)
        total = (out.loss * into).sum() + (out.value * into).sum() + out.td_error.sum()
        grads = torch.autograd.grad(total, some, retain_graph=True)
        again = torch.autograd.grad(total, some)
        assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
        assert [x.dtype for x in grads] == [kind] * len(some)
        results.append((*out[:4], *grads))
    within_budget(*results, dtype)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_estimate_is_what_it_says(impl, scale):
    """Own members once and exactly; of the columns those that are no members, by their weights."""
    leaves, _, actions = make()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    z, rest = estimate(wide, actions.ids, COLUMNS, **scale)
    held = actions.ids >= 0
    log_z = torch.cat([z.masked_fill(~held, -math.inf), rest[:, None]], -1).logsumexp(-1)
    got = ops.linear_log_probs(
        *leaves[:2], actions.ids, bias=leaves[2], vocabulary=COLUMNS, gathered=True, impl=impl,
        **scale,
    )  # fmt: skip
    assert (got.log_probs[~held] == -torch.inf).all()
    into, of_tail = torch.randn(ROWS, K, generator=seeded()), torch.randn(ROWS)
    values = torch.where(held, got.log_probs, 0.0), got.log_tail
    wanted = torch.where(held, z - log_z[:, None], 0.0), rest - log_z
    sums = [(x * into).sum() + (tail * of_tail).sum() for x, tail in (values, wanted)]
    pairs = zip(
        (*values, *torch.autograd.grad(sums[0], leaves)),
        (*wanted, *torch.autograd.grad(sums[1], wide)),
        strict=True,
    )
    for x, exact in pairs:
        torch.testing.assert_close(x.double(), exact, rtol=2e-5, atol=2e-5)


def test_with_every_column_it_is_exact():
    leaves, tokens, actions = make()
    exact = loss(leaves, tokens, actions, normaliser="exact", vocabulary=None)
    got = loss(leaves, tokens, actions, vocabulary=columns(VOCAB))
    torch.testing.assert_close(got.loss, exact.loss)
    pairs = zip(*(torch.autograd.grad(x.loss, leaves) for x in (got, exact)), strict=True)
    for mine, wanted in pairs:
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("law", ["uniform", "student"])
def test_z_is_unbiased(law):
    leaves, _, actions = make()
    leaves = [x.detach() for x in leaves]
    chances = ops.student_law(*leaves[:2], bias=leaves[2]) if law == "student" else None
    generator, draws = seeded(), []
    for _ in range(600):
        vocabulary = ops.sampled_vocabulary(VOCAB, 25, law=chances, generator=generator)
        given = ops.linear_log_probs(
            *leaves[:2], actions.ids, bias=leaves[2], vocabulary=vocabulary, gathered=True
        )
        z = ops.linear_gather_q(*leaves[:2], actions.ids[:, :1], bias=leaves[2])
        draws.append((z - given.log_probs[:, :1]).double().exp().squeeze(-1))
    estimates = torch.stack(draws)
    exact = ops.linear_logsumexp(*leaves[:2], bias=leaves[2]).double().exp()
    error = estimates.std(0) / len(draws) ** 0.5
    assert ((estimates.mean(0) - exact).abs() < 4.5 * error).all()


def test_the_law_of_a_student_estimates_better():
    generator = seeded()
    hidden = torch.randn(1, 12, generator=generator) + 0.3 * torch.randn(9, 12, generator=generator)
    hidden, weight = hidden.requires_grad_(), torch.randn(900, 12, generator=generator)
    tokens = torch.arange(9)
    actions = ops.select_actions(torch.randn(9, 900, generator=generator), 5, include=tokens)

    def gradient(**options):
        out = ops.linear_td_loss(hidden, weight, tokens, actions=actions, objective=KL, **options)
        return torch.autograd.grad(out.loss, hidden)[0]

    exact, errors = gradient(), {}
    with routes.forced("sampled"):
        for law in (None, "student", "uniform"):
            options = {"normaliser": "sampled", "extra": 60, "law": law, "generator": generator}
            drawn = torch.stack([gradient(**options) - exact for _ in range(40)])
            errors[law] = drawn.flatten(1).norm(dim=-1).mean()
    assert errors["student"] < 0.5 * errors["uniform"]
    assert errors[None] < 0.5 * errors["uniform"]  # the default is the student's


def test_members_and_sampled_columns_alone_get_a_gradient():
    leaves, tokens, actions = make()
    vocabulary = columns(10)
    _, by_weight, by_bias = torch.autograd.grad(
        loss(leaves, tokens, actions, vocabulary=vocabulary).loss, leaves
    )
    touched = torch.zeros(VOCAB, dtype=torch.bool)
    used = actions.ids[tokens != -100]
    touched[used[used >= 0].long()] = True
    touched[vocabulary.ids[vocabulary.ids >= 0].long()] = True
    assert touched.sum() < VOCAB
    assert torch.equal(by_weight.any(-1), touched)
    assert torch.equal(by_bias != 0, touched)


class Shapes(TorchDispatchMode):
    """The shape of each tensor that an operator made, views and results in place left out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves
        given = {storage(x) for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in leaves(result):
            if isinstance(x, torch.Tensor) and storage(x) not in given:
                self.seen.append(tuple(x.shape))
        return result


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_as_large_as_the_head_but_its_one_gradient(frozen):
    leaves, tokens, actions = make()
    if frozen:
        leaves = [leaves[0], *(x.detach() for x in leaves[1:])]
    with Shapes() as shapes:
        torch.autograd.grad(loss(leaves, tokens, actions).loss, [x for x in leaves if x.grad_fn is
                            None and x.requires_grad])  # fmt: skip
    assert shapes.seen.count((VOCAB, WIDTH)) == (not frozen)
    assert (ROWS, VOCAB) not in shapes.seen


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2), (0,), (0, 2)])
def test_what_does_not_learn_gets_none(frozen):
    leaves, tokens, actions = make()
    expected = torch.autograd.grad(loss(leaves, tokens, actions).loss, leaves)
    some = [x.detach() if i in frozen else x for i, x in enumerate(leaves)]
    learning = [i for i in range(3) if i not in frozen]
    got = torch.autograd.grad(loss(some, tokens, actions).loss, [some[i] for i in learning])
    for i, grad in zip(learning, got, strict=True):
        torch.testing.assert_close(grad, expected[i])


def test_an_id_that_stands_twice_counts_once():
    leaves, _, actions = make()
    slots = torch.tensor([2, 0, 1, 2, 3, 4, 5, 0, 5, 0])
    into, results = torch.randn(ROWS, slots.numel()), []
    for twice in (True, False):
        ids = actions.ids[:, slots] if twice else actions.ids
        log_probs, tail = ops.linear_log_probs(
            *leaves[:2], ids, bias=leaves[2], vocabulary=COLUMNS, gathered=True
        )
        log_probs = log_probs if twice else log_probs[:, slots]
        log_probs = torch.where(log_probs == -torch.inf, 0, log_probs)
        total = (log_probs * into).sum() + tail.sum()
        results.append((log_probs, tail, *torch.autograd.grad(total, leaves)))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    leaves, tokens, actions = make()
    some = ops.ActionSet(*(x[:rows] for x in actions))
    given = [leaves[0][:rows], *leaves[1:]]
    out = loss(given, tokens[:rows], some)
    grads = torch.autograd.grad(out.loss, leaves)
    assert all(x.isfinite().all() for x in (out.loss, *grads))
    assert grads[1].any() == bool(rows)


def test_a_row_that_is_no_state_has_no_say():
    leaves, tokens, actions = make()
    expected = torch.autograd.grad(loss(leaves, tokens, actions).loss, leaves)
    with torch.no_grad():
        leaves[0][5] = torch.nan
    got = torch.autograd.grad(loss(leaves, tokens, actions).loss, leaves)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_torch_compile_without_a_graph_break(frozen):
    leaves, tokens, actions = make()
    learning = leaves[:1] if frozen else leaves
    fixed = [x.detach() for x in leaves[1:]] if frozen else []

    def step(*some):
        return loss([*some, *fixed], tokens, actions).loss

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        result = function(*learning)
        results.append((result.detach(), *torch.autograd.grad(result, learning)))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_columns_are_drawn_in_a_compiled_step():
    """And are other ones at every call."""
    leaves, tokens, actions = make()

    def step(*some):
        return loss(some, tokens, actions, vocabulary=None, extra=10).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with routes.forced("sampled"):
        assert compiled(*leaves) != compiled(*leaves)


def test_the_second_gradient_is_refused():
    leaves, tokens, actions = make()
    out = loss(leaves, tokens, actions)
    (grad,) = torch.autograd.grad(out.loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second gradients"):
        grad.sum().backward()


# The columns, and the law


@pytest.mark.parametrize("law", [None, "peaked"])
@pytest.mark.parametrize("extra", [1, 20, 89, 90, 200])
def test_a_sampled_vocabulary(law, extra):
    chances = None
    if law:
        chances = torch.rand(VOCAB, generator=seeded()) ** 4
        chances[:7] = 0.0
    possible = VOCAB if law is None else VOCAB - 7
    sizes = set()
    for seed in range(20):
        given = ops.sampled_vocabulary(VOCAB, extra, law=chances, generator=seeded(seed))
        held = given.ids >= 0
        ids = given.ids[held].long()
        assert given.ids.dtype == torch.int32
        assert given.log_weight.dtype == torch.float32
        assert held.int().diff().le(0).all()  # padded at the end
        assert (ids.diff() > 0).all()
        assert abs(ids.numel() - min(extra, possible)) <= (law is not None)
        assert (given.log_weight[~held] == -torch.inf).all()
        assert (given.log_weight[held] >= -1e-6).all()  # a column stands for one at least
        if law is None:
            share = torch.full((ids.numel(),), max(1.0, VOCAB / extra)).log()
            torch.testing.assert_close(given.log_weight[held], share)
        else:
            assert (ids >= 7).all()
        sizes.add(given.ids.numel())
    assert len(sizes) == 1  # whatever was drawn
    same = ops.sampled_vocabulary(VOCAB, extra, law=chances, generator=seeded(19))
    assert torch.equal(same.ids, given.ids)


def test_other_columns_at_every_call():
    torch.manual_seed(0)
    drawn = {tuple(ops.sampled_vocabulary(VOCAB, 10).ids.tolist()) for _ in range(5)}
    assert len(drawn) == 5


def test_the_law_of_a_student():
    (hidden, weight, bias), _, _ = make()
    law = ops.student_law(hidden, weight, bias=bias, softcap=3.0, temperature=2.0, vocab_size=80)
    logits = 3.0 * torch.tanh((hidden @ weight[:80].T + bias[:80]) / 3.0) / 2.0
    torch.testing.assert_close(law, 0.9 * logits.softmax(-1).mean(0).detach() + 0.1 / 80)
    assert not law.requires_grad
    assert torch.equal(ops.student_law(hidden.view(1, ROWS, WIDTH), weight),
                       ops.student_law(hidden, weight))  # fmt: skip


def test_the_law_is_of_states_wherever_they_are():
    """Prompts and padding have no say, nor do they take the place of rows that have."""
    from tdkd.kernels.batch_vocabulary.reference import student_law

    generator = seeded()
    hidden, weight = torch.randn(1000, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH)
    state = torch.zeros(1000, dtype=torch.bool)
    state[[1, 2, 3, 77, 500, 901]] = True
    mean = (hidden[state] @ weight.T).softmax(-1)
    law = student_law(hidden, weight, None, ops._check.scale("", 1.0, None, 1.0), state)
    torch.testing.assert_close(law, 0.9 * mean.mean(0) + 0.1 / VOCAB)
    hidden[~state] = torch.nan
    same = student_law(hidden, weight, None, ops._check.scale("", 1.0, None, 1.0), state)
    assert torch.equal(law, same)


def test_the_law_copies_no_head_of_another_dtype():
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCAB, WIDTH).bfloat16()
    with Shapes() as shapes:
        law = ops.student_law(hidden, weight)
    assert (VOCAB, WIDTH) not in shapes.seen
    torch.testing.assert_close(law, ops.student_law(hidden.bfloat16(), weight))


def test_a_large_head_gives_fewer_rows_to_the_law(monkeypatch):
    from tdkd.kernels.batch_vocabulary import reference

    monkeypatch.setattr(reference, "LAW_LOGITS", 5 * VOCAB)
    (hidden, weight, _), _, _ = make()
    some = torch.arange(5) * ROWS // 5
    mean = (hidden[some] @ weight.T).softmax(-1).mean(0).detach()
    torch.testing.assert_close(ops.student_law(hidden, weight), 0.9 * mean + 0.1 / VOCAB)
    monkeypatch.setattr(reference, "LAW_LOGITS", 1)
    assert ops.student_law(hidden, weight).sum() == pytest.approx(1.0)


# The choice


def test_the_rule():
    size = {"columns": 49_152, "width": 576, "rows": 2048}
    assert routes.samples("cpu", 64, 1024, **size)
    assert routes.samples("cpu", 1024, 4096, **size)
    assert not routes.samples("cpu", 3000, 4096, **size)  # either alone would pay
    assert not routes.samples("cpu", 64, 24_000, **size)
    # few rows: the law of the student alone costs most of what all columns do
    few = {**size, "rows": 16}
    assert routes.samples("cpu", 1000, 1024, **few)
    assert not routes.samples("cpu", 1000, 1024, **few, law_rows=64)
    assert routes.samples("cuda", 64, 4096, **size)
    assert not routes.samples("cuda", 64, 1024, 10_000, 576, 2048)


@pytest.fixture
def told(caplog):
    """What was logged; nothing was before."""
    ops._log.cache_clear()
    with caplog.at_level("INFO", logger="tdkd"):
        yield lambda: [record.getMessage().partition(": ")[2] for record in caplog.records]
    ops._log.cache_clear()


def test_where_all_columns_cost_less_it_takes_them(told):
    leaves, tokens, actions = make()
    exact = loss(leaves, tokens, actions, normaliser="exact", vocabulary=None)
    got = loss(leaves, tokens, actions, vocabulary=None, extra=VOCAB)
    assert torch.equal(got.loss, exact.loss)
    with routes.forced("sampled"):
        some = loss(leaves, tokens, actions, vocabulary=None, extra=10)
    assert not torch.equal(some.loss, exact.loss)
    sampled = "k head rows a position and sampled columns"
    assert told()[1:] == [
        f"log Z over all columns, for {sampled} would cost more, gradients in forward",
        f"log Z from {sampled}, logits made again in backward",
    ]


def test_the_default_number_of_columns():
    leaves, tokens, actions = make()
    weight = torch.randn(40_000, WIDTH, generator=seeded())

    def value(**options):
        out = loss([leaves[0], weight], tokens, actions, vocabulary=None, generator=seeded(),
                   **options)  # fmt: skip
        return out.loss

    assert torch.equal(value(), value(extra=1024))
    assert torch.equal(value(), value(law="student"))
    assert not torch.equal(value(), value(extra=1023))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"capacity": 50}, 'capacity: expected None with normaliser="sampled", got int'),
        ({"vocabulary": None, "extra": 0}, "extra: expected .*>= 1, got 0"),
        ({"vocabulary": None, "law": "teacher"}, 'law: expected one of "student", "uniform"'),
        (
            {"vocabulary": None, "law": torch.ones(3)},
            r"law: expected the shape of the vocabulary \(90,\)",
        ),
        ({"vocabulary": None, "law": torch.zeros(VOCAB)}, "law: expected a chance > 0"),
        ({"normaliser": "some"}, 'normaliser: expected one of "exact", "batch", "sampled"'),
        ({"normaliser": "batch"}, "vocabulary: expected every member of the action sets"),
    ],
)
def test_what_is_refused(options, message):
    leaves, tokens, actions = make()
    with routes.forced("sampled"), pytest.raises(ValueError, match=message):
        loss(leaves, tokens, actions, **options)


@pytest.mark.parametrize("way", ["sampled", "exact"])
@pytest.mark.parametrize("normaliser", ["sampled", "batch"])
def test_a_law_is_looked_at_whichever_way_is_taken(way, normaliser):
    leaves, tokens, actions = make()
    given = {"normaliser": normaliser, "vocabulary": None}
    with routes.forced(way):
        with pytest.raises(TypeError, match="law: expected a .*tensor, got list"):
            loss(leaves, tokens, actions, law=[1.0, 2.0], **given)
        with pytest.raises(ValueError, match="law: expected the shape of the vocabulary"):
            loss(leaves, tokens, actions, law=torch.ones(3), **given)
        with pytest.raises(TypeError, match="generator: expected a torch.Generator, got int"):
            loss(leaves, tokens, actions, generator=5, **given)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: ops.sampled_vocabulary(0, 5), ValueError, "vocab_size: .* got 0"),
        (lambda: ops.sampled_vocabulary(9, 0), ValueError, "extra: .* got 0"),
        (lambda: ops.sampled_vocabulary(9, 2.5), TypeError, "extra: expected an int, got float"),
        (lambda: ops.sampled_vocabulary(9, 2, law=torch.ones(8)), ValueError, "law: .*9.*8"),
        (lambda: ops.sampled_vocabulary(9, 2, law=torch.arange(9)), TypeError, "law: .*int64"),
        (lambda: ops.sampled_vocabulary(9, 2, law=-torch.ones(9)), ValueError, "law: "),
        (
            lambda: ops.sampled_vocabulary(9, 2, law=torch.ones(9), device="meta"),
            ValueError,
            "law: expected .*meta",
        ),
        (
            lambda: ops.linear_log_probs(torch.ones(2, 3), torch.ones(9, 3), torch.zeros(2, 1),
                                         gathered=True),
            TypeError,
            "ids: ",
        ),
        (
            lambda: ops.linear_log_probs(
                torch.ones(2, 3), torch.ones(9, 3), torch.zeros(2, 1, dtype=torch.int64),
                gathered=True,
            ),
            ValueError,
            "vocabulary: expected a Vocabulary with gathered=True, got None",
        ),
        (lambda: ops.student_law(torch.ones(2, 3), torch.ones(9, 4)), ValueError, "weight: "),
        (lambda: ops.sampled_vocabulary(9, 2, generator=5), TypeError, "generator: .*got int"),
    ],
)  # fmt: skip
def test_what_else_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
