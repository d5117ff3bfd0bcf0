"""What only a GPU can show: big shapes, graphs, streams, determinism, and no host sync."""

import random

import pytest
import torch

from tdkd import ops
from tdkd.kernels import head, routes
from tdkd.kernels.student_rows import reference as student_rows_reference
from tdkd.kernels.student_rows import student_rows
from tdkd.objectives import ForwardKL, IQLearn
from tdkd.testing import LOGITS, make_logits, ulps
from tdkd.types import Scale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator(GPU).manual_seed(seed)


def check_rows(logits, k, top_p, rows):
    """Some rows of a selection, kernel against reference."""
    got = ops.select_actions(logits, k, top_p, impl="fused")
    expected = ops.select_actions(logits[rows], k, top_p, impl="reference")
    assert torch.equal(got.ids[rows], expected.ids)
    assert torch.equal(got.count[rows], expected.count)
    exact = ops.select_actions(logits[rows].double(), k, top_p, impl="reference")
    same = exact.ids == expected.ids
    assert ulps(got.log_probs[rows][same], expected.log_probs[same], exact.log_probs[same]) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOGITS)
def test_every_kind_of_row(kind, dtype):
    logits = make_logits(kind, 64, 151_936, dtype, generator())
    check_rows(logits, 64, 1.0, slice(None))
    check_rows(logits, 16, 0.9, slice(None))


@pytest.mark.parametrize("k", [1, 8, 256, 1024])
def test_the_largest_vocabulary(k):
    logits = make_logits("peaked", 128, 262_144, torch.bfloat16, generator(k))
    check_rows(logits, k, 1.0, slice(None))


@pytest.mark.parametrize("rows", [400, 5003])
def test_rows_that_are_split_and_rows_that_are_not(rows):
    logits = make_logits("peaked", rows, 9000, torch.bfloat16, generator(rows))
    check_rows(logits, 64, 0.9, slice(None))
    check_rows(logits, 300, 1.0, slice(None))


def test_more_than_two_to_the_31_logits():
    rows, vocab = 16_384, 151_936
    assert rows * vocab > 2**31
    logits = torch.randn(rows, vocab, device=GPU, dtype=torch.bfloat16, generator=generator())
    last = slice(rows - 8, rows)
    check_rows(logits, 64, 0.9, last)
    ids = ops.select_actions(logits, 64, impl="fused").ids
    leaf = logits.requires_grad_()
    got = student_rows(leaf, ids, Scale())
    (got.z.sum() + got.log_rest.sum()).backward()
    part = leaf.detach()[last].double().requires_grad_()
    expected = student_rows_reference.student_rows(part, ids[last], Scale())
    (expected.z.sum() + expected.log_rest.sum()).backward()
    torch.testing.assert_close(got.z[last].double(), expected.z)
    torch.testing.assert_close(got.log_rest[last].double(), expected.log_rest, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad[last].double(), part.grad, rtol=1e-2, atol=1e-7)


def same_sets(got, expected, top_p):
    """Equal bit for bit, but for rows in which rounding decides whether a prefix reaches top_p."""
    differ = ~(got.ids == expected.ids).all(-1)
    for a, b in zip(got.ids[differ], expected.ids[differ], strict=True):
        n = min(int((a >= 0).sum()), int((b >= 0).sum()))
        if not torch.equal(a[:n], b[:n]):
            return False
    shorter = torch.minimum(got.count, expected.count)[differ]
    probs = expected.log_probs[differ].double().exp().cumsum(-1)
    mass = probs.gather(-1, (shorter.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return bool(((mass - top_p * (1 - 1e-5)).abs() < 4e-6).all())


def loss_inputs(rows=96, vocab=49_152, dtype=torch.float32):
    student = make_logits("random", rows, vocab, dtype, generator(1)).requires_grad_()
    teacher = make_logits("peaked", rows, vocab, dtype, generator(2))
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator(3))
    successor = ops.successors(tokens)
    return student, teacher, tokens, successor


OBJECTIVE = ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0)


def loss_and_gradient(student, teacher, tokens, successor, impl="fused"):
    out = ops.td_loss(student, teacher, tokens, objective=OBJECTIVE, successor=successor, impl=impl)
    return out.loss.detach(), *torch.autograd.grad(out.loss, student)


