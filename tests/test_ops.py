"""What the ops mean: identities of the objectives, gradients, memory, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from checks import check_refused
from torch.utils._python_dispatch import TorchDispatchMode

from tdkd import nn, ops
from tdkd.kernels import routes
from tdkd.objectives import (
    JSD,
    LK,
    LSIQ,
    SQIL,
    CrossEntropy,
    ForwardKL,
    IQLearn,
    ReverseKL,
    SkewKL,
    SoftTD,
    TotalVariation,
)
from tdkd.verify_objective import Held

V, K = 40, 6
OBJECTIVES = [
    IQLearn(),
    IQLearn("identity"),
    IQLearn(alpha=1.0, expectation="teacher"),
    IQLearn(alpha=1.0, stop_gradient="next"),
    ForwardKL(),
    ForwardKL(tail=True),
    ReverseKL(),
    ReverseKL(tail=True),
    CrossEntropy(),
    CrossEntropy(tail=True),
    ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0, stop_gradient="next"),
    *(IQLearn(phi, alpha=1.0) for phi in ("reverse_kl", "forward_kl", "hellinger", "js", "tv")),
    IQLearn("js", alpha=1.0, expectation="teacher"),
    IQLearn(alpha=1.0, value="initial"),
    LSIQ(stop_gradient=None),
    LSIQ(0.2, expert="fixed", clip=False, stop_gradient=None),
    LSIQ(),
    SQIL(stop_gradient=None),
    SQIL(),
    SoftTD(),
    SoftTD(stop_gradient=None),
    SoftTD(3, stop_gradient=None, huber=1.5),
    SoftTD(lam=0.7, stop_gradient=None),
    *(kind(tail=tail) for kind in (JSD, SkewKL, TotalVariation, LK) for tail in (False, True)),
    SkewKL(0.3, reverse=True, tail=True),
    LK("hybrid"),
    JSD(0.2, tail=True) + 0.3 * SoftTD(lam=0.5, stop_gradient=None) + IQLearn(value="initial"),
]


@pytest.fixture
def batch():
    """Student and teacher logits, tokens: two responses, a prompt, padding, an EOS (token 2)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 7, V, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(2, 7, V, generator=generator, dtype=torch.float64) * 2
    tokens = torch.randint(3, V, (2, 7), generator=generator)
    tokens[0, :2] = -100
    tokens[0, 5] = 2
    tokens[0, 6] = -100
    tokens[1, 3] = -100
    return student.requires_grad_(), teacher, tokens


