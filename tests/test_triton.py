"""The Triton kernels against the reference: on a GPU, or at small shapes under the interpreter."""

import contextlib
import importlib
import math

import pytest
import torch
from checks import check_linear_gather_q, check_softcap, check_student_rows
from torch.library import opcheck

pytest.importorskip("triton")

from tdkd import ops
from tdkd.kernels import backends, routes, tuning
from tdkd.kernels.linear_rows import in_forward
from tdkd.kernels.rows import slot_warps
from tdkd.kernels.student_rows import reference as student_rows_reference
from tdkd.kernels.student_rows import student_rows
from tdkd.kernels.tuning import Config
from tdkd.objectives import ForwardKL, IQLearn
from tdkd.testing import (
    SCALES,
    hard_rows,
    head_case,
    interpreted,
    raw_ops,
    student_case,
    ulps,
)
from tdkd.types import Scale

# NumPy tells what the interpreter computes: -inf - -inf, the log of 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*may also be overridden")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = torch.inf


@pytest.fixture(autouse=True, scope="module")
def kernels():
    """Without a GPU, tensors of the CPU go to the Triton kernels for the time of this module."""
    with contextlib.nullcontext() if GPU else interpreted():
        yield


@pytest.fixture(autouse=True)
def tiles():
    """Tiles of 256 logits, so that small rows have several, and a tail."""
    with contextlib.ExitStack() as stack:
        for kernel in tuning.CHOICES:
            stack.enter_context(tuning.override(kernel, Config(256, 1)))
        yield


def test_the_kernels_are_those_of_triton():
    module = importlib.import_module("tdkd.kernels.soft_value.triton")
    kind = "JITFunction" if GPU else "InterpretedFunction"
    assert type(module._soft_value).__name__ == kind


def test_every_launch_has_warps():
    """The interpreter does not look at their number, and a GPU refuses 0."""
    modules = ("select_actions", "student_rows", "soft_value")
    select, student, soft = (importlib.import_module(f"tdkd.kernels.{m}.triton") for m in modules)
    for k in range(1, 1025):
        block = max(16, 1 << (k - 1).bit_length())
        found = [select.blocks(k).warps, slot_warps(block), soft._launch(k)["num_warps"]]
        found += [student.finish_warps(block, groups) for groups in (16, 1024, 4096)]
        assert set(found) <= {1, 2, 4, 8, 16}


def check_selection(logits, k, top_p, **options):
    got = ops.select_actions(logits.to(DEVICE), k, top_p, impl="fused", **options)
    expected = ops.select_actions(logits.to(DEVICE), k, top_p, impl="reference", **options)
    exact = ops.select_actions(logits.to(DEVICE).double(), k, top_p, impl="reference", **options)
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.count, expected.count)
    assert got.ids.dtype == got.count.dtype == torch.int32
    assert got.log_probs.dtype == torch.float32
    same = exact.ids == expected.ids  # values that float32 merges may lie elsewhere in float64
    assert same.float().mean() > 0.9
    assert ulps(got.log_probs[same], expected.log_probs[same], exact.log_probs[same]) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 300, 1100])
def test_sets_equal_the_reference_bit_for_bit(vocab, dtype):
    logits = hard_rows(vocab, dtype)
    taken = torch.randint(-1, vocab, logits.shape[:1], generator=torch.Generator().manual_seed(1))
    check_selection(logits, 64, 1.0)
    check_selection(logits, 5, 0.9, include=taken.to(DEVICE))


@pytest.mark.parametrize("k", [1, 2, 200, 1024])
def test_every_size_of_set(k):
    check_selection(hard_rows(2100, torch.bfloat16)[[0, 1, 4, 5]], k, 1.0)


@pytest.mark.parametrize("scale", SCALES[1:])
def test_sets_of_a_scaled_head(scale):
    check_selection(hard_rows(700, torch.float32), 20, 0.8, **scale._asdict())


