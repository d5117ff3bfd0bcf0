"""The ops against a naive oracle: one row at a time, Python floats, ``sorted`` and loops."""

import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tdkd import ops
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

INF = math.inf
EOS = 2
IGNORED = -100
# few values, so that ties are the rule; all of them exist in every dtype
LOGITS = (-INF, -8.0, -2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, 7.5, 30.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEADS = ((), (0,), (1,), (4,), (2, 3), (2, 0), (2, 1, 2))
TOP_PS = st.sampled_from([0.001, 0.3, 0.5, 0.8, 0.95, 1.0]) | st.floats(0.01, 1.0)


# The same cases in every run; TDKD_CASES=20 draws twenty times as many, and others each time.
MORE = int(os.environ.get("TDKD_CASES", "0"))


def examples(count):
    return settings(
        max_examples=count * max(MORE, 1),
        derandomize=not MORE,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# The oracle


@dataclass(frozen=True)
class Head:
    """Options of a head, by their names in the ops."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __call__(self, z):
        if z == -INF:
            return -INF
        z *= self.logit_scale
        if self.softcap is not None:
            z = self.softcap * math.tanh(z / self.softcap)
        return z / self.temperature

    def slope(self, z):
        capped = 0.0 if self.softcap is None else math.tanh(z * self.logit_scale / self.softcap)
        return self.logit_scale * (1 - capped**2) / self.temperature

    @property
    def options(self):
        return vars(self)


PLAIN = Head()


def log_sum_exp(xs):
    peak = max(xs, default=-INF)
    if peak == -INF:
        return -INF
    return peak + math.log(math.fsum(math.exp(x - peak) for x in xs))


def usable(row):
    return all(not math.isnan(z) and z != INF for z in row) and any(z != -INF for z in row)


def select(row, k, top_p, head=PLAIN, include=-1):
    """Ids and log-probabilities of one row's action set."""
    if not usable(row):
        return [], []
    log_z = log_sum_exp([head(z) for z in row])
    order = sorted((i for i, z in enumerate(row) if z != -INF), key=lambda i: (-row[i], i))
    ids, before, enough = [], 0.0, top_p * (1 - 1e-5)
    for i in order[:k]:
        if top_p < 1:
            assume(abs(before - enough) > 1e-6)  # there float32 may decide either way
            if before >= enough:
                break
        ids.append(i)
        before += math.exp(head(row[i]) - log_z)
    if include >= 0 and include not in ids:
        ids = [*ids[: k - 1], include]
    return ids, [head(row[i]) - log_z for i in ids]


# Strategies


@st.composite
def layouts(draw):
    """A function from a contiguous tensor to an equal one with other strides."""

    def every_other(x):
        wide = x.new_full((*x.shape, 2), math.nan if x.is_floating_point() else -1)
        wide[..., 0] = x
        return wide[..., 0]

    def reversed_strides(x):
        order = list(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)

    def offset(x):
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)

    return draw(st.sampled_from([lambda x: x, every_other, reversed_strides, offset]))


heads = st.builds(
    Head,
    temperature=st.sampled_from([1.0, 0.5, 2.5]),
    softcap=st.sampled_from([None, None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
)


@st.composite
def matrices(draw, rows, columns, elements=LOGITS):
    return draw(hnp.arrays(np.float64, (rows, columns), elements=st.sampled_from(elements)))


@st.composite
def teachers(draw, rows, vocab):
    """Logits ``[rows, vocab]``; now and then a row that no set can be taken from."""
    logits = draw(matrices(rows, vocab))
    for row in logits:
        kind = draw(st.sampled_from(["good"] * 7 + ["nan", "+inf", "-inf"]))
        if kind == "-inf":
            row[:] = -INF
        elif kind != "good":
            row[draw(st.integers(0, vocab - 1))] = math.nan if kind == "nan" else INF
    return logits


def integers(draw, count, low, high):
    return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


def count_of(lead):
    return math.prod(lead)


def agree(got, expected, *, dtype=torch.float64):
    """Values in nats of the right shape and dtype; infinities agree exactly."""
    exact = dtype == torch.float64
    assert got.dtype == (torch.float64 if exact else torch.float32)
    expected = torch.tensor(expected, dtype=torch.float64).reshape(got.shape)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 2e-6, "atol": 2e-5}
    torch.testing.assert_close(got.detach().double(), expected, **tolerance)


def check_actions(actions, expected, k, lead, dtype):
    ids = [[*members, *[-1] * (k - len(members))] for members, _ in expected]
    assert actions.ids.dtype == actions.count.dtype == torch.int32
    assert actions.ids.shape == actions.log_probs.shape == (*lead, k)
    assert actions.count.shape == lead
    assert actions.ids.reshape(-1, k).tolist() == ids
    assert actions.count.flatten().tolist() == [len(members) for members, _ in expected]
    agree(actions.log_probs, [[*lp, *[-INF] * (k - len(lp))] for _, lp in expected], dtype=dtype)


# Sets, values, successors, targets


@examples(200)
@given(st.data())
def test_select_actions(data):
    draw = data.draw
    lead, vocab, k = draw(st.sampled_from(LEADS)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    top_p, head, layout = draw(TOP_PS), draw(heads), draw(layouts())
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(teachers(count_of(lead), vocab))
    columns = draw(st.none() | st.integers(1, vocab))
    include = None
    if draw(st.booleans()):
        include = integers(draw, count_of(lead), -2, (columns or vocab) - 1)

    expected = [
        select(row, k, top_p, head, -1 if include is None else include[i])
        for i, row in enumerate(rows[:, :columns].tolist())
    ]
    actions = ops.select_actions(
        layout(torch.from_numpy(rows).to(dtype).view(*lead, vocab)),
        k,
        top_p,
        include=None if include is None else layout(torch.tensor(include).long().view(lead)),
        vocab_size=columns,
        **head.options,
    )
    check_actions(actions, expected, k, lead, dtype)
    assert (actions.mass <= 1 + 1e-5).all()


@examples(60)
@given(st.data())
def test_check_refuses_exactly_the_rows_without_a_set(data):
    vocab = data.draw(st.integers(1, 4))
    rows = data.draw(teachers(3, vocab))
    logits = torch.from_numpy(rows)
    bad = [i for i, row in enumerate(rows.tolist()) if not usable(row)]
    if bad:
        with pytest.raises(ValueError, match=f"logits: .* got row {bad[0]} of 3"):
            ops.select_actions(logits, check=True)
    else:
        ops.select_actions(logits, check=True)


@examples(100)
@given(st.data())
def test_gather_q(data):
    """Value and gradient; an id may stand in several slots, whose gradients then add up."""
    draw = data.draw
    lead, vocab, k = draw(st.sampled_from(LEADS)), draw(st.integers(1, 6)), draw(st.integers(0, 7))
    head, layout, dtype = draw(heads), draw(layouts()), draw(st.sampled_from(DTYPES))
    rows = draw(matrices(count_of(lead), vocab, (-INF, -2.5, -0.0, 1.0, 7.5)))
    ids = np.array(integers(draw, rows.shape[0] * k, -2, vocab - 1), dtype=int)
    ids = ids.reshape(rows.shape[0], k)
    leaf = layout(torch.from_numpy(rows).to(dtype).view(*lead, vocab)).requires_grad_()
    index_type = draw(st.sampled_from([torch.int32, torch.int64]))
    q = ops.gather_q(
        leaf, layout(torch.from_numpy(ids).to(index_type).view(*lead, k)), **head.options
    )
    assert q.shape == (*lead, k)
    agree(
        q,
        [[head(row[i]) if i >= 0 else -INF for i in slots] for row, slots in zip(rows, ids)],  # noqa: B905
        dtype=dtype,
    )

    (grad,) = torch.autograd.grad(torch.where(q.isfinite(), q, 0.0).sum(), leaf)
    expected = np.zeros_like(rows)
    for i, slots in enumerate(ids):
        for j in slots:
            if j >= 0 and rows[i, j] != -INF:
                expected[i, j] += head.slope(rows[i, j])
    assert grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grad.double().view(expected.shape), torch.from_numpy(expected), rtol=4 * eps, atol=4 * eps
    )


@examples(100)
@given(st.data())
def test_soft_value(data):
    draw = data.draw
    lead, k = draw(st.sampled_from(LEADS)), draw(st.integers(0, 6))
    layout, dtype = draw(layouts()), draw(st.sampled_from(DTYPES))
    rows = draw(matrices(count_of(lead), k, (*LOGITS, -INF, -1000.0, 1000.0)))
    q = layout(torch.from_numpy(rows).to(dtype).view(*lead, k)).requires_grad_()
    value = ops.soft_value(q)
    expected = [log_sum_exp(row) for row in rows.tolist()]
    agree(value, expected, dtype=dtype)
    (grad,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), q)
    # from the row's peak: exp(x - v) would carry the rounding of v, 1e-13 at 1000
    weights = [[math.exp(x - max(row)) if max(row) != -INF else 0.0 for x in row] for row in rows]
    policy = [[w / (sum(row) or 1.0) for w in row] for row in weights]
    eps = torch.finfo(dtype).eps
    policy = torch.tensor(policy, dtype=torch.float64).view(grad.shape)
    torch.testing.assert_close(grad.double(), policy, rtol=4 * eps, atol=4 * eps)


def next_state(tokens, i, stop, eos):
    """Successor of row i in a sequence that ends before row ``stop``."""
    if tokens[i] == IGNORED:
        return -2
    if tokens[i] in eos:
        return -1
    return i + 1 if i + 1 < stop and tokens[i + 1] != IGNORED else -2


TOKENS = st.sampled_from([IGNORED, IGNORED, EOS, 3, 4, 5])


@examples(150)
@given(st.data())
def test_successors(data):
    draw = data.draw
    lead = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 2)]))
    length = draw(st.integers(0, 7))
    total = count_of(lead) * length
    tokens = draw(st.lists(TOKENS, min_size=total, max_size=total))
    eos = draw(st.sampled_from([None, EOS, [EOS, 5], torch.tensor([EOS, 5]), []]))
    ends = () if eos is None else (eos,) if isinstance(eos, int) else [int(e) for e in eos]
    expected = [next_state(tokens, i, i - i % length + length, ends) for i in range(total)]
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    batch = draw(layouts())(torch.tensor(tokens, dtype=integer).view(*lead, length))
    got = ops.successors(batch, eos_token_id=eos)
    assert got.dtype == torch.int64
    assert got.shape == batch.shape
    assert got.flatten().tolist() == expected