@pytest.fixture
def heads():
    """Hidden states and heads (with bias) of a student and a wider teacher."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_hidden": normal(2, 7, 5).requires_grad_(),
        "student_weight": normal(V, 5).requires_grad_(),
        "bias": normal(V).requires_grad_(),
        "teacher_hidden": normal(2, 7, 8),
        "teacher_weight": normal(V, 8),
        "teacher_bias": normal(V),
    }


def gradient(output, inputs):
    return torch.autograd.grad(output.loss, inputs)


def full_policy(student, tokens):
    """Log-softmax over the vocabulary and the mask of states, flat."""
    return student.reshape(-1, V).log_softmax(-1), (tokens != -100).flatten()


# Identities


@pytest.mark.parametrize("q", ["logit", "log_prob"])
def test_full_set_without_discount_is_cross_entropy(batch, q):
    student, teacher, tokens = batch
    out = ops.td_loss(
        student, teacher, tokens, objective=IQLearn("identity"), q=q, k=V, top_p=1.0, gamma=0.0
    )
    expected = F.cross_entropy(student.view(-1, V), tokens.flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        gradient(out, student), torch.autograd.grad(expected, student), atol=1e-14, rtol=1e-10
    )


@pytest.mark.parametrize("q", ["logit", "log_prob"])
def test_without_discount_is_cross_entropy_on_the_set(batch, q):
    student, teacher, tokens = batch
    out = ops.td_loss(student, teacher, tokens, objective=IQLearn("identity"), q=q, k=K, gamma=0.0)
    masked = torch.full_like(student, -torch.inf).view(-1, V + 0)
    outside = torch.ones(tokens.numel(), V + 1, dtype=torch.bool)
    ids = out.actions.ids.long().view(-1, K)
    outside.scatter_(-1, torch.where(ids < 0, V, ids), False)
    masked = student.view(-1, V).masked_fill(outside[:, :V], -torch.inf)
    expected = F.cross_entropy(masked, tokens.flatten())
    torch.testing.assert_close(out.loss, expected)
    on_the_set = ops.td_loss(student, teacher, tokens, objective=CrossEntropy(), q=q, k=K)
    torch.testing.assert_close(on_the_set.loss, expected)


def test_teacher_expectation_without_discount_is_kl_up_to_entropy(batch):
    student, teacher, tokens = batch
    options = {"k": K, "gamma": 0.0, "reduction": "none"}
    iq = ops.td_loss(
        student, teacher, tokens, objective=IQLearn("identity", expectation="teacher"), **options
    )
    kl = ops.td_loss(student, teacher, tokens, objective=ForwardKL(), **options)
    log_w = iq.actions.log_probs - iq.actions.log_probs.logsumexp(-1, keepdim=True)
    entropy = -torch.where(iq.actions.valid, log_w.exp() * log_w, 0.0).sum(-1)
    torch.testing.assert_close(iq.loss, torch.where(tokens == -100, 0.0, kl.loss + entropy))


@pytest.mark.parametrize("expectation", ["token", "teacher"])
def test_gamma_cancels_under_identity(batch, expectation):
    student, teacher, tokens = batch
    successor = ops.successors(tokens, eos_token_id=2)
    objective = IQLearn("identity", expectation=expectation)
    known = successor != -2

    def run(gamma):
        out = ops.td_loss(
            student,
            teacher,
            tokens,
            objective=objective,
            k=K,
            gamma=gamma,
            successor=successor,
            reduction="none",
        )
        return torch.where(known, out.loss, 0.0)

    near, far = run(0.0), run(0.99)
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(
        torch.autograd.grad(near.sum(), student)[0],
        torch.autograd.grad(far.sum(), student)[0],
        atol=1e-14,
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    "objective", [IQLearn(), ForwardKL(), ReverseKL(), CrossEntropy()], ids=repr
)
def test_no_gradient_outside_the_set(batch, objective):
    student, teacher, tokens = batch
    out = ops.td_loss(
        student,
        teacher,
        tokens,
        objective=objective,
        q="logit",
        k=K,
        successor=ops.successors(tokens, eos_token_id=2),
    )
    (grad,) = gradient(out, student)
    member = torch.zeros(2, 7, V + 1, dtype=torch.bool)
    ids = out.actions.ids.long()
    member.scatter_(-1, torch.where(ids < 0, V, ids), True)
    assert grad[~member[..., :V]].abs().max() == 0
    assert grad[member[..., :V]].abs().max() > 0
    assert grad[tokens == -100].abs().max() == 0


def test_gradient_on_the_set_is_policy_and_taken_token(batch):
    """dL/dz = g_V pi_Q + g_Q: chi2, one row whose successor's V moves too."""
    student, teacher, tokens = batch
    alpha, gamma = 0.7, 0.9
    successor = ops.successors(tokens, eos_token_id=2)
    out = ops.td_loss(
        student,
        teacher,
        tokens,
        objective=IQLearn(alpha=alpha),
        q="logit",
        k=K,
        gamma=gamma,
        successor=successor,
        reduction="sum",
    )
    (grad,) = gradient(out, student)
    flat, succ = student.detach().view(-1, V), successor.flatten()
    ids = out.actions.ids.long().view(-1, K)
    z = torch.where(ids < 0, -torch.inf, flat.gather(-1, ids.clamp(min=0)))
    value = z.logsumexp(-1)
    g_value = torch.zeros(14, dtype=torch.float64)
    g_taken = torch.zeros(14, dtype=torch.float64)
    for i in range(14):
        if tokens.flatten()[i] == -100 or succ[i] == -2:
            continue
        future = gamma * value[succ[i]] if succ[i] >= 0 else 0.0
        slope = 1 - (flat[i, tokens.flatten()[i]] - future) / (2 * alpha)
        g_taken[i] -= slope
        g_value[i] += 1
        if succ[i] >= 0:
            g_value[succ[i]] += gamma * slope - gamma
    expected = torch.zeros(14, V, dtype=torch.float64)
    policy = torch.where(ids < 0, 0.0, (z - value.unsqueeze(-1)).exp()) * g_value.unsqueeze(-1)
    expected.scatter_add_(-1, ids.clamp(min=0), policy)
    expected.scatter_add_(-1, tokens.flatten().clamp(min=0).unsqueeze(-1), g_taken.unsqueeze(-1))
    torch.testing.assert_close(grad.view(-1, V), expected)