def test_a_nucleus_that_ends_on_top_p():
    """Ten equal tokens and top_p = 0.5: five, not six, whatever the order of a summation."""
    logits = torch.full((3, 700), -INF)
    logits[0, 100:110] = 1.0
    logits[1, ::70] = -3.0
    logits[2, 5] = 0.0
    got = ops.select_actions(logits.to(DEVICE), 64, 0.5, impl="fused")
    assert got.count.tolist() == [5, 5, 1]
    assert got.ids[0, :5].tolist() == [100, 101, 102, 103, 104]


def test_rows_that_are_no_states_are_not_read():
    logits = torch.randn(4, 600, device=DEVICE)
    logits[1:3] = torch.nan
    state = torch.tensor([True, False, False, True], device=DEVICE)
    ids, log_probs, count = torch.ops.tdkd.select_actions(
        logits, 8, 0.9, 1.0, None, 1.0, None, state
    )
    expected = ops.select_actions(logits[state], 8, 0.9, impl="reference")
    assert torch.equal(ids[state], expected.ids)
    assert (ids[~state] == -1).all()
    assert (log_probs[~state] == -INF).all()
    assert count.tolist()[1:3] == [0, 0]


def test_strided_logits_are_read_in_place():
    whole = torch.randn(3, 5, 640, device=DEVICE)
    views = [
        whole[:, :-1, :600],
        whole.transpose(0, 1),
        whole[..., ::2],
        whole[1, 2],
        whole[:, 1],
        whole[None, :, None, 1:],
        whole.expand(2, 3, 5, 640),
        whole[:0],
    ]
    for view in views:
        got = ops.select_actions(view, 4, impl="fused")
        expected = ops.select_actions(view, 4, impl="reference")
        assert torch.equal(got.ids, expected.ids)
        assert got.ids.shape == (*view.shape[:-1], 4)
        q = ops.gather_q(view, expected.ids, impl="fused")
        assert torch.equal(q, ops.gather_q(view, expected.ids, impl="reference"))
        leaf = view.detach().requires_grad_()
        student_rows(leaf, expected.ids, Scale()).log_rest.sum().backward()
        assert leaf.grad.shape == view.shape


def test_one_row_is_split_over_programs():
    logits = torch.randn(1, 3000, device=DEVICE)
    split = importlib.import_module("tdkd.kernels.rows").split
    assert split(1, 3000, 256, DEVICE)[0] > 1
    check_selection(logits.cpu(), 32, 0.95)
    ids = torch.randint(3000, (1, 32), device=DEVICE)
    got = student_rows(logits, ids, Scale())
    expected = student_rows_reference.student_rows(logits.double(), ids, Scale())
    torch.testing.assert_close(got.log_rest.double(), expected.log_rest, rtol=3e-7, atol=0)


