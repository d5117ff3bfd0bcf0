"""The CPU kernels against the reference: sets bit for bit, values and gradients within a budget.

Budget: |kernel - float64| <= |reference in float32 - float64| + a few units in the last place.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import check_linear_gather_q, check_softcap, check_student_rows
from torch.library import opcheck
from torch.utils.cpp_extension import get_cxx_compiler

from tdkd import ops
from tdkd.kernels import (
    backends,
    gather_q,
    head,
    select_actions,
    soft_value,
    student_rows,
    td_target,
)
from tdkd.kernels.student_rows import reference as student_rows_reference
from tdkd.objectives import CrossEntropy, ForwardKL, IQLearn
from tdkd.testing import SCALES, hard_rows, head_case, make_logits, raw_ops, ulps
from tdkd.types import Scale

pytestmark = pytest.mark.skipif(backends.MISSING is not None, reason=str(backends.MISSING))

ISAS = ["portable", "avx2", "avx512"]
if backends.MISSING is None:
    ISAS = ISAS[: ISAS.index(backends.capability()) + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRODUCTS = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (65, 63, 129), (137, 577, 1031), (700, 1300, 2)]
PRODUCTS += [(1, 2048, 33), (1500, 40, 64), (0, 5, 3), (5, 0, 3), (5, 3, 0)]
INF = torch.inf


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("TDKD_CPU_CAPABILITY", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 128, 256, 257, 1000, 4100])
def test_sets_equal_the_reference_bit_for_bit(isa, vocab, dtype):
    logits = hard_rows(vocab, dtype)
    taken = torch.randint(-1, vocab, logits.shape[:1], generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 64, 300, 1024):
        for top_p in (1.0, 0.9, 0.3):
            for scale in SCALES:
                options = {
                    "include": taken,
                    "temperature": scale.temperature,
                    "softcap": scale.softcap,
                    "logit_scale": scale.logit_scale,
                }
                got = ops.select_actions(logits, k, top_p, impl="fused", **options)
                expected = ops.select_actions(logits, k, top_p, impl="reference", **options)
                assert torch.equal(got.ids, expected.ids), (k, top_p, scale)
                assert torch.equal(got.count, expected.count), (k, top_p, scale)
                exact = ops.select_actions(
                    logits.double(), vocab, 1.0, **{**options, "include": None}, impl="reference"
                )
                dense = torch.full((14, vocab + 1), -INF, dtype=torch.float64)
                dense.scatter_(
                    1, torch.where(exact.ids < 0, vocab, exact.ids).long(), exact.log_probs
                )
                dense[:, vocab] = -INF
                wanted = dense.gather(1, torch.where(got.ids < 0, vocab, got.ids).long())
                peak = logits.double().abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
                peak = peak * scale.logit_scale / scale.temperature
                # log pi is a difference of logits: their last place is the unit
                allowed = 4 * torch.finfo(torch.float32).eps * (peak + 12)
                finite = wanted.isfinite()
                assert torch.equal(got.log_probs.double()[~finite], wanted[~finite])
                error = (got.log_probs.double() - wanted)[finite].abs()
                assert (error <= allowed.expand_as(wanted)[finite]).all(), (k, top_p, scale)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e8])
def test_a_softcap_costs_no_precision_however_large(isa, softcap):
    check_softcap(softcap)


def by_panels(logits, width, k, top_p, scale, include, state=None):
    panels = select_actions.Panels(logits, logits.shape[1], k)
    half = slice(0, logits.shape[0] // 2), slice(logits.shape[0] // 2, logits.shape[0])
    for first in range(0, logits.shape[1], width):
        for rows in half:
            panel = logits[rows, first : first + width]
            panels.add(panel, rows, first, top_p, scale, include, state)
    return panels.actions


def same_sets(got, expected):
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.count, expected.count)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 257, 1000, 4100])
@pytest.mark.parametrize("width", [1, 7, 256, 300, 4097])
def test_sets_do_not_depend_on_panels(isa, vocab, width, dtype):
    if vocab // width > 1100:
        pytest.skip("thousands of panels")
    logits = hard_rows(vocab, dtype)
    generator = torch.Generator().manual_seed(1)
    taken = torch.randint(-1, vocab, logits.shape[:1], generator=generator)
    state = torch.rand(logits.shape[0], generator=generator) < 0.8
    for k in (1, 2, 64, 300):
        for scale in SCALES:
            for options in ((1.0, scale, taken), (0.9, scale, taken, state), (0.3, scale, None)):
                got = by_panels(logits, width, k, *options)
                same_sets(got, select_actions.select_actions(logits, k, *options))


@pytest.mark.parametrize("width", [1000, 6144, 40_000])
def test_panels_of_a_whole_vocabulary(isa, width):
    """In order, in reverse order, tied across panels, and what is not finite in one of many."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 50_000, generator=generator) * 2.5
    logits[1] = logits[1].sort().values
    logits[2] = logits[2].sort(descending=True).values
    logits[3] = logits[3].round()
    logits[4] = 1.5
    logits[5, 20_000:] = -INF
    logits[6, :49_990] = -INF
    logits[7, 45_000] = torch.nan
    logits[8, 3] = INF
    for k in (1, 64, 1024):
        for top_p in (1.0, 0.9):
            for scale in (Scale(), Scale(softcap=5.0)):
                options = k, top_p, scale, None
                got = by_panels(logits, width, *options)
                same_sets(got, select_actions.select_actions(logits, *options))
                assert got.count[7:].eq(0).all()


