"""TDTrainer, the LM loss and generation on a GPU, against the same on tiny models in float64."""

import copy
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("datasets")
pytest.importorskip("trl")

from test_architectures import dense_step, pair, stepped
from test_online import online_run
from test_trainer import losses, trainer

from tdkd import lm_loss
from tdkd.kernels import routes
from tdkd.models import Head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")
ON_GPU = {"use_cpu": False, "bf16": False}


@pytest.mark.parametrize("normaliser", ["exact", "batch", "sampled"])
@pytest.mark.parametrize("family", ["llama tied", "gemma2", "cohere", "phi"])
def test_a_step_is_the_dense_step(tmp_path, tiny_student, family, normaliser):
    student, teacher = pair(family)
    forced = routes.forced("sampled") if normaliser == "sampled" else nullcontext()
    with forced:
        run, before, batch = stepped(
            tmp_path,
            tiny_student,
            student,
            teacher,
            normaliser=normaliser,
            batch_vocabulary_extra=1000,
            **ON_GPU,
        )
    assert next(run.model.parameters()).is_cuda
    before, teacher = before.to(GPU), copy.deepcopy(teacher).to(GPU)
    exact = dense_step(run, before, teacher, batch, torch.float64)
    start = dict(before.named_parameters())
    for name, parameter in run.model.named_parameters():
        wanted = exact[name].detach()
        # products in float32 come to 1e-6, in TF32 to 3e-4
        error = (parameter.detach().double() - wanted).norm()
        assert error <= 1e-5 * ((wanted - start[name]).norm() + wanted.norm()), name


@pytest.mark.parametrize("lm_weight", [0.0, 0.5])
def test_mixed_precision_follows_float32(tmp_path, tiny_teacher, tiny_student, lm_weight):
    seen = []
    for mixed in (False, True):
        options = {"use_cpu": False, "bf16": mixed, "lm_weight": lm_weight, "max_steps": 4}
        run = trainer(tmp_path, tiny_teacher, tiny_student, **options)
        run.train()
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        seen.append(torch.tensor(losses(run)))
    torch.testing.assert_close(seen[1], seen[0], rtol=0.03, atol=0.0)
    assert seen[0][-1] < seen[0][0]


def test_gradient_checkpointing_and_a_compiled_body(tmp_path, tiny_teacher, tiny_student):
    options = {**ON_GPU, "max_steps": 3}
    plain = trainer(tmp_path, tiny_teacher, tiny_student, **options)
    plain.train()
    # transformers takes torch_compile as a wish for TF32, in this process from then on
    for more in ({"gradient_checkpointing": True}, {"torch_compile": True, "tf32": False}):
        run = trainer(tmp_path, tiny_teacher, tiny_student, **options, **more)
        run.train()
        assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("q_level", ["log_prob", "logit"])
def test_steps_on_own_answers(tmp_path, tiny_teacher, tiny_student, q_level):
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, max_steps=3, q_level=q_level, lmbda=0.5, **ON_GPU
    )
    run.train()
    assert torch.tensor(losses(run)).isfinite().all()


@pytest.fixture
def forget():
    for function in (lm_loss._imported, lm_loss._say):
        function.cache_clear()


KERNELS = {
    "_cut_cross_entropy": "cut_cross_entropy",
    "_liger": "liger_kernel",
    "_ops": "torch",
}


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lm_loss_of_every_kernel(kernel, softcap, dtype):
    pytest.importorskip(KERNELS[kernel])
    if kernel == "_cut_cross_entropy" and dtype == torch.float32:
        pytest.skip("takes no float32 backward")
    rows, width, vocab = 300, 256, 5003
    generator = torch.Generator(GPU).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device=GPU, generator=generator).to(dtype)

    hidden, weight = draw(rows, width), draw(vocab, width) / 8
    tokens = torch.randint(vocab, (rows,), device=GPU, generator=generator)

    def run(loss, *leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        value = loss(*leaves)
        return value.detach().view(1), *torch.autograd.grad(value, leaves)

    def plain(hidden, weight):
        z = 0.5 * F.linear(hidden, weight)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z, tokens, reduction="sum")

    got = run(
        lambda h, w: getattr(lm_loss, kernel)(h, Head(w, None, softcap, 0.5), tokens),
        hidden,
        weight,
    )
    exact = run(plain, hidden.double(), weight.double())
    for mine, wanted in zip(got, exact, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        # the products of a library in float32 may be those of TF32 within kernels of others
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.usefixtures("forget")
def test_which_kernel_is_chosen():
    hidden = torch.randn(4, 64, device=GPU, dtype=torch.bfloat16)
    head = Head(torch.randn(50, 64, device=GPU, dtype=torch.bfloat16), None, None, 1.0)
    chosen = lm_loss._kernel(hidden, head).__name__
    assert chosen == next(k for k, package in KERNELS.items() if find_spec(package))