def test_tail_bucket_kl_is_the_coarse_grained_full_kl(batch):
    student, teacher, tokens = batch
    out = ops.td_loss(
        student, teacher, tokens, objective=ForwardKL(tail=True), k=K, reduction="none"
    )
    log_q, state = full_policy(student, tokens)
    log_p, _ = full_policy(teacher, tokens)
    for i in state.nonzero().flatten().tolist():
        ids = out.actions.ids.view(-1, K)[i]
        ids = ids[ids >= 0].long()
        p = torch.cat([log_p[i, ids].exp(), 1 - log_p[i, ids].exp().sum(0, keepdim=True)])
        q = torch.cat([log_q[i, ids].exp(), 1 - log_q[i, ids].exp().sum(0, keepdim=True)])
        torch.testing.assert_close(out.loss.view(-1)[i], (p * (p / q).log()).sum())


@pytest.mark.parametrize("objective", [ForwardKL(tail=True), ReverseKL(tail=True)], ids=repr)
def test_tail_bucket_on_the_full_set_is_the_full_kl(batch, objective):
    student, teacher, tokens = batch
    out = ops.td_loss(student, teacher, tokens, objective=objective, k=V, top_p=1.0)
    log_q, state = full_policy(student, tokens)
    log_p, _ = full_policy(teacher, tokens)
    if isinstance(objective, ReverseKL):
        log_p, log_q = log_q, log_p
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[state].mean()
    torch.testing.assert_close(out.loss, expected)


def test_tail_gradient_survives_a_student_that_left_no_tail():
    """Softmax minus target, finite and right, where 1 - mass is 0 in float32."""
    student = torch.tensor([[60.0, 50.0, 0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]])
    token = torch.tensor([0])
    out = ops.td_loss(student, teacher, token, objective=ForwardKL(tail=True), k=2, top_p=1.0)
    (grad,) = gradient(out, student)
    p, q = teacher.double().softmax(-1), student.detach().double().softmax(-1)
    tail = q[:, 2:] / q[:, 2:].sum()
    expected = torch.cat([q[:, :2] - p[:, :2], q[:, 2:] - p[:, 2:].sum() * tail], -1)
    torch.testing.assert_close(grad.double(), expected, atol=1e-6, rtol=1e-5)


def test_value_is_the_log_mass_of_the_student(batch):
    student, teacher, tokens = batch
    out = ops.td_loss(student, teacher, tokens, k=K)
    log_q, state = full_policy(student, tokens)
    ids = out.actions.ids.long().view(-1, K)
    inside = torch.where(ids < 0, 0.0, log_q.gather(-1, ids.clamp(min=0)).exp()).sum(-1)
    torch.testing.assert_close(out.value.flatten().exp()[state], inside[state])
    taken = log_q.gather(-1, tokens.flatten().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.q.flatten()[state], taken[state])
    assert (out.value.flatten()[~state] == 0).all()
    assert (out.q.flatten()[~state] == 0).all()


# TD targets


def test_td_lambda_return_is_the_recursion():
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    successor = torch.tensor([1, 2, -1, 4, 5, -2])
    gamma, lam = 0.9, 0.7
    expected = value.detach().clone()
    for i in reversed(range(6)):
        s = int(successor[i])
        if s == -1:
            expected[i] = reward[i]
        elif s >= 0:
            expected[i] = reward[i] + gamma * ((1 - lam) * value[s].detach() + lam * expected[s])
    got = ops.td_target(value, successor, gamma=gamma, reward=reward, lam=lam)
    torch.testing.assert_close(got, expected)
    one_step = ops.td_target(value, successor, gamma=gamma, reward=reward)
    torch.testing.assert_close(
        ops.td_target(value, successor, gamma=gamma, reward=reward, lam=0.0), one_step
    )
    assert torch.autograd.gradcheck(
        lambda v, r: ops.td_target(v, successor, gamma=gamma, reward=r, lam=lam),
        (value, reward.requires_grad_()),
    )


def test_truncated_rows_give_no_td_term(batch):
    student, teacher, tokens = batch
    successor = ops.successors(tokens, eos_token_id=2)
    options = {"k": K, "successor": successor, "reduction": "none"}
    td = ops.td_loss(student, teacher, tokens, objective=IQLearn(), **options)
    cut = (successor == -2) & (tokens != -100)
    assert cut.sum() == 2
    assert (td.loss[cut] == 0).all()
    assert (td.td_error[cut] == 0).all()
    kd = ops.td_loss(student, teacher, tokens, objective=ForwardKL(), **options)
    both = ops.td_loss(student, teacher, tokens, objective=ForwardKL() + 0.5 * IQLearn(), **options)
    torch.testing.assert_close(both.loss, kd.loss + 0.5 * td.loss)
    assert (kd.loss[cut] != 0).all()
    counted = ops.td_loss(student, teacher, tokens, k=K, successor=successor)
    torch.testing.assert_close(counted.loss, td.loss.sum() / ((tokens != -100) & ~cut).sum())