@examples(100)
@given(st.data())
def test_successors_of_a_packed_sequence(data):
    """Offsets may repeat (empty sequences), also at the end, as padded offsets do."""
    draw = data.draw
    tokens = draw(st.lists(TOKENS, max_size=9))
    cuts = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    offsets = [0, *cuts, len(tokens)]
    expected = []
    for i in range(len(tokens)):
        stop = min(o for o in offsets if o > i)
        expected.append(next_state(tokens, i, stop, (EOS,)))
    shape = draw(st.sampled_from([(len(tokens),), (1, len(tokens))]))
    packed = torch.tensor(tokens, dtype=torch.int64).view(shape)
    cu = torch.tensor(offsets, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    got = ops.successors(packed, cu_seqlens=cu, eos_token_id=EOS)
    assert got.shape == shape
    assert got.flatten().tolist() == expected


@st.composite
def chains(draw, rows):
    """Successors without a cycle: a later row (of several predecessors, even), -1 or -2."""
    return [draw(st.sampled_from([-1, -2, *[s for s in range(i + 1, rows)]])) for i in range(rows)]


def returns(value, successor, reward, gamma, lam):
    """TD(lambda) by recursion from the last row; lam = 0 is the one-step target."""
    target = list(value)
    for i in reversed(range(len(value))):
        s = successor[i]
        if s == -1:
            target[i] = reward[i]
        elif s >= 0:
            target[i] = reward[i] + gamma * ((1 - lam) * value[s] + lam * target[s])
    return target


@examples(100)
@given(st.data())
def test_td_target(data):
    draw = data.draw
    lead = draw(st.sampled_from(LEADS))
    rows = count_of(lead)
    value, reward = draw(matrices(2, rows, (-3.0, -1.0, 0.0, 0.5, 2.0)))
    successor = draw(chains(rows))
    gamma = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    lam = draw(st.sampled_from([None, 0.0, 0.3, 0.95, 1.0]))
    with_reward, dtype, layout = draw(st.booleans()), draw(st.sampled_from(DTYPES)), draw(layouts())
    got = ops.td_target(
        layout(torch.from_numpy(value).to(dtype).view(lead)),
        layout(torch.tensor(successor, dtype=torch.int64).view(lead)),
        gamma=gamma,
        lam=lam,
        reward=layout(torch.from_numpy(reward).to(dtype).view(lead)) if with_reward else None,
    )
    assert got.shape == lead
    rewards = reward if with_reward else np.zeros(rows)
    agree(got, returns(value, successor, rewards, gamma, lam or 0.0), dtype=dtype)


@examples(60)
@given(st.data())
def test_a_value_that_is_not_finite_reaches_its_predecessors_alone(data):
    """An empty set has V = -inf: rows whose chain does not pass it are none the worse."""
    draw = data.draw
    rows = draw(st.integers(2, 6))
    value = draw(matrices(1, rows, (-1.0, 0.5, 2.0)))[0]
    successor = draw(chains(rows))
    bad = draw(st.integers(0, rows - 1))
    lam = draw(st.sampled_from([None, 0.5, 1.0]))
    reached = {bad}
    for i in reversed(range(rows)):
        if successor[i] in reached:
            reached.add(i)
    clean = [i for i in range(rows) if i not in reached]
    expected = returns(value, successor, np.zeros(rows), 0.9, lam or 0.0)
    value[bad] = draw(st.sampled_from([-INF, math.nan]))
    leaf = torch.from_numpy(value).requires_grad_()
    got = ops.td_target(leaf, torch.tensor(successor), gamma=0.9, lam=lam)
    agree(got[clean], [expected[i] for i in clean])
    (grad,) = torch.autograd.grad(got[clean].sum(), leaf)
    assert grad.isfinite().all()
    assert grad[bad] == 0


# Losses


OBJECTIVES = (
    IQLearn("identity"),
    IQLearn(),
    IQLearn(alpha=1.0, expectation="teacher"),
    CrossEntropy(),
    CrossEntropy(tail=True),
    ForwardKL(),
    ForwardKL(tail=True),
    ReverseKL(),
    ReverseKL(tail=True),
    *(IQLearn(phi, alpha=0.7) for phi in ("reverse_kl", "forward_kl", "hellinger", "js", "tv")),
    IQLearn("js", alpha=1.0, expectation="teacher", value="initial"),
    LSIQ(stop_gradient=None),
    LSIQ(0.3, expert="fixed", clip=False, stop_gradient=None),
    SQIL(reward=0.5, stop_gradient=None),
    SoftTD(stop_gradient=None),
    SoftTD(2, stop_gradient=None, huber=0.8),
    SoftTD(lam=0.6, stop_gradient=None),
    *(kind(tail=tail) for kind in (JSD, SkewKL, TotalVariation, LK) for tail in (False, True)),
    JSD(0.2, tail=True),
    SkewKL(0.3, reverse=True),
)


PHIS = {
    "chi2": (lambda x: x - x * x / 4, -INF),
    "reverse_kl": (lambda x: 1 - math.exp(-x), math.log(0.1)),
    "forward_kl": (lambda x: math.log(1 + x), -0.9),
    "hellinger": (lambda x: x / (1 + x), 10**-0.5 - 1),
    "js": (lambda x: math.log(2 - math.exp(-x)), math.log(0.55)),
    "tv": (lambda x: min(x, 0.5), -INF),
    "identity": (lambda x: x, -INF),
}


def concave(name, x):
    """phi, which is a line of slope 10 to the left of its knee."""
    phi, knee = PHIS[name]
    if name == "tv":
        assume(abs(x - 0.5) > 1e-3)
    return phi(x) if x >= knee else phi(knee) + 10 * (x - knee)


def distance(p, q):
    """Total variation of two lists of log-probabilities, away from its kinks."""
    ps, qs = [math.exp(a) for a in p], [math.exp(b) for b in q]
    for a, b in zip(ps, qs, strict=True):
        assume(abs(a - b) > 1e-3 or a == b == 0 or min(a, b) > 1 - 1e-9)
    return math.fsum(abs(a - b) for a, b in zip(ps, qs, strict=True)) / 2


def mixed(p, q, weight):
    total = [weight * math.exp(a) + (1 - weight) * math.exp(b) for a, b in zip(p, q, strict=True)]
    return [math.log(m) if m > 0 else -INF for m in total]


def divergence(objective, p, q):
    """Of the student q to the teacher p, both log-probabilities on the set (and its tail)."""
    if isinstance(objective, ForwardKL):
        return kl(p, q)
    if isinstance(objective, ReverseKL):
        return kl(q, p)
    if isinstance(objective, JSD):
        m = mixed(p, q, objective.beta)
        return objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)
    if isinstance(objective, SkewKL):
        p, q = (q, p) if objective.reverse else (p, q)
        return kl(p, mixed(p, q, objective.alpha))
    if isinstance(objective, TotalVariation):
        return distance(p, q)
    accepted = 1 - distance(p, q)
    assume(accepted > 1e-6)
    return -math.log(accepted) if max(p) > -INF else 0.0