def test_empty_shapes():
    for shape in [(0, 10), (3, 0), (0, 0)]:
        logits = torch.empty(shape, device=DEVICE)
        actions = ops.select_actions(logits, 4, impl="fused")
        assert actions.ids.shape == (shape[0], 4)
        assert (actions.count == 0).all()
        ids = torch.full((shape[0], 4), -1, device=DEVICE)
        leaf = logits.requires_grad_()
        rows = student_rows(leaf, ids, Scale())
        assert (rows.log_rest == -INF).all()
        torch.where(rows.log_rest.isfinite(), rows.log_rest, 0.0).sum().backward()
        assert leaf.grad.shape == shape


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 64, 1025])
def test_student_rows_forward_and_gradient(vocab, dtype, scale, weighted):
    check_student_rows(vocab, dtype, scale, weighted, DEVICE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_in_the_place_of_its_logits_is_the_same(dtype, scale, weighted):
    case = student_case(300, dtype, weighted, seed=3)
    logits, ids, _, log_weight, grad_z, grad_rest = (
        None if x is None else x.to(DEVICE) for x in case
    )
    _, log_rest = torch.ops.tdkd.student_rows(logits, ids, *scale, log_weight, None)
    given = grad_z, grad_rest.double(), logits, ids, log_rest, *scale, log_weight, None
    expected = torch.ops.tdkd.student_rows_backward(*given)
    torch.ops.tdkd.student_rows_backward_(*given)
    # in place, torch's makes the slope of a softcap
    unit = 0.0 if scale.softcap is None else max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(logits, expected, rtol=unit, atol=min(unit, 1e-6))


@pytest.mark.parametrize("k", [70, 1024])
def test_large_sets_of_a_student(k):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(2, 3000, generator=generator).to(DEVICE)
    ids = torch.stack([torch.randperm(3000, generator=generator)[:k] for _ in range(2)]).to(DEVICE)
    grad_z = torch.randn(2, k, generator=generator).to(DEVICE)

    def run(function, logits):
        leaf = logits.clone().requires_grad_()
        z, log_rest = function(leaf, ids, Scale())
        ((z * grad_z).sum() + 3 * log_rest.sum()).backward()
        return log_rest.detach().double(), leaf.grad.double()

    got = run(student_rows, logits)
    exact = run(student_rows_reference.student_rows, logits.double())
    torch.testing.assert_close(got[0], exact[0], rtol=3e-7, atol=0)
    torch.testing.assert_close(got[1], exact[1], rtol=3e-6, atol=1e-12)


def test_a_sure_student_keeps_its_tail():
    logits = torch.full((1, 400), -60.0, device=DEVICE)
    logits[0, 3] = 40.0
    rest = student_rows(logits, torch.tensor([[3]], device=DEVICE), Scale()).log_rest
    assert rest.item() == pytest.approx(-60 + math.log(399))


@pytest.mark.parametrize("suppressed", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 300), slice(64, 700)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_finite_mask_costs_the_rest_nothing(weighted, columns, suppressed):
    """A large negative number in place of -inf, as generation has for tokens it suppresses."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 700, generator=generator) * 3
    logits[:, columns] = suppressed
    ids = torch.tensor([[0, 5, 699], [1, 320, -1], [63, 64, 65]], device=DEVICE)
    log_weight = torch.randn(700, generator=generator).to(DEVICE) if weighted else None

    def run(function, dtype):
        leaf = logits.to(DEVICE, dtype, copy=True).requires_grad_()
        log_rest = function(leaf, ids, Scale(), log_weight=log_weight).log_rest
        log_rest.sum().backward()
        return log_rest.detach().double(), leaf.grad.double()

    got = run(student_rows, torch.float32)
    exact = run(student_rows_reference.student_rows, torch.float64)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("level", [-3000.0, 1000.0])
def test_gradients_do_not_carry_the_rounding_of_the_level(level):
    q = (torch.tensor([[0.0, 0.0, -1.0, 2.5]], device=DEVICE) + level).requires_grad_()
    (grad,) = torch.autograd.grad(ops.soft_value(q, impl="fused").sum(), q)
    torch.testing.assert_close(grad, (q - level).softmax(-1), rtol=1e-6, atol=0)
    logits = (torch.linspace(-1.0, 1.0, 701, device=DEVICE).view(1, -1) + level).requires_grad_()
    nothing = torch.full((1, 1), -1, device=DEVICE)
    (grad,) = torch.autograd.grad(student_rows(logits, nothing, Scale()).log_rest.sum(), logits)
    torch.testing.assert_close(grad.double(), logits.double().softmax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_q(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 3, 50, generator=generator) * 3).to(dtype).to(DEVICE)
    logits[0, 0, :3] = -INF
    ids = torch.randint(-1, 50, (2, 3, 9), generator=generator).to(DEVICE)
    ids[0, 0, 0] = 1
    ids[1, 1, 1] = ids[1, 1, 0]
    grad_q = torch.randn(2, 3, 9, generator=generator).to(DEVICE)

    def run(logits, impl):
        leaf = logits.clone().requires_grad_()
        q = ops.gather_q(leaf, ids, impl=impl, **scale._asdict())
        (torch.where(q.isfinite(), q, 0.0) * grad_q).sum().backward()
        return q.detach(), leaf.grad

    got, exact = run(logits, "fused"), run(logits.double(), "reference")
    # a GPU's exponential and quotient, of which tanh is made, are off by some last places
    tanh = 4 if GPU and scale.softcap else 0
    assert ulps(got[0], run(logits, "reference")[0], exact[0]) <= 2 + tanh
    assert got[1].dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[1].double(), exact[1], rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e8])
def test_a_softcap_costs_no_precision_however_large(softcap):
    check_softcap(softcap, DEVICE)


def test_an_id_that_is_no_column_gives_nan_and_touches_nothing():
    logits = torch.randn(2, 30, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[1, 30], [2, 10**6]], device=DEVICE)
    q = ops.gather_q(logits, ids, impl="fused")
    assert q[:, 0].isfinite().all()
    assert q[:, 1].isnan().all()
    (grad,) = torch.autograd.grad(q.sum(), logits)
    assert grad.count_nonzero() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", ["log_prob", "logit"])
@pytest.mark.parametrize("tail", [True, False])
def test_the_forward_kl_of_rows_in_one_launch(tail, level, dtype):
    """As the operators that it stands for, with their gradient; padded sets, rows that are no
    states, a set without a tail, teachers that exclude members."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, 300, generator=generator) * 3
    tokens = torch.randint(1, 300, (40,), generator=generator)
    tokens[5] = -100
    teacher[7, 3:] = -INF
    tokens[7] = 9  # which its teacher excludes
    taken = torch.where(tokens < 0, -1, tokens)
    actions = ops.select_actions(teacher, 20, 0.95, include=taken, impl="reference")
    actions = actions._replace(log_probs=actions.log_probs.to(dtype))
    options = dict.fromkeys(("successor", "target_value", "state_value", "expert_weight"))
    rows = ops._td_rows(
        ops.ActionSet(*(x.to(DEVICE) for x in actions)),
        tokens.to(DEVICE),
        objective=ForwardKL(tail=tail),
        q=level,
        gamma=0.99,
        ignore_index=-100,
        impl="reference",
        **options,
    )
    z = torch.randn(40, 20, generator=generator).to(DEVICE) * 2
    z = torch.where(rows.ids < 0, -INF, z)
    rest = torch.randn(40, generator=generator, dtype=torch.float64).to(DEVICE) * 2
    rest[9] = -INF
    terms, *grads = in_forward._gradients(rows, 40, z, rest, 7.0)
    seventh = torch.full((), 1 / 7, device=DEVICE)
    module = importlib.import_module("tdkd.kernels.linear_rows.triton")
    got, *got_grads = module.forward_kl(rows, z, rest, seventh)
    for name in ("loss", "q", "value", "entropy", "log_mass"):
        torch.testing.assert_close(getattr(got, name), getattr(terms, name), rtol=1e-5, atol=2e-6)
    for mine, wanted in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=2e-7)