def test_stop_gradient_keeps_the_value_and_drops_the_path_through_the_successor(batch):
    student, teacher, tokens = batch
    successor = ops.successors(tokens, eos_token_id=2)
    options = {"k": K, "successor": successor, "q": "logit", "reduction": "none"}
    open_, stopped = (
        ops.td_loss(student, teacher, tokens, objective=IQLearn(stop_gradient=stop), **options)
        for stop in (None, "next")
    )
    torch.testing.assert_close(open_.loss, stopped.loss)
    # a row's loss reaches its successor's logits only where the gradient is not stopped
    row, after = (0, 2), (0, 3)
    (through,) = torch.autograd.grad(open_.loss[row], student, retain_graph=True)
    (kept,) = torch.autograd.grad(stopped.loss[row], student, retain_graph=True)
    assert through[after].abs().max() > 0
    assert kept[after].abs().max() == 0


# Linear forms


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("q", ["logit", "log_prob"])
@pytest.mark.parametrize("normaliser", ["exact", "batch"])
def test_linear_equals_dense(heads, batch, objective, q, normaliser):
    """The batch vocabulary with every column in it is exact; the options of a head are honoured."""
    tokens = batch[2]
    shared = {
        "objective": objective,
        "q": q,
        "k": K,
        "successor": ops.successors(tokens, eos_token_id=2),
        "temperature": 1.3,
        "softcap": 4.0,
        "logit_scale": 0.7,
        "teacher_softcap": 9.0,
        "teacher_temperature": 0.8,
        "vocab_size": V - 3,
    }
    tokens = tokens.clamp(max=V - 4)
    linear = ops.linear_td_loss(tokens=tokens, normaliser=normaliser, extra=V, **heads, **shared)
    leaves = [heads[name] for name in ("student_hidden", "student_weight", "bias")]
    student = heads["student_hidden"] @ heads["student_weight"].T + heads["bias"]
    teacher = heads["teacher_hidden"] @ heads["teacher_weight"].T + heads["teacher_bias"]
    dense = ops.td_loss(student, teacher, tokens, **shared)
    for got, expected in zip(linear[:4], dense[:4], strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(linear.actions.ids, dense.actions.ids)
    grads = zip(gradient(linear, leaves), gradient(dense, leaves), strict=True)
    for got, expected in grads:
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("normaliser", ["exact", "batch"])
def test_a_row_that_is_no_state_cannot_spoil_the_head(heads, batch, normaliser):
    """NaN hidden states under padding: the same loss, and a finite gradient of the head."""
    tokens = batch[2]
    generator = torch.Generator()
    options = {"k": K, "normaliser": normaliser, "extra": 4, "generator": generator}
    spoilt = heads["student_hidden"].detach().clone()
    spoilt[tokens == -100] = torch.nan
    results = []
    for hidden in (heads["student_hidden"], spoilt):
        generator.manual_seed(0)
        given = {**heads, "student_hidden": hidden}
        with routes.forced(normaliser):
            out = ops.linear_td_loss(tokens=tokens, **given, **options)
        results.append((out.loss, *gradient(out, [heads["student_weight"], heads["bias"]])))
    for clean, got in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, clean)


def test_given_actions_equal_a_live_teacher(heads, batch):
    tokens = batch[2]
    live = ops.linear_td_loss(tokens=tokens, k=K, **heads)
    student = {n: heads[n] for n in ("student_hidden", "student_weight", "bias")}
    cached = ops.linear_td_loss(tokens=tokens, actions=live.actions, **student)
    assert torch.equal(live.loss, cached.loss)


def test_batch_vocabulary_is_unbiased_in_z():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    actions = ops.linear_select_actions(hidden, weight, k=5)
    exact = ops.linear_logsumexp(hidden, weight).exp()
    draws = torch.stack(
        [
            ops.linear_logsumexp(
                hidden,
                weight,
                vocabulary=ops.batch_vocabulary(actions, 300, extra=60, generator=generator),
            ).exp()
            for _ in range(600)
        ]
    )
    standard_error = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - exact).abs() < 4 * standard_error).all()


