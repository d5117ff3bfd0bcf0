"""What Q is: levels that are free, fixed, shifted, or learned."""

import pytest
import torch

from tdkd import ops
from tdkd.objectives import ForwardKL, IQLearn, SoftTD

N, V, K, H = 7, 30, 5, 6
SUCCESSOR = torch.tensor([1, 2, -1, 4, 5, -2, -1])
GAMMA = 0.9
LEARNED = [
    IQLearn(alpha=1.0),
    ForwardKL(tail=True) + 0.1 * SoftTD(stop_gradient=None),
]


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((N, H), (V, H), (N, V))
    )
    tokens = torch.randint(V, (N,), generator=generator)
    tokens[5] = -100
    return (4 * hidden).requires_grad_(), weight.requires_grad_(), teacher, tokens


def options(**more):
    return {"successor": SUCCESSOR, "k": K, "gamma": GAMMA, **more}


def test_shifted_is_the_logit_less_the_largest_of_the_set_and_no_less_than_ten():
    hidden, weight, teacher, tokens = make()
    logits = hidden @ weight.T
    out = ops.td_loss(logits, teacher, tokens, objective=IQLearn(), q="shifted", **options())
    loss = 0.0
    q, v = torch.zeros(N), torch.zeros(N)
    for i in [j for j in range(N) if j != 5]:
        ids = out.actions.ids[i][out.actions.ids[i] >= 0].long()
        z = (logits[i, ids] - logits[i, ids].max()).clamp(min=-10)
        q[i] = z[(ids == tokens[i]).nonzero()[0, 0]]
        v[i] = z.logsumexp(0)
    for i in (0, 1, 2, 3, 6):
        ahead = GAMMA * v[SUCCESSOR[i]] if SUCCESSOR[i] >= 0 and SUCCESSOR[i] != 5 else 0.0
        x = q[i] - ahead
        loss = loss - (x - x * x / 0.4) + v[i] - ahead
    assert (q < -9.9).any()  # one is cut off
    torch.testing.assert_close(out.q.float(), q)
    torch.testing.assert_close(out.value.float(), v)
    torch.testing.assert_close(out.loss.float(), loss / 5)


def test_shifted_does_not_know_the_level():
    hidden, weight, teacher, tokens = make()
    logits = (hidden @ weight.T).detach()
    given = options(objective=IQLearn(), q="shifted")
    one = ops.td_loss(logits, teacher, tokens, **given)
    other = ops.td_loss(logits + torch.arange(N)[:, None], teacher, tokens, **given)
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize("q", ["log_prob", "logit", "shifted"])
@pytest.mark.parametrize(
    "objective", [IQLearn(alpha=1.0), ForwardKL(tail=True) + 0.1 * SoftTD(stop_gradient=None)]
)
def test_a_value_head_adds_to_every_q_of_its_row(q, objective):
    hidden, weight, teacher, tokens = make()
    head = torch.randn(H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = options(objective=objective, q=q)
    plain = ops.td_loss(hidden @ weight.T, teacher, tokens, **given)
    v = hidden.detach() @ head
    out = ops.td_loss(hidden @ weight.T, teacher, tokens, state_value=v, **given)
    state = tokens != -100
    torch.testing.assert_close(out.q, torch.where(state, plain.q + v, 0.0))
    torch.testing.assert_close(out.value, torch.where(state, plain.value + v, 0.0))
    none = ops.td_loss(
        hidden @ weight.T, teacher, tokens, state_value=torch.zeros(N).double(), **given
    )
    torch.testing.assert_close(none.loss, plain.loss)

    def loss(head):
        return ops.td_loss(
            (hidden @ weight.T).detach(),
            teacher,
            tokens,
            state_value=hidden.detach() @ head,
            **given,
        ).loss

    assert torch.autograd.gradcheck(loss, head.requires_grad_())


@pytest.mark.parametrize("q", ["log_prob", "logit", "shifted"])
def test_the_mass_on_the_set_is_the_same_at_every_level(q):
    hidden, weight, teacher, tokens = make()
    logits = (hidden @ weight.T).detach().requires_grad_()
    v = torch.linspace(-3, 3, N, dtype=torch.float64)
    given = options(objective=ForwardKL(tail=True), q=q, state_value=v)
    out = ops.td_loss(logits, teacher, tokens, **given)
    log_p = logits.log_softmax(-1)
    held = [row[row >= 0].long() for row in out.actions.ids]
    expected = torch.stack([log_p[i, ids].logsumexp(0) for i, ids in enumerate(held)])
    expected[5] = 0  # no state
    torch.testing.assert_close(out.log_mass, expected.detach())
    assert not out.log_mass.requires_grad
    assert ops.td_loss(logits, teacher, tokens, objective=ForwardKL(), q="logit").log_mass is None


def test_imitation_does_not_see_it():
    hidden, weight, teacher, tokens = make()
    given = options(objective=ForwardKL(tail=True))
    logits = hidden @ weight.T
    v = torch.full((N,), 3.0, dtype=torch.float64, requires_grad=True)
    out = ops.td_loss(logits, teacher, tokens, state_value=v, **given)
    torch.testing.assert_close(out.loss, ops.td_loss(logits, teacher, tokens, **given).loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, v)[0], torch.zeros(N).double())


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("q", ["log_prob", "shifted"])
def test_linear_and_dense_agree(q, impl):
    hidden, weight, teacher, tokens = make(torch.float32)
    v = (hidden.detach() @ torch.ones(H)).requires_grad_()
    given = options(objective=ForwardKL(tail=True) + 0.1 * IQLearn(), q=q)
    results = []
    actions = ops.select_actions(teacher, K, 0.8, include=tokens.clamp(min=-1))
    for value in (None, v):
        dense = ops.td_loss(hidden @ weight.T, teacher, tokens, state_value=value, **given)
        linear = ops.linear_td_loss(
            hidden, weight, tokens, actions=actions, state_value=value, impl=impl,
            **{name: given[name] for name in ("objective", "q", "successor", "gamma")},
        )  # fmt: skip
        leaves = (hidden, weight) if value is None else (hidden, weight, v)
        for out in (dense, linear):
            results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
        for one, other in zip(*results[-2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    hidden, weight, teacher, tokens = make()
    logits = hidden @ weight.T
    with pytest.raises(ValueError, match=r"state_value: expected .*\(7,\)"):
        ops.td_loss(logits, teacher, tokens, state_value=torch.zeros(3))
    with pytest.raises(TypeError, match="state_value: expected"):
        ops.td_loss(logits, teacher, tokens, state_value=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match='q: expected one of "log_prob", "logit", "shifted"'):
        ops.td_loss(logits, teacher, tokens, q="value")