def lead_of(objective, i, level, successor, known, gamma, steps=None):
    """gamma D' of row i: ``level`` is D of each row."""
    if not gamma:
        return 0.0
    steps = objective.steps if steps is None else steps
    s = successor[i]
    if s == -1:
        return 0.0
    if not known[i]:
        return level[i]
    if objective.lam:
        rest = lead_of(objective, s, level, successor, known, gamma)
        return gamma * ((1 - objective.lam) * level[s] + objective.lam * rest)
    if steps == 1:
        return gamma * level[s]
    return gamma * lead_of(objective, s, level, successor, known, gamma, steps - 1)


def kl(p, q):
    return math.fsum(math.exp(a) * (a - b) if b != -INF else INF for a, b in zip(p, q) if a != -INF)  # noqa: B905


def row_loss(objective, q, log_p, taken, value, future, log_z, gamma, weight, lead):
    """One row: Q and log pi* on the set, slot of the taken token, V, gamma V', log Z - level (what
    is to be taken from Q to make it the full-vocabulary log-probability), gamma, what the row
    weighs from the first state of its response, and gamma D'."""
    if isinstance(objective, IQLearn):

        def phi(x):
            return objective.alpha * concave(objective.phi, x / objective.alpha)

        if objective.expectation == "token":
            expected = phi(q[taken] - future)
        else:
            on_set = log_sum_exp(log_p)
            expected = math.fsum(
                math.exp(lp - on_set) * phi(x - future)
                for x, lp in zip(q, log_p, strict=True)
                if lp != -INF
            )
        return (weight if objective.value == "initial" else 1) * (value - future - expected)
    if isinstance(objective, SQIL):
        return (q[taken] - objective.reward - future) ** 2
    if isinstance(objective, LSIQ):
        c, greatest = objective.c, 1 / (objective.c * (1 - gamma))
        if objective.clip:
            assume(abs(abs(future) - gamma * greatest) > 1e-3 or not gamma)
            future = max(-gamma * greatest, min(future, gamma * greatest))
        x, v = q[taken] - future, value - future
        students = v + c / 2 * v**2
        if objective.expert == "fixed":
            return students + c / 2 * (q[taken] - greatest) ** 2
        return students - x + c / 2 * x**2
    if isinstance(objective, SoftTD):
        if log_p[taken] == -INF:
            return 0.0
        error, edge = abs(q[taken] - log_p[taken] - lead), objective.huber or INF
        return error**2 if error < edge else edge * (2 * error - edge)
    if isinstance(objective, CrossEntropy):
        return (log_z if objective.tail else value) - q[taken]
    if objective.tail:
        p_rest = 1 - math.fsum(math.exp(lp) for lp in log_p)
        q_rest = 1 - math.fsum(math.exp(x - log_z) for x in q)
        # where a tail is as good as empty, its logarithm is rounding noise
        assume(all(abs(rest) < 1e-13 or rest > 1e-7 for rest in (p_rest, q_rest)))
        assume(isinstance(objective, ForwardKL) or p_rest > 1e-7 or q_rest < 1e-13)
        tail = [math.log(rest) if rest > 1e-7 else -INF for rest in (p_rest, q_rest)]
        teacher, student = [*log_p, tail[0]], [*[x - log_z for x in q], tail[1]]
    else:
        on_set = log_sum_exp(log_p)
        teacher = [lp - on_set if lp != -INF else -INF for lp in log_p]
        student = [x - value for x in q]
    return divergence(objective, teacher, student)


