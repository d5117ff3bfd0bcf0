"""What several files of tests check alike; kernels against the reference in float64."""

import pytest
import torch

from tdkd import ops
from tdkd.kernels.student_rows import reference, student_rows
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
    # the tanh of GPU kernels is right to 1e-7, which a cap over a temperature multiplies
    cap = 0.0 if scale.softcap is None or device.type == "cpu" else scale.softcap
    assert ulps(got[0], eager[0], exact[0]) <= 2 + cap / scale.temperature
    assert ulps(got[1], eager[1], exact[1]) <= 4 + cap / scale.temperature
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