def test_panels_refuse_what_does_not_fit():
    logits = torch.zeros(2, 8)
    panels = select_actions.Panels(logits, 12, 3)
    both, options = slice(0, 2), (1.0, Scale())
    with pytest.raises(RuntimeError, match="first: expected columns 5 to 13 within 12"):
        panels.add(logits, both, 5, *options, None, None)
    with pytest.raises(RuntimeError, match="expected the contiguous outputs"):
        panels.add(logits[:1], both, 0, *options, None, None)
    with pytest.raises(RuntimeError, match="include: expected ids below 12, got 12"):
        panels.add(logits, both, 0, *options, torch.tensor([3, 12]), None)


def test_logsumexp_to_two_millionths(isa):
    generator = torch.Generator().manual_seed(0)
    for vocab in (1000, 32_000, 151_936):
        logits = torch.randn(4, vocab, generator=generator) * 2.5
        logits[1] += 40.0 * (torch.rand(vocab, generator=generator) < 1e-3)
        logits[2] = torch.linspace(-300, 300, vocab)
        logits[3] = logits[3].sort().values
        actions = ops.select_actions(logits, 1, impl="fused")
        log_z = logits.double().amax(-1) - actions.log_probs.squeeze(-1).double()
        exact = logits.double().logsumexp(-1)
        nothing = torch.empty((4, 0), dtype=torch.int32)
        whole = student_rows.student_rows(logits, nothing, Scale()).log_rest.double()
        assert ((log_z - exact).abs() <= 2e-6 * exact.abs()).all()
        assert ((whole - exact).abs() <= 2e-6 * exact.abs()).all()


@pytest.mark.parametrize("k", [8, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sets_of_a_whole_vocabulary(isa, dtype, k):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(6, 151_936, generator=generator) * 2.5
    logits[1, torch.randint(151_936, (20,), generator=generator)] += 15
    logits[2] = logits[2].sort().values
    logits[3] = 1.5
    logits[4] = logits[4].sort(descending=True).values
    logits[5] = logits[5].round()
    logits = logits.to(dtype)
    got = ops.select_actions(logits, k, 0.9, impl="fused")
    expected = ops.select_actions(logits, k, 0.9, impl="reference")
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.count, expected.count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_candidates_are_looked_at(isa, dtype):
    """A third of such rows once took a threshold far too low, and thousands of candidates."""
    generator = torch.Generator().manual_seed(0)
    logits = make_logits("peaked", 24, 151_936, dtype, generator)
    got = ops.select_actions(logits, 64, impl="fused")
    expected = ops.select_actions(logits, 64, impl="reference")
    assert torch.equal(got.ids, expected.ids)


def test_strided_logits_are_read_in_place(isa):
    whole = torch.randn(3, 5, 40)
    for view in (whole[:, :-1, :33], whole.transpose(0, 1), whole[..., ::2], whole[1, 2]):
        got = ops.select_actions(view, 4, impl="fused")
        expected = ops.select_actions(view, 4, impl="reference")
        assert torch.equal(got.ids, expected.ids)
        ids = expected.ids
        got_q = ops.gather_q(view, ids, impl="fused")
        assert torch.equal(got_q, ops.gather_q(view, ids, impl="reference"))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 16, 300, 1025, 5000])