def td_rows(student, teacher, tokens, successor, objective, *, q, k, top_p, gamma):
    """Loss, Q, V, TD error of each row, and which rows count; None marks rows without a loss."""
    rows = range(len(tokens))
    sets = [select(teacher[i], k, top_p, include=tokens[i]) for i in rows]
    state = [tokens[i] >= 0 and bool(sets[i][0]) for i in rows]
    level = [log_sum_exp(student[i]) for i in rows]
    on_set = [
        [student[i][a] - (level[i] if q == "log_prob" else 0) for a in sets[i][0]] for i in rows
    ]
    value = [log_sum_exp(on_set[i]) if state[i] else 0.0 for i in rows]
    known = [state[i] and (s == -1 or (s >= 0 and state[s])) for i, s in enumerate(successor)]
    theirs = [log_sum_exp(sets[i][1]) for i in rows]
    excess = [v - t if state[i] and t > -INF else 0.0 for i, v, t in zip(rows, value, theirs)]  # noqa: B905
    before = {s: i for i, s in enumerate(successor) if known[i] and s >= 0}
    if objective.starts:  # one response of each row
        assume(len(before) == sum(known[i] and s >= 0 for i, s in enumerate(successor)))

    def weight_of(i):
        """From the first state of the response."""
        place = 0
        while i in before:
            i, place = before[i], place + 1
        length = 0
        while known[i] or (state[i] and gamma == 0):
            length, i = length + 1, successor[i]
            if i < 0:
                break
        return length * gamma**place / math.fsum(gamma**t for t in range(length))

    out = []
    for i in rows:
        if not state[i]:
            out.append((0.0, 0.0, 0.0, 0.0, False))
            continue
        s = successor[i]
        bootstraps = known[i] or gamma == 0
        future = gamma * value[s] if known[i] and s >= 0 else 0.0
        taken = sets[i][0].index(tokens[i])
        counts = bootstraps or not objective.bootstraps
        log_z = 0.0 if q == "log_prob" else level[i]
        loss = 0.0
        if counts:
            lead = 0.0
            if isinstance(objective, SoftTD):
                lead = lead_of(objective, i, excess, successor, known, gamma)
            loss = row_loss(
                objective, on_set[i], sets[i][1], taken, value[i], future, log_z, gamma,
                weight_of(i) if objective.starts else 0.0, lead,
            )  # fmt: skip
        delta = on_set[i][taken] - future if bootstraps else 0.0
        out.append((loss, on_set[i][taken], value[i], delta, counts))
    return out


