"""The LM loss: its value and gradients, the choice of kernel, and what each kernel is given."""

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from tdkd import lm_loss
from tdkd.kernels import head as products
from tdkd.lm_loss import lm_cross_entropy
from tdkd.models import Head
from tdkd.testing import peak_bytes

LIGER = "liger_kernel.transformers.functional"


def case(dtype=torch.float32, *, softcap=None, bias=True, rows=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    head = Head(draw(11, 4), draw(11) if bias else None, softcap, 0.5)
    return draw(rows, 4), head, torch.randint(11, (rows,), generator=generator)


def plain(hidden, head, tokens):
    z = F.linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.softcap:
        z = head.softcap * torch.tanh(z / head.softcap)
    return F.cross_entropy(z, tokens, reduction="sum")


def leaves(hidden, head):
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


@pytest.fixture(autouse=True)
def forget():
    for function in (lm_loss._imported, lm_loss._say):
        function.cache_clear()
    yield
    for function in (lm_loss._imported, lm_loss._say):
        function.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_is_cross_entropy_of_the_head(monkeypatch, softcap, bias):
    monkeypatch.setitem(products.CHUNK_ELEMENTS, "cpu", 4 * 11)
    hidden, head, tokens = case(softcap=softcap, bias=bias)
    loss, expected = lm_cross_entropy(hidden, head, tokens), plain(hidden, head, tokens)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, leaves(hidden, head)),
        torch.autograd.grad(expected, leaves(hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_low_precision_is_computed_in_float32(softcap):
    """The loss is that of the rounded operands in float32: rounding shows in gradients alone."""
    hidden, head, tokens = case(torch.bfloat16, softcap=softcap)
    loss = lm_cross_entropy(hidden, head, tokens)
    wide = head._replace(weight=head.weight.float(), bias=head.bias.float())
    torch.testing.assert_close(loss, plain(hidden.float(), wide, tokens))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_holds_one_chunk_of_logits_and_one_gradient_of_the_head(softcap):
    rows, columns, width = 512, 60_000, 32
    chunk = 4 * products.CHUNK_ELEMENTS["cpu"]
    assert 4 * rows * columns > 2 * chunk
    weight = torch.randn(columns, width, requires_grad=True)
    hidden = torch.randn(rows, width, requires_grad=True)
    tokens = torch.arange(rows)
    given = Head(weight, None, softcap, 1.0)

    def run():
        return torch.autograd.grad(lm_cross_entropy(hidden, given, tokens), (hidden, weight))

    run()
    assert peak_bytes(run, torch.device("cpu")) < chunk + 1.5 * (hidden.nbytes + weight.nbytes)


def test_no_rows_are_a_zero():
    hidden, head, tokens = case(rows=0)
    loss = lm_cross_entropy(hidden, head, tokens)
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


class Cuda:
    """What the choice asks of hidden states, as a tensor on a GPU would answer."""

    is_cuda = True

    def __init__(self, dtype=torch.bfloat16, rows=6):
        self.dtype, self.shape = dtype, (rows, 4)


def cce_main(
    e, c, targets, bias=None, softcap=None, reduction="mean", accum_e_fp32=False, accum_c_fp32=False
):
    """Takes what the development version takes, and remembers it."""
    cce_main.seen = locals()
    cce_main.under_autocast = torch.is_autocast_enabled("cuda")
    return (e.sum() + c.sum()).float()


def cce_release(e, c, targets, ignore_index=-100, softcap=None, reduction="mean"):
    """Takes what the release on PyPI takes, and remembers it."""
    cce_release.seen = locals()
    return (e.sum() + c.sum()).float()


def liger(input, weight, target, bias=None, softcap=None, reduction="mean", accum_dtype=None):
    liger.seen = locals()
    liger.under_autocast = torch.is_autocast_enabled("cuda")
    return (input.sum() + weight.sum()).float()


def install(monkeypatch, *, cce=None, liger=None, ampere=True):
    """Puts fake modules, or None for one that is missing, where imports look."""
    fakes = {"cut_cross_entropy": ("linear_cross_entropy", cce)}
    fakes[LIGER] = ("liger_fused_linear_cross_entropy", liger)
    for module, (name, function) in fakes.items():
        fake = None
        if function is not None:
            fake = types.ModuleType(module)
            setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)
    if liger is not None:
        for parent in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: ampere)