@pytest.fixture
def one_launch(monkeypatch):
    """The kernel of rows wherever a GPU would take it; counts its calls."""
    calls = []
    module = importlib.import_module("tdkd.kernels.linear_rows.triton")
    inner = module.forward_kl

    def counted(*given):
        calls.append(given)
        return inner(*given)

    monkeypatch.setattr(module, "forward_kl", counted)
    monkeypatch.setattr(routes, "row_kernel", lambda rows, z: type(rows.objective) is ForwardKL)
    return calls


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("of", ["loss", "everything"])
def test_losses_whose_rows_take_one_launch(one_launch, tail, reduction, of):
    """From logits, a row's own gradient and sampled columns: as the reference, twice over."""
    hidden, weight, bias, _, _ = (x.to(DEVICE) for x in head_case(torch.float32, 24))
    rows, vocab = hidden.shape[0], weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    tokens[1] = -100
    teacher = (torch.randn(rows, vocab, generator=generator) * 3).to(DEVICE)
    into = torch.randn(rows, generator=generator).to(DEVICE)
    into[2] = 0.0
    actions = ops.select_actions(teacher, 6, 0.9, include=tokens.clamp(min=-1), impl="reference")
    columns = ops.sampled_vocabulary(
        vocab, 20, generator=torch.Generator().manual_seed(1), device=DEVICE
    )
    options = {"objective": ForwardKL(tail=tail), "reduction": reduction}

    def from_logits(leaves, **more):
        logits = leaves[0] @ leaves[1].T + leaves[2]
        return ops.td_loss(logits, teacher, tokens, k=6, top_p=0.9, **options, **more)

    def from_hidden(leaves, **more):
        return ops.linear_td_loss(
            *leaves[:2], tokens, actions=actions, bias=leaves[2], normaliser="sampled",
            vocabulary=columns, **options, **more,
        )  # fmt: skip

    for form in (from_logits, from_hidden):
        results = []
        for kind, impl in ((torch.float32, "fused"), (torch.float64, "reference")):
            leaves = [x.to(kind, copy=True).requires_grad_() for x in (hidden, weight, bias)]
            out = form(leaves, impl=impl)
            total = (out.loss * into).sum() if reduction == "none" else out.loss
            if of == "everything":
                total = total + (out.q * into).sum() + out.value.sum() + out.td_error.sum()
            grads = torch.autograd.grad(total, leaves, retain_graph=True)
            again = torch.autograd.grad(total, leaves)
            for mine, same in zip(grads, again, strict=True):
                assert torch.equal(mine, same)
            results.append((*out[:4], out.entropy, out.log_mass, *grads))
        for mine, wanted in zip(*results, strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-5)
    assert len(one_launch) == 2  # once a form