@examples(250)
@given(st.data())
def test_td_loss(data):
    """Value of every row and reduction, and the gradient along a random direction.

    Some columns are masked (-inf) in both models; a taken token may have no teacher mass.
    """
    draw = data.draw
    lead = draw(st.sampled_from([(), (0,), (1,), (4,), (2, 3)]))
    rows, vocab = count_of(lead), draw(st.integers(1, 7))
    masked = draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab))
    assume(not all(masked))
    columns = [a for a in range(vocab) if not masked[a]]
    student = draw(matrices(rows, vocab, (-6.0, -1.0, -0.5, 0.0, 0.25, 1.5, 3.0)))
    teacher = draw(teachers(rows, vocab))
    student[:, masked] = teacher[:, masked] = -INF
    tokens = [draw(st.sampled_from([*columns, IGNORED])) for _ in range(rows)]
    successor = draw(chains(rows))
    objective = draw(st.sampled_from(OBJECTIVES))
    options = {
        "q": draw(st.sampled_from(["logit", "log_prob"])),
        "k": draw(st.integers(1, 9)),
        "top_p": draw(TOP_PS),
        "gamma": draw(st.sampled_from([0.0, 0.6, 0.99])),
    }
    layout = draw(layouts())

    def naive(student):
        return td_rows(student.tolist(), teacher.tolist(), tokens, successor, objective, **options)

    def op(reduction, **more):
        return ops.td_loss(
            leaf,
            layout(torch.from_numpy(teacher).view(*lead, vocab)),
            layout(torch.tensor(tokens, dtype=torch.int64).view(lead)),
            objective=objective,
            successor=layout(torch.tensor(successor, dtype=torch.int64).view(lead)),
            reduction=reduction,
            **options,
            **more,
        )

    leaf = layout(torch.from_numpy(student).view(*lead, vocab)).requires_grad_()
    expected = naive(student)
    per_row = op("none")
    for j, got in enumerate(per_row[:4]):
        assert got.shape == lead
        agree(got, [row[j] for row in expected])
    losses, counted = [row[0] for row in expected], sum(row[4] for row in expected)
    assume(all(math.isfinite(loss) for loss in losses))
    agree(op("sum").loss, math.fsum(losses))
    agree(op("mean").loss, math.fsum(losses) / max(1, counted))
    agree(op("mean", num_items_in_batch=7).loss, math.fsum(losses) / 7)

    (grad,) = torch.autograd.grad(per_row.loss.sum(), leaf)
    assert grad.isfinite().all()
    assert (grad.view(student.shape)[:, masked] == 0).all()
    step = 1e-5 * np.random.default_rng(0).standard_normal(student.shape)
    up, down = (math.fsum(row[0] for row in naive(student + sign * step)) for sign in (1, -1))
    along = float((grad.view(student.shape) * torch.from_numpy(step)).sum())
    assert along == pytest.approx((up - down) / 2, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_set_without_teacher_mass_gives_no_nan(objective):
    """k = 1, and the taken token, which is the set, has logit -inf at the teacher."""
    student = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 0.0], [0.0, 1.0, 0.0]])
    successor = torch.tensor([1, -1])
    options = {"objective": objective, "k": 1, "successor": successor, "reduction": "none"}
    out = ops.td_loss(student, teacher, torch.tensor([1, 0]), **options)
    assert not out.loss.isnan().any()
    (grad,) = torch.autograd.grad(out.loss.sum(), student, retain_graph=True)
    assert grad[1].isfinite().all()
    if out.loss[0].isfinite():
        (grad,) = torch.autograd.grad(out.loss[0], student)
        assert grad.isfinite().all()