def test_student_rows_forward_and_gradient(isa, vocab, dtype, scale, weighted):
    check_student_rows(vocab, dtype, scale, weighted)


def test_a_sure_student_keeps_its_tail(isa):
    logits = torch.full((1, 400), -60.0)
    logits[0, 3] = 40.0
    ids = torch.tensor([[3]])
    z, log_rest = student_rows.student_rows(logits, ids, Scale())
    assert log_rest.item() == pytest.approx(-60 + math.log(399))
    assert z.item() == 40.0


@pytest.mark.parametrize("level", [-3000.0, 1000.0])
def test_gradients_do_not_carry_the_rounding_of_the_level(isa, level):
    """Half a last place of a logsumexp at 1000 is 3e-5, and was an error of every weight."""
    q = (torch.tensor([[0.0, 0.0, -1.0, 2.5]]) + level).requires_grad_()
    (grad,) = torch.autograd.grad(soft_value.soft_value(q).sum(), q)
    torch.testing.assert_close(grad, (q - level).softmax(-1), rtol=5e-7, atol=0)
    logits = (torch.linspace(-1.0, 1.0, 701).view(1, -1) + level).requires_grad_()
    nothing = torch.full((1, 1), -1)
    log_rest = student_rows.student_rows(logits, nothing, Scale()).log_rest
    (grad,) = torch.autograd.grad(log_rest.sum(), logits)
    torch.testing.assert_close(grad.double(), logits.double().softmax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 70, 576])
def test_linear_gather_q(isa, width, dtype, scale):
    check_linear_gather_q(width, dtype, scale)