def test_one_launch_of_sets_in_another_layout(one_launch):
    """What the kernel reads and writes is row after row, whatever strides the sets have."""
    hidden, weight, bias, _, _ = (x.to(DEVICE) for x in head_case(torch.float32, 24))
    rows, vocab = hidden.shape[0], weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    teacher = (torch.randn(rows, vocab, generator=generator) * 3).to(DEVICE)
    columns = ops.sampled_vocabulary(vocab, 20, device=DEVICE)
    actions = ops.select_actions(teacher, 5, include=tokens, impl="reference")
    strided = actions._replace(ids=actions.ids.T.contiguous().T)
    results = []
    for sets in (actions, strided):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = ops.linear_td_loss(
            *leaves[:2], tokens, actions=sets, bias=leaves[2], normaliser="sampled",
            vocabulary=columns, objective=ForwardKL(tail=True), impl="fused",
        )  # fmt: skip
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert len(one_launch) == 2


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("level", ["log_prob", "logit"])
def test_one_launch_hides_no_nan(one_launch, tail, level):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 40, generator=generator).to(DEVICE) for _ in range(2))
    tokens = torch.tensor([1, 2, 3, 4], device=DEVICE)
    teacher[:, 30:] = -INF
    student[2, 35] = torch.nan  # no member
    results = []
    for impl in ("fused", "reference"):
        leaf = student.clone().requires_grad_()
        out = ops.td_loss(
            leaf, teacher, tokens, k=8, q=level, objective=ForwardKL(tail=tail), reduction="none",
            impl=impl,
        )  # fmt: skip
        results.append((out.loss.detach(), torch.autograd.grad(out.loss.sum(), leaf)[0]))
    for mine, wanted in zip(*results, strict=True):
        # a row's gradient is NaN somewhere, or nowhere
        some = [x.view(4, -1).isnan().any(-1) for x in (mine, wanted)]
        assert torch.equal(*some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_a_gradient_in_fewer_bits_is_the_same_rounded(scale, dtype):
    case = student_case(300, torch.float32, False, seed=3)
    logits, ids, _, _, grad_z, grad_rest = (None if x is None else x.to(DEVICE) for x in case)
    _, log_rest = torch.ops.tdkd.student_rows(logits, ids, *scale, None, None)
    options = (grad_z, grad_rest.double(), logits, ids, log_rest, *scale, None, None)
    whole = torch.ops.tdkd.student_rows_backward(*options)
    got = torch.ops.tdkd.student_rows_backward_as(*options, dtype)
    # the interpreter cuts what bfloat16 has no room for
    eps = 0.0 if GPU or dtype == torch.float16 else torch.finfo(dtype).eps
    torch.testing.assert_close(got, whole.to(dtype), rtol=eps, atol=0.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 70, 576])