@examples(60)
@given(st.data())
def test_a_row_without_a_set_equals_a_row_that_is_no_state(data):
    """A teacher row with NaN, +inf or nothing finite: the same loss and gradient elsewhere."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    student, teacher = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(8, (6,), generator=generator)
    successor = ops.successors(tokens, eos_token_id=EOS)
    bad = draw(st.integers(0, 5))
    spoilt, ignored = teacher.clone(), tokens.clone()
    spoilt[bad, draw(st.integers(0, 7)) :] = draw(st.sampled_from([math.nan, INF]))
    if draw(st.booleans()):
        spoilt[bad] = -INF
    ignored[bad] = IGNORED
    student.requires_grad_()
    options = {"objective": draw(st.sampled_from(OBJECTIVES)), "k": 3, "successor": successor}
    out = ops.td_loss(student, spoilt, tokens, **options)
    reference = ops.td_loss(student, teacher, ignored, **options)
    torch.testing.assert_close(out[:4], reference[:4])
    grads = (torch.autograd.grad(o.loss, student)[0] for o in (out, reference))
    torch.testing.assert_close(*grads)


class Batch:
    """Sequences of unequal length, with prompts, turns and EOS, and models over two widths."""

    WIDTHS = (3, 4)
    VOCAB = 11

    def __init__(self, draw):
        self.sequences = draw(
            st.lists(st.lists(TOKENS | st.integers(0, 10), min_size=1, max_size=6), min_size=1,
                     max_size=4)
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        self.hidden = [[self.normal(len(s), w) for s in self.sequences] for w in self.WIDTHS]
        self.weights = [self.normal(self.VOCAB, w) for w in self.WIDTHS]

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def one_at_a_time(self):
        for i, sequence in enumerate(self.sequences):
            tokens = torch.tensor(sequence)
            yield tokens, ops.successors(tokens, eos_token_id=EOS), [h[i] for h in self.hidden]

    def padded(self, side):
        """Rows ``[B, T]`` with junk beside the sequences, and where the sequences are in them."""
        length = max(map(len, self.sequences)) + 1
        tokens = torch.full((len(self.sequences), length), IGNORED)
        hidden = [self.normal(*tokens.shape, w) for w in self.WIDTHS]
        place = []
        for i, sequence in enumerate(self.sequences):
            start = 0 if side == "right" else length - len(sequence)
            here = slice(start, start + len(sequence))
            tokens[i, here] = torch.tensor(sequence)
            for whole, parts in zip(hidden, self.hidden, strict=True):
                whole[i, here] = parts[i]
            place += range(i * length + here.start, i * length + here.stop)
        return tokens, ops.successors(tokens, eos_token_id=EOS), hidden, place

    def packed(self, *lead):
        tokens = torch.tensor(sum(self.sequences, [])).view(*lead, -1)
        offsets = np.cumsum([0, *map(len, self.sequences)])
        successor = ops.successors(tokens, cu_seqlens=torch.from_numpy(offsets), eos_token_id=EOS)
        hidden = [torch.cat(parts).view(*lead, tokens.numel(), -1) for parts in self.hidden]
        return tokens, successor, hidden, list(range(tokens.numel()))


@examples(60)
@given(st.data())
@pytest.mark.parametrize("form", ["dense", "exact", "batch"])
def test_packing_equals_padding_equals_one_sequence_at_a_time(form, data):
    """Rows, sums, means and gradients (hidden states and head), of logits and of linear forms.

    ``batch`` samples every column there is, so that its normaliser is exact.
    """
    draw = data.draw
    batch = Batch(draw)
    objective = draw(
        st.sampled_from([*OBJECTIVES, ForwardKL(tail=True) + 0.1 * IQLearn(stop_gradient="next")])
    )
    options = {
        "objective": objective,
        "q": draw(st.sampled_from(["logit", "log_prob"])),
        "k": draw(st.integers(1, 12)),
        "top_p": draw(st.sampled_from([0.5, 0.9, 1.0])),
    }

    def run(tokens, successor, hidden, reduction):
        student, teacher = hidden[0].clone().requires_grad_(), hidden[1]
        weight = batch.weights[0].clone().requires_grad_()
        if form == "dense":
            out = ops.td_loss(
                student @ weight.T, teacher @ batch.weights[1].T, tokens,
                successor=successor, reduction=reduction, **options,
            )  # fmt: skip
        else:
            out = ops.linear_td_loss(
                student, weight, tokens, teacher_hidden=teacher, teacher_weight=batch.weights[1],
                successor=successor, reduction=reduction, normaliser=form, extra=batch.VOCAB,
                **options,
            )  # fmt: skip
        g_student, g_weight = torch.autograd.grad(out.loss.sum(), [student, weight])
        return out, g_student.view(-1, batch.WIDTHS[0]), g_weight

    alone = [run(*sequence, "none") for sequence in batch.one_at_a_time()]
    expected = [torch.cat([out[j] for out, _, _ in alone]) for j in range(4)]
    g_rows = torch.cat([g for _, g, _ in alone])
    g_weight = sum(g for _, _, g in alone)
    same = {"rtol": 1e-9, "atol": 1e-11}
    means = []
    for *arguments, place in (
        batch.padded("right"),
        batch.padded("left"),
        batch.packed(),
        batch.packed(1),
    ):
        out, g_hidden, g_head = run(*arguments, "none")
        for got, wanted in zip(out[:4], expected, strict=True):
            torch.testing.assert_close(got.flatten()[place], wanted, **same)
        torch.testing.assert_close(out.loss.sum(), expected[0].sum(), **same)
        torch.testing.assert_close(g_hidden[place], g_rows, **same)
        torch.testing.assert_close(g_hidden.sum(0), g_rows.sum(0), **same)
        torch.testing.assert_close(g_head, g_weight, **same)
        means.append(run(*arguments, "mean")[0].loss)
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], **same)


def test_rows_that_are_no_states_have_no_say_in_the_batch_vocabulary():
    """Padding must not decide which columns estimate log Z."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 60, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(60, (8,), generator=generator)
    tokens[3:] = IGNORED

    def loss(teacher_hidden):
        return ops.linear_td_loss(
            hidden[0], weight[0], tokens, teacher_hidden=teacher_hidden, teacher_weight=weight[1],
            objective=ForwardKL(tail=True), normaliser="batch", extra=5, k=4,
            generator=torch.Generator().manual_seed(1),
        ).loss  # fmt: skip

    other = hidden[1].clone()
    other[3:] = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(loss(hidden[1]), loss(other))