def test_a_frozen_head_gets_no_gradient(isa):
    hidden, weight, bias, ids, grad = head_case(torch.float32, 20)
    hidden.requires_grad_()
    q = ops.linear_gather_q(hidden, weight, ids, bias=bias, impl="fused")
    (by_hidden,) = torch.autograd.grad(q.clamp(min=-99.0), hidden, grad)
    assert by_hidden.shape == hidden.shape
    assert not by_hidden[3].any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_q(dtype, scale):
    logits = (torch.randn(2, 3, 50) * 3).to(dtype)
    logits[0, 0, :3] = -INF
    ids = torch.randint(-1, 50, (2, 3, 9))
    ids[0, 0, :2] = torch.tensor([1, 1])
    grad = torch.randn(2, 3, 9)
    results = []
    for impl, x in (("fused", logits), ("reference", logits), ("reference", logits.double())):
        leaf = x.clone().requires_grad_()
        q = ops.gather_q(leaf, ids, impl=impl, **scale._asdict())
        torch.where(q.isfinite(), q * grad, 0.0).sum().backward()
        results.append((q.detach(), leaf.grad))
    (q, got), (expected_q, _), (_, exact) = results
    torch.testing.assert_close(q, expected_q, rtol=3e-7, atol=0)
    keep = logits != -INF
    torch.testing.assert_close(
        got[keep].double(), exact[keep], rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_soft_value():
    q = torch.randn(7, 5) * 3
    q[0] = -INF
    q[1, 2:] = -INF
    q[2] += 1000.0
    results = []
    for impl, x in (("fused", q), ("reference", q.double())):
        leaf = x.clone().requires_grad_()
        value = ops.soft_value(leaf, impl=impl)
        torch.where(value.isfinite(), value, 0.0).square().sum().backward()
        results.append((value.detach().double(), leaf.grad.double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=3e-7, atol=1e-6)
    # exp of a difference: the last place of the value times its gradient 2 v
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert not results[0][1][0].any()


@pytest.mark.parametrize("lam", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.99, 1.0])
@pytest.mark.parametrize("rewarded", [False, True])
def test_td_target(lam, gamma, rewarded):
    generator = torch.Generator().manual_seed(3)
    # chains in random order over the rows, with ends of both kinds
    order = torch.randperm(60, generator=generator)
    successor = torch.full((60,), -2)
    successor[order[:-1]] = order[1:]
    successor[order[9::10]] = torch.tensor([-1, -2, -1, -2, -1, -1])
    value = torch.randn(60, generator=generator)
    value[successor.argmin()] = -INF if lam is None else 0.0
    reward = torch.randn(60, generator=generator) if rewarded else None
    weight = torch.randn(60, generator=generator)
    results = []
    for impl, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        leaves = [value.to(dtype, copy=True).requires_grad_()]
        if rewarded:
            leaves.append(reward.to(dtype, copy=True).requires_grad_())
        target = ops.td_target(
            leaves[0],
            successor,
            gamma=gamma,
            reward=leaves[1] if rewarded else None,
            lam=lam,
            impl=impl,
        )
        (torch.where(target.isfinite(), target, 0.0) * weight.to(dtype)).sum().backward()
        results.append([target.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_td_target_refuses_what_is_no_chain():
    value = torch.zeros(3)
    with pytest.raises(RuntimeError, match="^successor: expected chains that end.*cycle"):
        ops.td_target(value, torch.tensor([1, 2, 0]), impl="fused")
    with pytest.raises(RuntimeError, match="^successor: expected ids below 3, got 3"):
        torch.ops.tdkd.td_target(value, torch.tensor([1, 3, -1]), None, 0.9, 0.5)
    with pytest.raises(ValueError, match="^successor: expected rows from 0 to 2, .*got 3"):
        ops.td_target(value, torch.tensor([1, 3, -1]), impl="fused")


def test_ids_out_of_range_are_refused_not_read():
    logits = torch.randn(2, 10)
    ids = torch.tensor([[1], [10]])
    for call in (
        lambda: ops.gather_q(logits, ids, impl="fused"),
        lambda: student_rows.student_rows(logits, ids, Scale()),
        lambda: torch.ops.tdkd.gather_q_backward(torch.ones(2, 1), logits, ids, 1.0, None, 1.0),
    ):
        with pytest.raises(RuntimeError, match="^ids: expected ids below 10, got 10"):
            call()
    for wrong in (torch.zeros(9), torch.zeros(10, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="^log_weight: expected float32, one a column of 10"):
            torch.ops.tdkd.student_rows(logits, ids - 5, 1.0, None, 1.0, wrong, None)
    with pytest.raises(RuntimeError, match="^include: expected ids below 10, got 12"):
        ops.select_actions(logits, 2, include=torch.tensor([12, 0]), impl="fused")


def _loss_inputs(rows=24, vocab=301, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(2, rows // 2, vocab, generator=generator) * 2).to(dtype)
    teacher = (torch.randn(2, rows // 2, vocab, generator=generator) * 3).to(dtype)
    tokens = torch.randint(vocab, (2, rows // 2), generator=generator)
    tokens[0, :3] = -100
    tokens[1, -2:] = -100
    teacher[1, 4] = torch.nan
    tokens[1, 5] = 2
    return student, teacher, tokens, ops.successors(tokens, eos_token_id=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("level", ["log_prob", "logit"])
@pytest.mark.parametrize(
    "objective",
    [
        IQLearn(alpha=1.0),
        IQLearn(expectation="teacher"),
        ForwardKL(tail=True),
        CrossEntropy(tail=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_td_loss(isa, dtype, objective, level, reduction):
    student, teacher, tokens, successor = _loss_inputs(dtype=dtype)
    weight = torch.rand(tokens.shape)
    results = []
    for impl, cast in (("fused", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = student.to(cast, copy=True).requires_grad_()
        out = ops.td_loss(
            leaf,
            teacher,
            tokens,
            objective=objective,
            q=level,
            k=9,
            successor=successor,
            reduction=reduction,
            impl=impl,
        )
        total = (out.loss * weight.to(out.loss.dtype)).sum() if reduction == "none" else out.loss
        # every output is differentiable
        (total + (out.q + out.value + out.td_error).sum() / 7).backward()
        results.append([*(x.detach() for x in out[:4]), leaf.grad, out.actions.ids])
    got, eager, exact = results
    assert torch.equal(got[-1], eager[-1])
    for mine, theirs, wanted in zip(got[:4], eager[:4], exact[:4], strict=True):
        assert mine.isfinite().all()
        # a loss adds up nine slots, of which each carries a rounding or two
        assert ulps(mine, theirs, wanted) <= 16
    # As in docs/reliability.md: what multiplies a row's gradients, up to 20 with the paper's chi2,
    # carries the rounding of a TD error over 2 alpha. 5.2 units were seen, over 60 draws.
    unit = torch.finfo(dtype).eps * exact[4].abs().amax(-1, keepdim=True).clamp(min=1.0)
    error = (got[4].double() - exact[4]).abs()
    allowed = (eager[4].double() - exact[4]).abs() + 16 * unit
    assert (error <= allowed).all()
    assert not got[4][tokens == -100].any()


def test_a_nan_of_a_row_that_is_no_state_stays_there(isa):
    student, teacher, tokens, successor = _loss_inputs()
    student[0, 0] = torch.nan
    teacher[0, 1] = torch.nan
    student.requires_grad_()
    out = ops.td_loss(student, teacher, tokens, successor=successor, impl="fused", check=False)
    out.loss.backward()
    assert out.loss.isfinite()
    assert student.grad.isfinite().all()


def test_second_backward_and_double_use():
    student, teacher, tokens, successor = _loss_inputs()
    student.requires_grad_()

    def loss():
        return ops.td_loss(student, teacher, tokens, successor=successor, impl="fused").loss

    (once,) = torch.autograd.grad(loss(), student)
    kept = loss()
    kept.backward(retain_graph=True)
    assert torch.equal(student.grad, once)
    kept.backward()
    torch.testing.assert_close(student.grad, 2 * once)
    student.grad = None
    (loss() + loss()).backward()
    torch.testing.assert_close(student.grad, 2 * once)


def test_one_logits_sized_allocation():
    student, teacher, tokens, successor = _loss_inputs(rows=64, vocab=20_000)
    student.requires_grad_()
    size = student.numel() * 4
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        ops.td_loss(student, teacher, tokens, successor=successor, impl="fused").loss.backward()
    large = [
        event
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() >= size // 4
    ]
    assert [event.nbytes() for event in large] == [size]


def test_linear_ops_take_the_kernels():
    hidden, weight = torch.randn(9, 16), torch.randn(700, 16)
    results = []
    for impl in ("fused", "reference"):
        leaf = hidden.clone().requires_grad_()
        ops.linear_logsumexp(leaf, weight, impl=impl).sum().backward()
        results.append((ops.linear_select_actions(hidden, weight, 5, impl=impl).ids, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_threads_and_autocast_change_nothing():
    student, teacher, tokens, successor = _loss_inputs(rows=200, vocab=2000)
    results = []
    threads = torch.get_num_threads()
    try:
        for number, autocast in ((1, False), (2, False), (3, True)):
            torch.set_num_threads(number)
            leaf = student.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = ops.td_loss(leaf, teacher, tokens, successor=successor, impl="fused")
            out.loss.backward()
            results.append([out.loss.detach(), leaf.grad, out.actions.ids])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", list(raw_ops()))
def test_opcheck(name):
    opcheck(getattr(torch.ops.tdkd, name).default, raw_ops()[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_a_gradient_in_the_place_of_its_logits_is_the_same(dtype, scale):
    logits = (torch.randn(5, 700) * 4).to(dtype)
    ids = torch.randint(700, (5, 9))
    ids[:, 3] = ids[:, 2]  # twice
    ids[:, 8] = -1
    z, log_rest = torch.ops.tdkd.student_rows(logits, ids, *scale, None, None)
    given = torch.randn(5, 9), torch.randn(5, dtype=torch.float64), logits, ids, log_rest, *scale
    expected = torch.ops.tdkd.student_rows_backward(*given, None, None)
    torch.ops.tdkd.student_rows_backward_(*given, None, None)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("objective", [IQLearn(alpha=1.0), ForwardKL(tail=True)], ids=repr)
def test_torch_compile_without_a_graph_break(objective):
    def step(student, teacher, tokens, successor):
        out = ops.td_loss(
            student, teacher, tokens, objective=objective, k=9, successor=successor, impl="fused"
        )
        return out.loss, out.value

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (24, 32):
        student, teacher, tokens, successor = _loss_inputs(rows=rows)
        results = []
        for function in (step, compiled):
            leaf = student.clone().requires_grad_()
            loss, value = function(leaf, teacher, tokens, successor)
            loss.backward()
            results.append([loss.detach(), value.detach(), leaf.grad])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


multiplies_bfloat16 = pytest.mark.skipif(
    not backends.MULTIPLIES_BFLOAT16, reason="this CPU or this torch has no product of bfloat16"
)


def brain(rows, columns, layout, seed):
    """A bfloat16 matrix whose rows, whose columns, or neither are contiguous."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(columns, rows, generator=generator).bfloat16()
    if layout == "columns":
        return stored.T
    stored = stored.T.contiguous()
    return stored if layout == "rows" else torch.stack([stored, stored], -1)[..., 0]


@multiplies_bfloat16
@pytest.mark.parametrize("rows,columns,depth", PRODUCTS)
@pytest.mark.parametrize("of_a", ["rows", "columns", "neither"])
@pytest.mark.parametrize("of_b", ["rows", "columns", "neither"])
def test_products_of_bfloat16_are_summed_in_float32(rows, columns, depth, of_a, of_b):
    """Blocks that end anywhere; results whose rows begin anywhere, with room between them."""
    a, b = brain(rows, depth, of_a, 1), brain(depth, columns, of_b, 2)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for add in (False, True):
        room = torch.full((rows, columns + 5), 3.0 if add else torch.nan)
        out = room[:, 2 : columns + 2]
        head.product_(out, a, b, add=add)
        error = (out - exact - (3 if add else 0)).abs()
        assert (error <= 2**-23 * (depth**0.5 * size + 3)).all()
        room[:, 2 : columns + 2] = 3.0 if add else torch.nan
        assert (room == 3).all() if add else room.isnan().all()


@multiplies_bfloat16
def test_products_of_bfloat16_keep_what_is_not_finite_where_it_is():
    a, b = brain(70, 90, "rows", 1), brain(90, 130, "columns", 2)
    a[3, 5], a[7, 8], b[6, 100] = torch.inf, torch.nan, torch.inf
    out = torch.empty(70, 130)
    head.product_(out, a, b)
    exact = a.double() @ b.double()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out.sign().nan_to_num(), exact.sign().nan_to_num())


@multiplies_bfloat16
@pytest.mark.parametrize(
    "rows,columns,depth", [(256, 2000, 576), (256, 576, 3000), (3000, 96, 256)]
)
def test_products_of_bfloat16_do_not_depend_on_threads(rows, columns, depth):
    a, b = brain(rows, depth, "rows", 1), brain(depth, columns, "columns", 2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(torch.empty(rows, columns))
            head.product_(found[-1], a, b)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@multiplies_bfloat16
def test_products_of_bfloat16_refuse_what_does_not_fit():
    a, b, out = brain(3, 4, "rows", 1), brain(4, 5, "rows", 2), torch.empty(3, 5)
    for given, message in (
        ((out, a.float(), b), "a: expected a bfloat16 matrix"),
        ((out, a, b[0]), "b: expected a bfloat16 matrix"),
        ((out, a, b[:3]), "a, b: expected equal depths, got 4 and 3"),
        ((out[:2], a, b), r"out: expected float32 \[3, 5\] with contiguous rows"),
        ((out.double(), a, b), "out: expected float32"),
        ((torch.empty(5, 3).T, a, b), "out: expected float32"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            torch.ops.tdkd.product_(*given, False)


@multiplies_bfloat16
def test_a_smaller_cpu_multiplies_in_float32():
    """The same logits, since products of bfloat16 are exact in float32."""
    code = (
        "import torch\n"
        "from tdkd import ops\n"
        "from tdkd.kernels import backends\n"
        "x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()\n"
        "print(backends.MULTIPLIES_BFLOAT16, *ops.linear_logsumexp(x[:2], x).tolist())\n"
    )
    found = []
    for capability in ("avx512", "avx2"):
        env = {**os.environ, "TDKD_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        able, *values = done.stdout.split()
        assert able == str(capability == "avx512")
        found.append([float(x) for x in values])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("program", ["tests/fuzz/rows.cpp", "benchmarks/rows/rows.cpp"])
def test_programs_beside_the_extension_compile(program):
    """CI runs neither, and both call the row primitives."""
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    root = Path(__file__).parents[1]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Icsrc", "-Itests/fuzz", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_capability_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("TDKD_CPU_CAPABILITY", "portable")
    assert backends.capability() == "portable"
    monkeypatch.setenv("TDKD_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match="TDKD_CPU_CAPABILITY: expected portable.*got sse9"):
        backends.capability()


def test_library_needs_the_stable_abi_of_torch_alone():
    """Blocks of bfloat16 products are weak symbols: a torch without them loads the library."""
    import tdkd._C

    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", tdkd._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    foreign = [line.split() for line in symbols.splitlines() if "at::" in line or "c10::" in line]
    assert all(kind == "w" and "cpublas::brgemm" in name for kind, name, *_ in foreign)
    assert tdkd._C.__file__.endswith(".abi3.so")


def test_an_extension_of_before_is_left_alone():
    """A checkout that was updated and not built again."""
    code = (
        "import sys, types; sys.modules['tdkd._C'] = types.ModuleType('tdkd._C')\n"
        "import torch, tdkd.ops as ops\n"
        "print(ops.soft_value(torch.zeros(2)).item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.6931472)
    assert "the CPU kernels are of an earlier version: build them again" in done.stderr


def test_works_without_the_extension():
    code = (
        "import sys; sys.modules['tdkd._C'] = None\n"
        "import torch, tdkd.ops as ops\n"
        "print(ops.select_actions(torch.tensor([[1., 3., 2.]]), 2).ids.tolist())\n"
        "try: ops.soft_value(torch.zeros(2), impl='fused')\n"
        "except NotImplementedError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.splitlines()[0] == "[[1, 2]]"
    assert "the CPU kernels are not built" in done.stdout


def test_modules_offer_the_reference_signature():
    import inspect

    from tdkd.kernels.gather_q import reference as gather_q_reference
    from tdkd.kernels.select_actions import reference as select_actions_reference
    from tdkd.kernels.soft_value import reference as soft_value_reference
    from tdkd.kernels.td_target import reference as td_target_reference

    for kernel, reference in (
        (gather_q.gather_q, gather_q_reference.gather_q),
        (select_actions.select_actions, select_actions_reference.select_actions),
        (soft_value.soft_value, soft_value_reference.soft_value),
        (student_rows.student_rows, student_rows_reference.student_rows),
        (td_target.td_target, td_target_reference.td_target),
    ):
        assert list(inspect.signature(kernel).parameters) == list(
            inspect.signature(reference).parameters
        )


@pytest.mark.parametrize("temperature", [1.7, 0.3])
def test_a_gradient_of_huge_logits_is_zero_far_below_them(isa, temperature):
    """Found by make fuzz: the rounding of the level, as a factor, was infinite, and 0 * inf NaN."""
    level = 10.0 ** torch.arange(8, 21).unsqueeze(-1)
    logits = torch.cat([level * (1 + 0.013 * j) for j in range(20)]).mul(torch.tensor([1.0, -1.0]))
    nothing = torch.full((len(logits), 1), -1)
    scale = temperature, None, 1.0
    z, log_rest = torch.ops.tdkd.student_rows(logits, nothing, *scale, None, None)
    given = torch.zeros_like(z), torch.ones_like(log_rest), logits, nothing, log_rest
    grad = torch.ops.tdkd.student_rows_backward(*given, *scale, None, None)
    assert not grad[:, 1].any()


def test_the_operator_itself_refuses_sets_of_nothing():
    """The public op does so before it, but what calls the operator is not always that."""
    x = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="k: expected an int >= 1, got 0"):
        torch.ops.tdkd.select_actions(x, 0, 1.0, 1.0, None, 1.0, torch.tensor([0, 1]), None)