CHOICES = {
    "cce first": ({"cce": cce_main, "liger": liger}, {}, {}, "_cut_cross_entropy"),
    "cce with a bias": ({"cce": cce_main}, {}, {"bias": True}, "_cut_cross_entropy"),
    "no bias in the release": (
        {"cce": cce_release, "liger": liger},
        {},
        {"bias": True},
        "_liger",
    ),
    "release": ({"cce": cce_release, "liger": liger}, {}, {}, "_cut_cross_entropy"),
    "float32": ({"cce": cce_main, "liger": liger}, {"dtype": torch.float32}, {}, "_liger"),
    "old GPU": ({"cce": cce_main, "liger": liger, "ampere": False}, {}, {}, "_liger"),
    "float64": ({"cce": cce_main, "liger": liger}, {"dtype": torch.float64}, {}, "_ops"),
    "no rows": ({"cce": cce_main, "liger": liger}, {"rows": 0}, {}, "_ops"),
    "softcap": ({"liger": liger}, {}, {"softcap": 2.0}, "_liger"),
    "nothing": ({}, {}, {}, "_ops"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_on_a_gpu(monkeypatch, caplog, name):
    installed, rows, head, expected = CHOICES[name]
    install(monkeypatch, **installed)
    _, head, _ = case(**{"bias": False, **head})
    with caplog.at_level(logging.INFO, logger="tdkd"):
        chosen = [lm_loss._kernel(Cuda(**rows), head) for _ in range(2)]
    assert [kernel.__name__ for kernel in chosen] == [expected] * 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_autocast_makes_the_choice_where_states_and_weights_are_float32(
    monkeypatch, autocast, mixed
):
    install(monkeypatch, cce=cce_main, liger=liger)
    hidden, head, tokens = case(bias=False)
    assert lm_loss._kernel(Cuda(torch.float32), head) is lm_loss._liger
    autocast(mixed)
    assert lm_loss._kernel(Cuda(torch.float32), head) is lm_loss._cut_cross_entropy
    seen = []
    for kernel, names in (
        (lm_loss._cut_cross_entropy, "ec"),
        (lm_loss._liger, ("input", "weight")),
    ):
        kernel(hidden, head, tokens).backward()
        function = cce_main if kernel is lm_loss._cut_cross_entropy else liger
        seen += [function.seen[name].dtype for name in names]
        # the operands are made for it: nothing is cast again within
        assert not function.under_autocast
    assert set(seen) == {mixed}
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


def test_a_cpu_never_takes_a_gpu_kernel(monkeypatch):
    install(monkeypatch, cce=cce_main, liger=liger)
    hidden, head, tokens = case(torch.bfloat16)
    assert lm_loss._kernel(hidden, head) is lm_loss._ops


@pytest.mark.parametrize("function", [cce_main, cce_release])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_cut_cross_entropy_is_given(monkeypatch, function, softcap):
    install(monkeypatch, cce=function)
    hidden, head, tokens = case(torch.bfloat16, softcap=softcap, bias=function is cce_main)
    # master weights in float32, hidden states from autocast
    head = head._replace(weight=head.weight.detach().float().requires_grad_())
    lm_loss._cut_cross_entropy(hidden, head, tokens).backward()
    seen = function.seen
    assert seen["e"].dtype == seen["c"].dtype == torch.bfloat16
    torch.testing.assert_close(seen["e"], hidden * 0.5)
    torch.testing.assert_close(seen["c"].float(), head.weight)
    assert seen["targets"] is tokens
    assert seen["softcap"] == softcap
    assert seen["reduction"] == "sum"
    assert head.weight.grad.dtype == torch.float32
    if function is cce_main:
        torch.testing.assert_close(seen["bias"], head.bias * 0.5)
        assert seen["accum_e_fp32"]
        assert seen["accum_c_fp32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_liger_is_given(monkeypatch, dtype):
    install(monkeypatch, liger=liger)
    hidden, head, tokens = case(dtype, softcap=2.0)
    lm_loss._liger(hidden, head, tokens).backward()
    seen = liger.seen
    assert seen["input"].dtype == seen["weight"].dtype == dtype
    torch.testing.assert_close(seen["input"], hidden * 0.5)
    torch.testing.assert_close(seen["weight"], head.weight)
    torch.testing.assert_close(seen["bias"], head.bias * 0.5)
    assert seen["target"] is tokens
    assert (seen["softcap"], seen["reduction"]) == (2.0, "sum")
    assert seen["accum_dtype"] == torch.float32
    assert hidden.grad.any()


def test_liger_takes_what_it_is_given():
    """The installed signature, since the kernel itself needs a GPU."""
    functional = pytest.importorskip(LIGER)
    import inspect

    real = inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
    assert set(inspect.signature(liger).parameters) <= set(real)