# Linear forms: small integers, whose products every dtype holds exactly


@st.composite
def linear_heads(draw, rows):
    vocab, width = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    small = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
    hidden, weight = draw(matrices(rows, width, small)), draw(matrices(vocab, width, small))
    bias = draw(st.none() | matrices(1, vocab, (-INF, -1.0, 0.0, 2.0)))
    logits = hidden @ weight.T + (0.0 if bias is None else bias[0])
    return hidden, weight, None if bias is None else bias[0], logits


LINEAR_LEADS = tuple(lead for lead in LEADS if lead)


@examples(120)
@given(st.data())
def test_linear_forms(data):
    draw = data.draw
    lead = draw(st.sampled_from(LINEAR_LEADS))
    hidden, weight, bias, logits = draw(linear_heads(count_of(lead)))
    vocab = weight.shape[0]
    head, layout, dtype = draw(heads), draw(layouts()), draw(st.sampled_from(DTYPES))
    k, top_p = draw(st.integers(1, 10)), draw(TOP_PS)
    columns = draw(st.none() | st.integers(1, vocab))
    include = integers(draw, logits.shape[0], -1, (columns or vocab) - 1)

    def tensor(x):
        return layout(torch.from_numpy(x).to(dtype))

    h, w = (
        tensor(hidden.reshape(*lead, -1) if hidden.size else np.zeros((*lead, hidden.shape[1]))),
        tensor(weight),
    )
    options = {"bias": None if bias is None else tensor(bias), **head.options}
    actions = ops.linear_select_actions(
        h, w, k, top_p, include=torch.tensor(include).long().view(lead), vocab_size=columns,
        **options,
    )  # fmt: skip
    cut = logits[:, :columns].tolist()
    expected = [select(row, k, top_p, head, token) for row, token in zip(cut, include, strict=True)]
    check_actions(actions, expected, k, lead, dtype)

    q = ops.linear_gather_q(h, w, actions.ids, **options)
    members = actions.ids.reshape(-1, k).tolist()
    agree(
        q,
        [
            [head(row[i]) if i >= 0 else -INF for i in ids]
            for row, ids in zip(logits.tolist(), members, strict=True)
        ],
        dtype=dtype,
    )
    log_z = ops.linear_logsumexp(h, w, vocab_size=columns, **options)
    assert log_z.shape == lead
    agree(log_z, [log_sum_exp([head(z) for z in row]) for row in cut], dtype=dtype)

    vocabulary = ops.batch_vocabulary(actions, vocab, extra=draw(st.integers(0, 4)))
    estimate = ops.linear_logsumexp(h, w, vocabulary=vocabulary, **options)
    pairs = list(zip(vocabulary.ids.tolist(), vocabulary.log_weight.tolist(), strict=True))
    agree(
        estimate,
        [log_sum_exp([head(row[i]) + lw for i, lw in pairs]) for row in logits.tolist()],
        dtype=dtype,
    )


