"""What several files of tests check alike; kernels against the reference in float64."""

import pytest
import torch

from tdkd import ops
from tdkd.kernels.student_rows import reference, student_rows
from tdkd.objectives import ForwardKL
from tdkd.testing import head_case, student_case, ulps

CPU = torch.device("cpu")


def check_refused(call, message):
    """Wrong input gets one line that begins as the pattern does, with the argument's name."""
    with pytest.raises((TypeError, ValueError), match=f"^(?:{message})") as caught:
        call()
    assert "\n" not in str(caught.value)


def check_student_rows(vocab, dtype, scale, weighted, device=CPU):
    """Values, log of the rest and gradient, of rows with and without weights."""
    case = student_case(vocab, dtype, weighted, seed=vocab)
    logits, ids, state, log_weight, grad_z, grad_rest = (
        None if x is None else x.to(device) for x in case
    )

    def run(function, logits):
        leaf = logits.clone().requires_grad_()
        wide = torch.promote_types(leaf.dtype, torch.float32)
        weight = None if log_weight is None else log_weight.to(wide)
        z, log_rest = function(leaf, ids, scale, log_weight=weight, state=state)
        z_part = torch.where(z.isfinite(), z, 0.0) * grad_z.to(z.dtype)
        rest_part = torch.where(log_rest.isfinite(), log_rest, 0.0) * grad_rest.to(z.dtype)
        (z_part.sum() + rest_part.sum()).backward()
        return z.detach(), log_rest.detach(), leaf.grad

    got = run(student_rows, logits)
    eager = run(reference.student_rows, logits)
    exact = run(reference.student_rows, logits.double())
    # a GPU's exponential and quotient, of which tanh is made, are off by some last places
    tanh = 4 if device.type == "cuda" and scale.softcap else 0
    assert ulps(got[0], eager[0], exact[0]) <= 2 + tanh
    assert ulps(got[1], eager[1], exact[1]) <= 4 + tanh
    assert got[2].dtype == dtype
    assert got[2].isfinite().all()
    error = (got[2].double() - exact[2]).abs()
    allowed = (eager[2].double() - exact[2]).abs().nan_to_num(torch.inf)
    # exp of a difference of logits, up to 100 here, carries half its last place: 100 * 2^-24
    unit = torch.finfo(dtype).eps * exact[2].abs() + 8e-6 * exact[2].abs() + 1e-37
    if dtype == torch.float16:
        unit = unit + 2**-24
    assert (error <= allowed + unit).all()
    assert not got[2][5].any()


def check_softcap(softcap, device=CPU):
    """Log-probabilities of a set, a loss and its gradient, as near as without a cap."""
    logits = 4 * torch.randn(5, 700, generator=torch.Generator().manual_seed(0)).to(device)

    def run(logits, impl):
        leaf = logits.clone().requires_grad_()
        given = {"softcap": softcap, "impl": impl}
        actions = ops.select_actions(logits, 8, **given)
        loss = ops.td_loss(
            leaf, logits, actions.ids[:, 2], objective=ForwardKL(tail=True), k=8, top_p=1.0,
            reduction="none", **given,
        ).loss  # fmt: skip
        return actions.log_probs, loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    got, wanted = run(logits, "fused"), run(logits.double(), "reference")
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-6)


def check_linear_gather_q(width, dtype, scale, device="cpu", rounded=False):
    """Values and gradients of hidden states, head and bias; rows that nobody asked for get 0.

    ``rounded``: the gradient of the logits enters products in ``dtype``, as it does where a GPU
    multiplies with the whole head. Then the error of a gradient is bound as a whole.
    """
    hidden, weight, bias, ids, grad = (x.to(device) for x in head_case(dtype, width))

    def run(impl, *leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        q = ops.linear_gather_q(
            leaves[0], leaves[1], ids, bias=leaves[2], impl=impl, **scale._asdict()
        )
        (torch.where(q.isfinite(), q, 0.0) * grad.to(q.dtype)).sum().backward()
        return q.detach(), *(x.grad for x in leaves)

    got = run("fused", hidden, weight, bias)
    eager = run("reference", hidden, weight, bias)
    exact = run("reference", hidden.double(), weight.double(), bias.double())
    assert torch.equal(got[0] == -torch.inf, ids < 0)
    # sums of up to `width` products in another order than eager's
    for i, (mine, theirs, wanted) in enumerate(zip(got, eager, exact, strict=True)):
        finite = wanted.isfinite()
        mine, theirs, wanted = (x.double()[finite] for x in (mine, theirs, wanted))
        if i and rounded:
            eps = max(torch.finfo(dtype).eps, 1e-5)
            assert (mine - wanted).norm() <= eps * wanted.norm()
            continue
        room = 2 * torch.finfo(dtype).eps * wanted.abs() + 2e-7 * width**0.5 * wanted.abs().max()
        assert ((mine - wanted).abs() <= (theirs - wanted).abs() + room).all()
    for mine, leaf in zip(got[1:], (hidden, weight, bias), strict=True):
        assert mine.dtype == leaf.dtype
    untouched = torch.ones(60, dtype=torch.bool)
    untouched[ids[ids >= 0].cpu()] = False
    assert not got[2].cpu()[untouched].any()