def test_batch_vocabulary_holds_the_union_once_and_samples_the_rest(batch):
    actions = ops.select_actions(batch[1], k=K, top_p=0.8)
    vocabulary = ops.batch_vocabulary(
        actions, V, extra=4, generator=torch.Generator().manual_seed(3)
    )
    union = set(actions.ids[actions.ids >= 0].tolist())
    sure = set(vocabulary.ids[vocabulary.log_weight == 0].tolist())
    assert sure == union
    assert (
        vocabulary.ids.unique().numel()
        == vocabulary.ids.numel()
        == len(union) + min(4, V - len(union))
    )
    again = ops.batch_vocabulary(actions, V, extra=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(vocabulary.ids, again.ids)
    everything = ops.batch_vocabulary(actions, V, extra=V)
    assert everything.ids.tolist() == list(range(V))
    assert (everything.log_weight == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that one op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("normaliser", ["exact", "batch", "sampled"])
def test_linear_forms_never_hold_logits_of_all_rows(monkeypatch, normaliser, impl):
    from tdkd.kernels import head
    from tdkd.kernels.linear_rows import reference

    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4 * 1000)
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 4 * 1000)
    rows, vocab = 64, 1000
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    tokens = torch.randint(vocab, (rows,))
    with LargestTensor() as seen:
        out = ops.linear_td_loss(
            hidden,
            weight,
            tokens,
            teacher_hidden=torch.randn(rows, 4),
            teacher_weight=torch.randn(vocab, 4),
            objective=ForwardKL(tail=True) + IQLearn(),
            normaliser=normaliser,
            k=8,
            impl=impl,
        )
        out.loss.backward()
        ops.linear_logsumexp(hidden, weight, impl=impl).sum().backward()
    # a chunk of four rows, with the spare column of the mask; the head itself is as large
    assert seen.elements <= 4 * (vocab + 1)
    assert seen.elements < rows * vocab / 8