def test_the_loss_against_float64():
    student, teacher, tokens, successor = loss_inputs()
    got = loss_and_gradient(student, teacher, tokens, successor)
    near = loss_and_gradient(student, teacher, tokens, successor, impl="reference")
    leaf = student.detach().double().requires_grad_()
    exact = loss_and_gradient(leaf, teacher.double(), tokens, successor, impl="reference")
    assert ulps(got[0].view(1), near[0].view(1), exact[0].view(1)) <= 8
    error, allowed = ((x[1].double() - exact[1]).abs() for x in (got, near))
    assert (error <= allowed + 1e-6 * exact[1].abs().max()).all()


def test_no_host_sync():
    inputs = loss_inputs()
    loss_and_gradient(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(*inputs)
        ops.td_target(torch.randn(96, device=GPU), inputs[3], lam=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture():
    student, teacher, tokens, successor = loss_inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            loss_and_gradient(student, teacher, tokens, successor)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(student, teacher, tokens, successor)
    with torch.no_grad():
        student.add_(torch.randn_like(student))
        teacher.copy_(teacher.flip(0))
    graph.replay()
    expected = loss_and_gradient(student, teacher, tokens, successor)
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    inputs = loss_inputs(512, 49_152, dtype)
    first, second = loss_and_gradient(*inputs), loss_and_gradient(*inputs)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_memory_is_one_gradient():
    """Backward writes one dense gradient and nothing else of that size; forward nothing."""
    rows, vocab = 512, 151_936
    student, teacher, tokens, successor = loss_inputs(rows, vocab, torch.bfloat16)
    loss_and_gradient(student, teacher, tokens, successor)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_and_gradient(student, teacher, tokens, successor)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.3 * rows * vocab * 2


def test_torch_compile_without_a_graph_break():
    compiled = torch.compile(
        lambda s, t, y, n: ops.td_loss(s, t, y, objective=OBJECTIVE, successor=n).loss,
        fullgraph=True,
        dynamic=True,
    )
    for rows in (24, 40):
        student, teacher, tokens, successor = loss_inputs(rows, 2048)
        loss = compiled(student, teacher, tokens, successor)
        (grad,) = torch.autograd.grad(loss, student)
        expected = loss_and_gradient(student, teacher, tokens, successor)
        torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-7)


def test_large_sets_are_refused_with_a_reason():
    logits = torch.randn(2, 4096, device=GPU)
    with pytest.raises(NotImplementedError, match="at most 1024, got 1025"):
        ops.select_actions(logits, 1025, impl="fused")
    assert ops.select_actions(logits, 1025).ids.shape == (2, 1025)


@pytest.mark.parametrize("part", range(10))
def test_a_hundred_random_cases(part):
    draw = random.Random(part)
    for case in range(100 * part, 100 * part + 100):
        vocab = draw.choice([1, 2, 31, 64, 65, 300, 1000, 4097, 9000, 32_000])
        rows, k = draw.choice([1, 2, 7, 33]), draw.choice([1, 2, 5, 16, 64, 100, 300, 1024])
        dtype = draw.choice(DTYPES)
        kind = draw.choice(LOGITS) if vocab >= 4 else "random"
        logits = make_logits(kind, rows, vocab, dtype, generator(case))
        if draw.random() < 0.3:
            logits = logits.round()
        if draw.random() < 0.3:
            masked = torch.rand(logits.shape, device=GPU, generator=generator(case)) < 0.3
            logits.masked_fill_(masked, -torch.inf)
        options = {
            "temperature": draw.choice([1.0, 1.0, 0.7]),
            "softcap": draw.choice([None, None, 30.0]),
            "logit_scale": draw.choice([1.0, 1.0, 0.5]),
        }
        top_p = draw.choice([1.0, 0.9, 0.5])
        got = ops.select_actions(logits, k, top_p, impl="fused", **options)
        expected = ops.select_actions(logits, k, top_p, impl="reference", **options)
        assert same_sets(got, expected, top_p), case
        z, rest = student_rows(logits, got.ids, Scale(**options))
        exact = student_rows_reference.student_rows(logits.double(), got.ids, Scale(**options))
        near = student_rows_reference.student_rows(logits, got.ids, Scale(**options))
        # tanh is right to 1e-7, which the cap of 30 / 0.7 multiplies
        room = 4 if options["softcap"] is None else 64
        assert ulps(z, near.z, exact.z) <= room, case
        assert ulps(rest, near.log_rest, exact.log_rest) <= room, case


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_rows_of_a_large_head(dtype):
    rows, width, vocab, k = 512, 1024, 151_936, 64
    hidden = torch.randn(rows, width, device=GPU, generator=generator(1)).to(dtype)
    weight = torch.randn(vocab, width, device=GPU, generator=generator(2)).to(dtype)
    ids = torch.randint(vocab, (rows, k), device=GPU, generator=generator(3))
    ids[:, 0] = 11  # an id of every position
    ids[:, 1] = -1
    grad = torch.randn(rows, k, device=GPU, generator=generator(4))

    def run(*leaves, impl):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        q = ops.linear_gather_q(*leaves, ids, impl=impl)
        (torch.where(q.isfinite(), q, 0.0) * grad).sum().backward()
        return q.detach(), *(x.grad for x in leaves)

    got, again = (run(hidden, weight, impl="fused") for _ in range(2))
    exact = run(hidden.double(), weight.double(), impl="reference")
    for mine, same, wanted in zip(got, again, exact, strict=True):
        assert torch.equal(mine, same)
        finite = wanted.isfinite()
        error = (mine.double() - wanted)[finite].abs()
        eps = torch.finfo(mine.dtype).eps
        room = eps * wanted[finite].abs() + 1e-6 * width**0.5 * wanted[finite].abs().max()
        assert (error <= room).all()


@pytest.mark.parametrize("normaliser", ["exact", "batch", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_from_hidden_states(dtype, normaliser):
    rows, width, vocab = 96, 256, 8192
    draws = [(rows, width), (vocab, width), (rows, width), (vocab, width)]
    student, head, teacher, teacher_head = (
        (torch.randn(shape, device=GPU, generator=generator(i)) * width**-0.25).to(dtype)
        for i, shape in enumerate(draws)
    )
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator(9))
    # one set for all: sets of a teacher in float64 are others
    actions = ops.linear_select_actions(teacher, teacher_head, 64, 0.8, include=tokens)
    vocabulary = None
    if normaliser == "batch":
        vocabulary = ops.batch_vocabulary(actions, vocab, generator=generator(5))
    if normaliser == "sampled":
        vocabulary = ops.sampled_vocabulary(vocab, 1024, generator=generator(5), device=GPU)

    def run(*leaves, impl):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = ops.linear_td_loss(
            *leaves,
            tokens,
            actions=actions,
            objective=OBJECTIVE,
            normaliser=normaliser,
            vocabulary=vocabulary,
            impl=impl,
        )
        out.loss.backward()
        return out.loss.detach().view(1), *(x.grad for x in leaves)

    got = run(student, head, impl="fused")
    exact = run(student.double(), head.double(), impl="reference")
    # the gradient of logits enters its products in the dtype of the head
    share = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for mine, wanted in zip(got, exact, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_forward_are_those_of_the_other_way(dtype, monkeypatch):
    """An objective without successors needs no host: both ways agree, chunk by chunk."""
    rows, width, vocab = 96, 256, 8192
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cuda", 20 * vocab)
    hidden = torch.randn(rows, width, device=GPU, generator=generator(1)).to(dtype)
    weight = (torch.randn(vocab, width, device=GPU, generator=generator(2)) * 0.1).to(dtype)
    teacher = torch.randn(rows, vocab, device=GPU, generator=generator(3)) * 3
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator(4))
    actions = ops.select_actions(teacher, 64, 0.8, include=tokens)
    results = []
    for objective in (ForwardKL(tail=True), lambda rows: ForwardKL(tail=True)(rows)):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        out = ops.linear_td_loss(*leaves, tokens, actions=actions, objective=objective, gamma=0.0)
        out.loss.backward()
        results.append((out.loss.detach(), *(x.grad for x in leaves)))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there)


def test_a_batch_vocabulary_with_a_capacity_can_be_captured():
    vocab = 8192
    teacher = torch.randn(64, vocab, device=GPU, generator=generator(1)) * 3
    actions = ops.select_actions(teacher, 16, 0.8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        vocabulary = ops.batch_vocabulary(actions, vocab, extra=100, capacity=2048)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = vocabulary.ids[vocabulary.ids >= 0]
    union = actions.ids[actions.ids >= 0].unique()
    assert torch.isin(union, held).all()
    assert held.numel() == union.numel() + 100


@pytest.mark.parametrize("law", ["student", "uniform"])
def test_columns_are_sampled_without_a_host_sync(law):
    rows, width, vocab = 96, 256, 32_768
    hidden = torch.randn(rows, width, device=GPU, generator=generator(1)).requires_grad_()
    weight = (torch.randn(vocab, width, device=GPU, generator=generator(2)) * 0.1).requires_grad_()
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator(4))
    teacher = torch.randn(rows, vocab, device=GPU, generator=generator(3)) * 3
    actions = ops.select_actions(teacher, 16, include=tokens)

    def step():
        out = ops.linear_td_loss(
            hidden, weight, tokens, actions=actions, objective=OBJECTIVE, normaliser="sampled",
            law=law, extra=1000,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # members and sampled columns alone
    assert 1000 <= int(grads[1].any(-1).sum()) <= 1001 + 16 * rows


KL = ForwardKL(tail=True)
ROUTES = {
    # gradients in forward, or, since the loss looks at successors, in backward
    "exact": {"objective": KL},
    "ahead": {"objective": OBJECTIVE},
    "batch": {"objective": KL, "normaliser": "batch"},
    "sampled": {"objective": KL, "normaliser": "sampled"},
    "gather": {"objective": ForwardKL(), "q": "logit"},
    "all columns": {"objective": ForwardKL(), "q": "logit"},
}
FORMS = [*ROUTES, "linear_gather_q", "linear_log_probs"]


def linear_form(name, dtype=torch.float32, rows=96, width=256, vocab=8192):
    """Leaves, and a function of them that gives a loss by one of the linear forms."""
    hidden = torch.randn(rows, width, device=GPU, generator=generator(1)).to(dtype)
    weight = (torch.randn(vocab, width, device=GPU, generator=generator(2)) * 0.1).to(dtype)
    teacher = torch.randn(rows, vocab, device=GPU, generator=generator(3)) * 3
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator(4))
    tokens[7] = -100
    # by the rule a GPU gathers 16 of 8192 head rows, and not 64
    k = 16 if name in ("gather", "linear_gather_q") else 64
    actions = ops.select_actions(teacher, k, 0.9, include=tokens.clamp(min=-1))
    options = dict(ROUTES.get(name, {}))
    if name == "batch":
        options["vocabulary"] = ops.batch_vocabulary(actions, vocab, extra=100, capacity=6144)
    if name == "sampled":
        options["vocabulary"] = ops.sampled_vocabulary(vocab, 100, device=GPU)

    def loss(hidden, weight):
        if name == "linear_gather_q":
            q = ops.linear_gather_q(hidden, weight, actions.ids, impl="fused")
            return torch.where(actions.valid, q, 0.0).mean()
        if name == "linear_log_probs":
            given = ops.linear_log_probs(hidden, weight, actions.ids, impl="fused")
            return torch.where(actions.valid, given.log_probs, 0.0).mean() + given.log_tail.mean()
        return ops.linear_td_loss(
            hidden, weight, tokens, actions=actions, impl="fused", **options
        ).loss

    return [x.requires_grad_() for x in (hidden, weight)], loss


def value_and_gradients(loss, leaves):
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_linear_forms_make_no_host_sync(name, dtype):
    leaves, loss = linear_form(name, dtype)
    value_and_gradients(loss, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_linear_forms_can_be_captured(name, dtype):
    leaves, loss = linear_form(name, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            value_and_gradients(loss, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(loss, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    graph.replay()
    # the library may choose another product where it is not captured
    for got, expected in zip(captured, value_and_gradients(loss, leaves), strict=True):
        share = 1e-2 if got.dtype == torch.bfloat16 else 1e-4
        assert (got.float() - expected.float()).norm() <= share * expected.float().norm()


def test_a_selection_from_a_head_makes_no_host_sync():
    (hidden, weight), _ = linear_form("exact")
    ops.linear_select_actions(hidden, weight, 64, 0.8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear_select_actions(hidden, weight, 64, 0.8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def factors(monkeypatch):
    """The dtypes in which products with a head took their factors."""
    seen = set()
    product = head.product_

    def noted(out, a, b, **options):
        assert a.dtype == b.dtype
        assert out.dtype == torch.float32
        seen.add(a.dtype)
        product(out, a, b, **options)

    monkeypatch.setattr(head, "product_", noted)
    return seen


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["exact", "ahead", "batch", "all columns", "linear_log_probs"])
def test_autocast_multiplies_in_its_dtype(factors, name, mixed):
    """As a rounded model without autocast, but for gradients, which reach float32 leaves whole."""
    leaves, loss = linear_form(name)
    with torch.autocast("cuda", mixed):
        value = loss(*leaves)
    grads = torch.autograd.grad(65536.0 * value, leaves)  # backward runs outside
    assert factors == {mixed}
    rounded = [x.detach().to(mixed).requires_grad_() for x in leaves]
    expected = loss(*rounded)
    wanted = torch.autograd.grad(65536.0 * expected, rounded)
    assert factors == {mixed}
    torch.testing.assert_close(value, expected)
    for grad, coarse in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        unit = torch.finfo(mixed).eps * coarse.float().abs().max()
        assert (grad - coarse.float()).abs().max() <= 2 * unit
        assert (grad.to(mixed).float() != grad).any()


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_autocast_selects_from_rounded_factors(factors, mixed):
    (hidden, weight), _ = linear_form("exact")
    with torch.autocast("cuda", mixed):
        got = ops.linear_select_actions(hidden, weight, 16, 0.8)
    assert factors == {mixed}
    expected = ops.linear_select_actions(hidden.to(mixed), weight.to(mixed), 16, 0.8)
    assert torch.equal(got.ids, expected.ids)


@pytest.mark.parametrize("name", ["ahead", "exact", "linear_log_probs"])
def test_the_heads_gradient_adds_up_in_place(name, monkeypatch):
    """One float32 gradient of the head and its copy in bfloat16, whatever the number of chunks."""
    rows, width, vocab = 256, 1024, 65_536
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cuda", 64 * vocab)
    leaves, loss = linear_form(name, torch.bfloat16, rows, width, vocab)
    value_and_gradients(loss, leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_gradients(loss, leaves)
    extra = torch.cuda.max_memory_allocated() - before
    chunk = 4 * 64 * vocab
    assert extra < 6 * width * vocab + 2 * chunk + 8 * rows * width + (16 << 20)


def test_a_batch_vocabulary_of_unknown_size_is_padded(monkeypatch):
    leaves, loss = linear_form("exact", vocab=16_384)
    sizes = []
    made = head.Head.__init__

    def noted(self, weight, *rest):
        sizes.append(weight.shape[0])
        made(self, weight, *rest)

    monkeypatch.setattr(head.Head, "__init__", noted)
    tokens = torch.randint(16_384, (96,), device=GPU, generator=generator(4))
    teacher = torch.randn(96, 16_384, device=GPU, generator=generator(3)) * 3
    actions = ops.select_actions(teacher, 64, 0.9, include=tokens)
    options = {"actions": actions, "objective": KL, "normaliser": "batch", "extra": 100}
    with routes.forced("batch"):
        ops.linear_td_loss(*leaves, tokens, **options).loss.backward()
    assert set(sizes) < {routes.CAPACITY_STEP * i for i in range(1, 16)}


def test_a_fallback_on_a_gpu_is_told_once(caplog):
    ops._log.cache_clear()
    logits = torch.randn(2, 4096, device=GPU)
    for _ in range(2):
        ops.select_actions(logits, 1025)
    (told,) = caplog.records
    assert told.getMessage() == (
        'impl="auto" takes plain PyTorch: GPU kernels take sets of at most 1024, got 1025'
    )