def test_linear_gather_q(width, dtype, scale):
    with routes.forced("gather"):
        check_linear_gather_q(width, dtype, scale, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 576])
def test_linear_gather_q_from_the_whole_head(width, dtype):
    with routes.forced("products"):
        check_linear_gather_q(width, dtype, SCALES[2], DEVICE, rounded=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_of_a_frozen_head(dtype):
    """Hidden's gradient is made in forward, and the sets' part of it by the kernel of k rows."""
    hidden, weight, bias, ids, _ = (x.to(DEVICE) for x in head_case(dtype, 24))

    def run(impl, kind):
        leaf = hidden.to(kind, copy=True).requires_grad_()
        given = ops.linear_log_probs(
            leaf, weight.to(kind), ids, bias=bias.to(kind), softcap=5.0, impl=impl
        )
        held = given.log_probs.isfinite()
        (torch.where(held, given.log_probs, 0.0).sum() - 2 * given.log_tail.sum()).backward()
        return given.log_tail.detach(), leaf.grad

    with routes.forced("gather"):
        tail, grad = run("fused", dtype)
    (_, eager), (exact_tail, exact) = run("reference", dtype), run("reference", torch.float64)
    torch.testing.assert_close(tail.double(), exact_tail, rtol=1e-5, atol=1e-5)
    assert grad.dtype == dtype
    room = 4 * torch.finfo(dtype).eps * exact.norm()
    assert (grad - exact).norm() <= (eager - exact).norm() + room


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_of_gathered_ids(dtype, frozen):
    """The rest by sampled columns, beside k rows of the head."""
    hidden, weight, bias, ids, _ = (x.to(DEVICE) for x in head_case(dtype, 24))
    columns = ops.sampled_vocabulary(
        weight.shape[0], 20, generator=torch.Generator().manual_seed(1), device=DEVICE
    )

    def run(impl, kind):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (hidden, weight, bias)]
        heads = [x.detach() for x in leaves[1:]] if frozen else leaves[1:]
        given = ops.linear_log_probs(
            leaves[0], heads[0], ids, bias=heads[1], vocabulary=columns, gathered=True,
            softcap=5.0, impl=impl,
        )  # fmt: skip
        held = given.log_probs.isfinite()
        total = torch.where(held, given.log_probs, 0.0).sum() - 2 * given.log_tail.sum()
        return given.log_tail.detach(), *torch.autograd.grad(total, leaves[: 1 if frozen else 3])

    got, eager = run("fused", dtype), run("reference", dtype)
    exact = run("reference", torch.float64)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for mine, near, wanted in zip(got[1:], eager[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        room = 4 * torch.finfo(dtype).eps * wanted.norm()
        assert (mine - wanted).norm() <= (near - wanted).norm() + room


TILE = 128


def check_head_gradients(ids, vocab, width, dtype=torch.float32, head_dtype=None):
    """The raw op against sums in float64: two runs give the same bits, and other rows are zero."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight, grad = (
        torch.randn(shape, generator=generator).to(DEVICE, kind)
        for shape, kind in (
            ((ids.shape[0], width), dtype),
            ((vocab, width), head_dtype or dtype),
            (ids.shape, torch.float32),
        )
    )
    ids = ids.to(DEVICE)
    given = grad, hidden, weight, ids, True
    got = again = torch.ops.tdkd.head_products_backward(*given)
    if GPU:  # the interpreter has one order
        again = torch.ops.tdkd.head_products_backward(*given)
    held = torch.where((ids >= 0) & (ids < vocab), grad, 0.0).double()
    of_logits = torch.zeros(ids.shape[0], vocab, dtype=torch.float64, device=DEVICE)
    of_logits.scatter_add_(1, ids.long().clamp(0, vocab - 1), held)

    def gradients(of_logits, hidden, weight):
        return of_logits @ weight, of_logits.T @ hidden, of_logits.sum(0)

    exact = gradients(of_logits, hidden.double(), weight.double())
    sizes = gradients(of_logits.abs(), hidden.double().abs(), weight.double().abs())
    for mine, same, wanted, size in zip(got, again, exact, sizes, strict=True):
        assert torch.equal(mine, same)
        room = torch.finfo(mine.dtype).eps * wanted.abs() + 5e-7 * size
        assert ((mine.double() - wanted).abs() <= room).all()
    assert [x.dtype for x in got] == [dtype, head_dtype or dtype, torch.float32]
    asked = torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    asked[ids[(ids >= 0) & (ids < vocab)].long()] = True
    assert not got[1][~asked].any()
    assert not got[2][~asked].any()


@pytest.mark.parametrize(
    "before,length",
    [(0, TILE), (1, TILE - 1), (TILE - 1, 1), (1, 2 * TILE), (TILE - 1, 2 * TILE + 2)],
)
def test_segments_on_the_borders_of_tiles(before, length):
    """Ids of many slots, in any place of a tile; the last of them ends with the slots."""
    assert importlib.import_module("tdkd.kernels.linear_gather_q.triton").TILE == TILE
    ids = torch.tensor([0] * before + [2] * length + [3] + [4] * (length // 2))
    check_head_gradients(ids[torch.randperm(len(ids))][:, None], 6, 3)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_an_id_of_all_rows(head_dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (TILE + 9, 3), generator=generator, dtype=torch.int32)
    ids[:, 1] = 17
    ids[::3, 0] = -1
    ids[5:20] = -1
    ids[::2, 2] = 40
    check_head_gradients(ids, 40, 33, torch.bfloat16, head_dtype)


@pytest.mark.parametrize("width", [1025, 2050])
def test_blocks_of_columns(width):
    ids = torch.randint(-1, 9, (7, 5), generator=torch.Generator().manual_seed(0))
    check_head_gradients(ids, 9, width, torch.bfloat16)


@pytest.mark.parametrize("id", [-1, 6])
@pytest.mark.parametrize("rows", [1, TILE, TILE + 1])
def test_slots_that_are_no_rows_of_the_head(rows, id):
    check_head_gradients(torch.full((rows, 3), id), 6, 5)


def test_hidden_states_and_heads_that_are_strided():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 50, generator=generator).to(DEVICE)
    weight = torch.randn(9, 70, generator=generator).to(DEVICE)
    ids = torch.randint(9, (6, 3), generator=generator).to(DEVICE)
    for h, w in (
        (hidden[:, :20], weight[:, :20]),
        (hidden[:, 5:45:2], weight[:, 30:50]),
        (hidden[:1, :20].expand(6, 20), weight[:, ::3][:, :20]),
    ):
        z = torch.ops.tdkd.head_products(h, w, None, ids)
        torch.testing.assert_close(z, (h @ w.T).gather(-1, ids))
        got = torch.ops.tdkd.head_products_backward(z, h, w, ids, True)
        given = z, h.contiguous(), w.contiguous(), ids, True
        for mine, same in zip(got, torch.ops.tdkd.head_products_backward(*given), strict=True):
            assert torch.equal(mine, same)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, bias, ids, grad = (x.to(DEVICE) for x in head_case(torch.float32, 20))
    hidden.requires_grad_()
    q = ops.linear_gather_q(hidden, weight, ids, bias=bias, impl="fused")
    (by_hidden,) = torch.autograd.grad(q.clamp(min=-99.0), hidden, grad)
    assert by_hidden.shape == hidden.shape
    assert not by_hidden[3].any()


@pytest.mark.parametrize("k", [0, 1, 5, 64, 2500])
def test_soft_value(k):
    generator = torch.Generator().manual_seed(k)
    q = torch.randn(2, 3, k, generator=generator) * 4
    if k:
        q[0, 0] = -INF
        q[0, 1, k // 2 :] = -INF
        q[1, 2] += 900.0
    q = q.to(DEVICE)
    weights = torch.randn(2, 3, generator=generator).to(DEVICE)

    def run(q, impl):
        leaf = q.clone().requires_grad_()
        value = ops.soft_value(leaf, impl=impl)
        (torch.where(value.isfinite(), value, 0.0) * weights).sum().backward()
        return value.detach(), leaf.grad

    got, eager, exact = run(q, "fused"), run(q, "reference"), run(q.double(), "reference")
    assert ulps(got[0], eager[0], exact[0]) <= 2
    assert ulps(got[1], eager[1], exact[1]) <= 4


@pytest.mark.parametrize("lam", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("rewarded", [False, True])
def test_td_target(lam, rewarded):
    """Chains in any order of rows, of which some end and some are cut off."""
    generator = torch.Generator().manual_seed(3)
    n = 300
    order = torch.randperm(n, generator=generator)
    successor = torch.empty(n, dtype=torch.int64)
    successor[order[:-1]] = order[1:]
    successor[order[-1]] = -1
    successor[order[::37]] = -2
    successor[order[::53]] = -1
    value, reward, weights = torch.randn(3, n, generator=generator).to(DEVICE)
    successor = successor.to(DEVICE)
    given = reward if rewarded else None

    def run(dtype, impl):
        leaves = [value.to(dtype).requires_grad_()]
        if given is not None:
            leaves.append(given.to(dtype).requires_grad_())
        target = ops.td_target(
            leaves[0],
            successor,
            gamma=0.9,
            reward=leaves[1] if rewarded else None,
            lam=lam,
            impl=impl,
        )
        return target.detach(), *torch.autograd.grad((target * weights.to(dtype)).sum(), leaves)

    exact = run(torch.float64, "reference")
    eager = run(torch.float32, "reference")
    for got, near, wanted in zip(run(torch.float32, "fused"), eager, exact, strict=True):
        assert ulps(got, near, wanted) <= 4


def test_an_infinite_value_of_no_weight_stays_out():
    value = torch.tensor([1.0, -INF, 2.0], device=DEVICE)
    successor = torch.tensor([1, 2, -1], device=DEVICE)
    at_one = ops.td_target(value, successor, gamma=0.5, lam=1.0, impl="fused")
    assert at_one.tolist() == [0.0, 0.0, 0.0]
    assert ops.td_target(value, successor, gamma=0.0, impl="fused").tolist() == [0.0, 0.0, 0.0]


def loss_inputs(rows=12, vocab=700, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    student = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    teacher = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    tokens = torch.randint(vocab, (rows,), generator=generator)
    tokens[3] = -100
    return [x.to(DEVICE) for x in (student, teacher, tokens)]


OBJECTIVES = [IQLearn(alpha=1.0), ForwardKL(tail=True), ForwardKL() + 0.1 * IQLearn()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_td_loss(objective, dtype):
    student, teacher, tokens = loss_inputs(dtype=dtype)
    weights = torch.rand(tokens.shape, device=DEVICE)

    def run(impl, student, teacher):
        leaf = student.clone().requires_grad_()
        out = ops.td_loss(
            leaf, teacher, tokens, objective=objective, k=9, reduction="none", impl=impl
        )
        (out.loss * weights).sum().backward()
        return out.loss.detach(), leaf.grad, out.actions

    got, eager = run("fused", student, teacher), run("reference", student, teacher)
    exact = run("reference", student.double(), teacher.double())
    assert torch.equal(got[2].ids, eager[2].ids)
    assert ulps(got[0], eager[0], exact[0]) <= 8
    error, allowed = ((x[1].double() - exact[1]).abs() for x in (got, eager))
    eps = torch.finfo(dtype).eps
    assert (error <= allowed + 2 * eps * exact[1].abs() + 1e-6 * exact[1].abs().max()).all()
    assert not got[1][3].any()


def test_two_runs_give_the_same_bits():
    student, teacher, tokens = loss_inputs()

    def run():
        leaf = student.clone().requires_grad_()
        out = ops.td_loss(leaf, teacher, tokens, k=9, impl="fused")
        out.loss.backward()
        return out.loss.detach(), leaf.grad

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", backends.TRITON_OPS)
def test_opcheck(name):
    opcheck(getattr(torch.ops.tdkd, name).default, raw_ops(DEVICE, triton=True)[name])