def test_linear_forms_take_one_row_without_leading_dims():
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 4, generator=generator)
    weight = torch.randn(9, 4, generator=generator)
    actions = ops.linear_select_actions(teacher, weight, k=3)
    assert actions.ids.shape == (3,)
    assert actions.count.shape == ()
    assert ops.linear_gather_q(hidden, weight, actions.ids).shape == (3,)
    assert ops.linear_logsumexp(hidden, weight).shape == ()
    out = ops.linear_td_loss(
        hidden, weight, torch.tensor(1), teacher_hidden=teacher, teacher_weight=weight,
        objective=ForwardKL(),
    )  # fmt: skip
    dense = ops.td_loss(
        hidden @ weight.T, teacher @ weight.T, torch.tensor(1), objective=ForwardKL()
    )
    torch.testing.assert_close(out.loss, dense.loss)


@examples(80)
@given(st.data())
def test_batch_vocabulary(data):
    draw = data.draw
    vocab, extra = draw(st.integers(1, 12)), draw(st.integers(0, 14))
    lead = draw(st.sampled_from(LEADS))
    k = draw(st.integers(1, 4))
    ids = integers(draw, count_of(lead) * k, -1, vocab - 1)
    shaped = torch.tensor(ids, dtype=torch.int32).view(*lead, k)
    actions = ops.ActionSet(shaped, torch.zeros(*lead, k), torch.zeros(lead, dtype=torch.int32))
    seed = draw(st.integers(0, 9))

    def vocabulary():
        generator = torch.Generator().manual_seed(seed)
        return ops.batch_vocabulary(actions, vocab, extra=extra, generator=generator)

    got = vocabulary()
    members = {i for i in ids if i >= 0}
    columns = got.ids.tolist()
    assert got.ids.dtype == torch.int32
    assert got.log_weight.dtype == torch.float32
    assert columns == sorted(set(columns))
    assert members <= set(columns) <= set(range(vocab))
    rest = vocab - len(members)
    sampled = min(extra, rest)
    assert len(columns) == len(members) + sampled
    for column, log_weight in zip(columns, got.log_weight.tolist(), strict=True):
        weight = 0.0 if column in members else math.log(rest / sampled)
        assert log_weight == pytest.approx(weight, abs=1e-6)
    assert torch.equal(got.ids, vocabulary().ids)
    if members and max(members):
        with pytest.raises(ValueError, match=f"actions: .* size {max(members)}, got"):
            ops.batch_vocabulary(actions, max(members), extra=0)