@pytest.mark.parametrize("normaliser", ["batch", "sampled"])
@pytest.mark.parametrize("law", ["student", "uniform"])
def test_given_sets_need_no_row_of_logits(law, normaliser):
    """From a cache nothing grows as rows times vocabulary: the law of the student has a bound."""
    from tdkd.kernels.batch_vocabulary.reference import LAW_LOGITS

    rows, vocab = 70, 300_000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 2, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 2, generator=generator).requires_grad_()
    ids = torch.randint(vocab // 4, (rows, 4), generator=generator) + torch.arange(4) * (vocab // 4)
    count = torch.full((rows,), 4, dtype=torch.int32)
    actions = ops.ActionSet(ids.int(), torch.full((rows, 4), 0.2).log(), count)
    with LargestTensor() as seen:
        ops.linear_td_loss(
            hidden, weight, ids[:, 0], actions=actions, normaliser=normaliser, law=law,
            objective=ForwardKL(tail=True), generator=generator,
        ).loss.backward()  # fmt: skip
    assert weight.grad.abs().sum() > 0
    # the head's gradient is as large as the head
    assert seen.elements <= max(weight.numel(), LAW_LOGITS * (law == "student"))
    assert seen.elements < rows * vocab


# Gradients in float64


def test_gradcheck_of_every_op(heads, batch):
    student, teacher, tokens = batch
    ids = ops.select_actions(teacher, K, 0.8, include=tokens.clamp(min=0)).ids
    successor = ops.successors(tokens, eos_token_id=2)
    hidden, weight, bias = (heads[n] for n in ("student_hidden", "student_weight", "bias"))
    finite = torch.isfinite

    def gathered(z):
        q = ops.gather_q(z, ids, temperature=1.5, softcap=3.0)
        return torch.where(finite(q), q, 0.0)

    def linear_gathered(h, w, b):
        q = ops.linear_gather_q(h, w, ids, bias=b, logit_scale=0.5)
        return torch.where(finite(q), q, 0.0)

    check = torch.autograd.gradcheck
    assert check(gathered, (student,))
    assert check(lambda z: ops.soft_value(ops.gather_q(z, ids)), (student,))
    assert check(linear_gathered, (hidden, weight, bias))
    assert check(lambda h, w, b: ops.linear_logsumexp(h, w, bias=b), (hidden, weight, bias))
    vocabulary = ops.batch_vocabulary(ops.select_actions(teacher, 2), V, extra=5)
    assert check(
        lambda h, w: ops.linear_logsumexp(h, w, vocabulary=vocabulary, softcap=2.0),
        (hidden, weight),
    )
    assert check(lambda v: ops.td_target(v, successor, gamma=0.9, lam=0.5), (student[..., 0],))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("q", ["logit", "log_prob"])
def test_gradcheck_of_every_objective(heads, batch, objective, q):
    student, teacher, tokens = batch
    tokens = tokens[:, 1:5]
    shared = {"q": q, "k": 4}
    shared["successor"] = ops.successors(tokens, eos_token_id=2)

    # what is detached is held constant, as the gradient has it
    held, held_linear = Held(objective), Held(objective)

    def dense(z):
        out = ops.td_loss(
            z, teacher[:, 1:5, :12], tokens % 12, objective=held, reduction="none", **shared
        )
        return out[:4]

    shared_linear = {"teacher_hidden": heads["teacher_hidden"][:, 1:5]}
    shared_linear["teacher_weight"] = heads["teacher_weight"][:12]

    def linear(h, w):
        return ops.linear_td_loss(
            h, w, tokens % 12, objective=held_linear, **shared, **shared_linear
        )[:4]

    assert torch.autograd.gradcheck(dense, (student[:, 1:5, :12],))
    hidden, weight = heads["student_hidden"][:, 1:5], heads["student_weight"][:12]
    assert torch.autograd.gradcheck(linear, (hidden, weight))


def test_per_row_gradients_are_honoured(batch):
    """A user's token weights scale each row's own gradient."""
    student, teacher, tokens = batch
    weights = torch.linspace(0.5, 2.0, 14, dtype=torch.float64).view(2, 7)
    rows = ops.td_loss(student, teacher, tokens, k=K, objective=ForwardKL(), reduction="none").loss
    (weighted,) = torch.autograd.grad((weights * rows).sum(), student, retain_graph=True)
    (plain,) = torch.autograd.grad(rows.sum(), student)
    torch.testing.assert_close(weighted, plain * weights.unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_low_precision_inputs_are_read_in_float32(batch, dtype, objective):
    """The only error is float32 arithmetic on the rounded logits: budget 1e-5 of the value."""
    student, teacher, tokens = (x.detach() for x in batch)
    student, teacher = student.to(dtype), teacher.to(dtype)
    options = {"objective": objective, "k": K, "successor": ops.successors(tokens, eos_token_id=2)}
    low = student.clone().requires_grad_()
    exact = student.double().requires_grad_()
    out = ops.td_loss(low, teacher, tokens, **options)
    reference = ops.td_loss(exact, teacher.double(), tokens, **options)
    assert out.loss.dtype == out.actions.log_probs.dtype == torch.float32
    assert torch.equal(out.actions.ids, reference.actions.ids)
    torch.testing.assert_close(out.loss.double(), reference.loss, rtol=1e-5, atol=1e-6)
    # under a loss scale, since float16 has no gradients below 6e-8
    (grad,) = torch.autograd.grad(64 * out.loss, low)
    assert grad.dtype == dtype
    (grad_exact,) = torch.autograd.grad(64 * reference.loss, exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grad.double(), grad_exact, rtol=2 * eps, atol=2e-6 * float(grad_exact.abs().max())
    )


def test_modules_bind_options(batch, heads):
    student, teacher, tokens = batch
    module = nn.TDLoss(ForwardKL(tail=True), k=K)
    assert "ForwardKL(tail=True), k=6" in repr(module)
    expected = ops.td_loss(student, teacher, tokens, objective=ForwardKL(tail=True), k=K).loss
    assert torch.equal(module(student, teacher, tokens).loss, expected)
    assert module(student, teacher, tokens, reduction="none").loss.shape == tokens.shape
    linear = nn.LinearTDLoss(k=K)
    names = ("student_hidden", "student_weight")
    rest = {n: v for n, v in heads.items() if n not in names}
    out = linear(heads[names[0]], heads[names[1]], tokens, **rest)
    assert torch.equal(out.loss, ops.linear_td_loss(tokens=tokens, k=K, **heads).loss)


def test_a_users_objective_is_a_function_of_rows(batch):
    student, teacher, tokens = batch
    out = ops.td_loss(student, teacher, tokens, k=K, objective=lambda rows: rows.taken(rows.q) ** 2)
    known = ops.successors(tokens) != -2
    torch.testing.assert_close(out.loss, out.q[known].square().mean())
    with pytest.raises(ValueError, match="objective: expected one loss a row"):
        ops.td_loss(student, teacher, tokens, objective=lambda rows: rows.q.sum())


def test_num_items_in_batch_replaces_the_count(batch):
    student, teacher, tokens = batch
    total = ops.td_loss(student, teacher, tokens, objective=ForwardKL(), reduction="sum").loss
    scaled = ops.td_loss(
        student, teacher, tokens, objective=ForwardKL(), num_items_in_batch=50
    ).loss
    torch.testing.assert_close(scaled, total / 50)
    for items in (torch.tensor(50.0, dtype=torch.float64), torch.tensor([50])):
        options = {"objective": ForwardKL(), "num_items_in_batch": items}
        loss = ops.td_loss(student.float(), teacher.float(), tokens, **options).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, (total / 50).float())


# What is refused


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


REFUSED = {
    "k_zero": (lambda: ops.select_actions(torch.zeros(2, 5), 0), "k: expected an int >= 1, got 0"),
    "k_float": (
        lambda: ops.select_actions(torch.zeros(2, 5), 2.0),
        "k: expected an int, got float",
    ),
    "top_p_zero": (lambda: ops.select_actions(torch.zeros(2, 5), top_p=0.0), "top_p: .*got 0.0"),
    "top_p_above": (lambda: ops.select_actions(torch.zeros(2, 5), top_p=1.1), "top_p: .*got 1.1"),
    "temperature": (
        lambda: ops.gather_q(torch.zeros(2, 5), ids(2, 1), temperature=0),
        "temperature: expected a finite number > 0, got 0",
    ),
    "temperature_inf": (
        lambda: ops.gather_q(torch.zeros(2, 5), ids(2, 1), temperature=float("inf")),
        "temperature: expected a finite number > 0, got inf",
    ),
    "softcap": (lambda: ops.select_actions(torch.zeros(2, 5), softcap=-1.0), "softcap: .*got -1.0"),
    "logit_scale": (
        lambda: ops.select_actions(torch.zeros(2, 5), logit_scale=0.0),
        "logit_scale: .*got 0.0",
    ),
    "logits_dtype": (
        lambda: ops.select_actions(ids(2, 5)),
        "logits: expected float64, float32, bfloat16 or float16, got int64",
    ),
    "logits_list": (lambda: ops.select_actions([[1.0]]), "logits: expected a tensor, got list"),
    "logits_scalar": (lambda: ops.select_actions(torch.tensor(1.0)), "logits: .*got a scalar"),
    "include_shape": (
        lambda: ops.select_actions(torch.zeros(2, 5), include=ids(3)),
        r"include: expected one token a position \(2,\), got \(3,\)",
    ),
    "include_range": (
        lambda: ops.select_actions(torch.zeros(2, 5), include=ids(2) + 5, check=True),
        "include: expected ids below the vocabulary's size 5, got 5",
    ),
    "vocab_size": (
        lambda: ops.select_actions(torch.zeros(2, 5), vocab_size=6),
        "vocab_size: expected 1 to 5, the columns of logits, got 6",
    ),
    "unusable_row": (
        lambda: ops.select_actions(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), check=True),
        "logits: expected rows without NaN .* got row 1 of 2",
    ),
    "ids_dtype": (
        lambda: ops.gather_q(torch.zeros(2, 5), torch.zeros(2, 1)),
        "ids: expected int32 or int64, got float32",
    ),
    "ids_shape": (
        lambda: ops.gather_q(torch.zeros(2, 5), ids(3, 1)),
        r"ids: expected \(2, k\) ids, got \(3, 1\)",
    ),
    "ids_range": (
        lambda: ops.gather_q(torch.zeros(2, 5), ids(2, 1) + 7, check=True),
        "ids: expected ids below the vocabulary's size 5, got 7",
    ),
    "gamma": (
        lambda: ops.td_target(torch.zeros(3), ids(3), gamma=1.5),
        r"gamma: expected a number in \[0, 1\], got 1.5",
    ),
    "lam": (lambda: ops.td_target(torch.zeros(3), ids(3), lam=-0.1), "lam: .*got -0.1"),
    "successor_shape": (
        lambda: ops.td_target(torch.zeros(3), ids(4)),
        r"successor: expected the shape of the rows \(3,\), got \(4,\)",
    ),
    "reward_shape": (
        lambda: ops.td_target(torch.zeros(3), ids(3), reward=torch.zeros(2)),
        r"reward: expected the shape of value \(3,\), got \(2,\)",
    ),
    "cu_seqlens": (
        lambda: ops.successors(ids(2, 4), cu_seqlens=ids(3)),
        "cu_seqlens: expected offsets",
    ),
    "vocabularies": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(2, 6), ids(2)),
        "teacher_logits: expected the student's vocabulary of 5, got 6",
    ),
    "leading_dims": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(3, 5), ids(2)),
        r"teacher_logits: expected the leading dims of student_logits \(2,\), got \(3,\)",
    ),
    "tokens_shape": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(2, 5), ids(2, 1)),
        r"tokens: expected one token a position \(2,\), got \(2, 1\)",
    ),
    "tokens_range": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(2, 5), ids(2) + 9, check=True),
        "tokens: expected ids from 0 to 4, or -100, got 9",
    ),
    "q": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(2, 5), ids(2), q="raw"),
        "q: .*got 'raw'",
    ),
    "reduction": (
        lambda: ops.td_loss(torch.zeros(2, 5), torch.zeros(2, 5), ids(2), reduction="avg"),
        "reduction: .*got 'avg'",
    ),
    "device": (
        lambda: ops.gather_q(torch.zeros(2, 5), ids(2, 1).to("meta")),
        "ids: expected a tensor on cpu, got one on meta",
    ),
    "weight_shape": (
        lambda: ops.linear_gather_q(torch.zeros(2, 4), torch.zeros(5, 3), ids(2, 1)),
        r"weight: expected \(V, 4\) to fit hidden, got \(5, 3\)",
    ),
    "bias_shape": (
        lambda: ops.linear_logsumexp(torch.zeros(2, 4), torch.zeros(5, 4), bias=torch.zeros(4)),
        r"bias: expected \(5,\) to fit weight, got \(4,\)",
    ),
    "no_teacher": (
        lambda: ops.linear_td_loss(torch.zeros(2, 4), torch.zeros(5, 4), ids(2)),
        "teacher: expected either .* got none of them",
    ),
    "half_a_teacher": (
        lambda: ops.linear_td_loss(
            torch.zeros(2, 4), torch.zeros(5, 4), ids(2), teacher_hidden=torch.zeros(2, 4)
        ),
        "teacher: expected either .* got teacher_hidden",
    ),
    "linear_vocabularies": (
        lambda: ops.linear_td_loss(
            torch.zeros(2, 4),
            torch.zeros(5, 4),
            ids(2),
            teacher_hidden=torch.zeros(2, 3),
            teacher_weight=torch.zeros(6, 3),
        ),
        "teacher_weight: expected the student's vocabulary of 5, got 6",
    ),
    "missing_member": (
        lambda: ops.linear_td_loss(
            torch.zeros(1, 4),
            torch.zeros(5, 4),
            ids(1),
            actions=ops.select_actions(torch.zeros(1, 5), 2),
            normaliser="batch",
            vocabulary=ops.Vocabulary(torch.tensor([0, 3], dtype=torch.int32), torch.zeros(2)),
        ),
        "vocabulary: expected every member .* id 1 is not in it",
    ),
    "extra": (
        lambda: ops.batch_vocabulary(ops.select_actions(torch.zeros(1, 5), 2), 5, extra=-1),
        "extra: .*got -1",
    ),
    "phi": (lambda: IQLearn("chi"), "phi: expected one of 'chi2', .*'identity', got 'chi'"),
    "alpha": (lambda: IQLearn(alpha=0.0), "alpha: expected a finite number > 0, got 0.0"),
    "expectation": (lambda: IQLearn(expectation="all"), "expectation: .*got 'all'"),
    "stop_gradient": (lambda: IQLearn(stop_gradient="v"), "stop_gradient: .*got 'v'"),
    "impl": (lambda: ops.soft_value(torch.zeros(2), impl="cuda"), "impl: .*got 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_named(name):
    check_refused(*REFUSED[name])


def test_fused_is_refused_where_no_kernel_exists():
    with pytest.raises(NotImplementedError, match="there is no kernel for float64"):
        ops.soft_value(torch.zeros(2, dtype=torch.float64), impl="fused")
    with pytest.raises(NotImplementedError, match="there is no kernel for meta"):
        ops.gather_q(
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, 1, dtype=torch.int64, device="meta"),
            impl="fused",
        )


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_level_and_a_temperature_do_not_round_log_probabilities(impl):
    """Found by `tdkd verify`: at -1000 / 1.7 float32 knows log-probabilities to 3e-5 alone, more
    than what a prefix may fall short of top_p."""
    generator = torch.Generator().manual_seed(0)
    x = (2.5 * torch.randn(20, 257, generator=generator)).bfloat16().float()
    low = (x - 1024).bfloat16().float()  # both exact
    given = {"k": 100, "top_p": 0.8, "temperature": 1.7, "impl": impl}
    got = ops.select_actions(low, **given)
    exact = ops.select_actions(low.double(), **{**given, "impl": "reference"})
    assert torch.equal(got.ids, exact.ids)
    held = got.ids >= 0
    error = (got.log_probs.double() - exact.log_probs)[held].abs().max()
    assert error < 1e-6
