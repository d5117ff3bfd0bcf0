"""Graphs of the linear TD loss used in any order, fused against the reference in float64.

Its gradients may be made in forward and multiplied in backward, or made again: what came before,
how often, and what else reads the same hidden states must not matter.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tdkd import ops
from tdkd.kernels import backends, head, routes
from tdkd.objectives import CrossEntropy, ForwardKL, IQLearn

pytestmark = pytest.mark.skipif(backends.MISSING is not None, reason=str(backends.MISSING))

OBJECTIVES = [
    ForwardKL(tail=True),
    IQLearn(alpha=1.0),
    ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0, stop_gradient="next"),
    CrossEntropy(tail=True),
]
WIDTH, VOCAB = 6, 50
EXAMPLES = 20 * int(os.environ.get("TDKD_CASES", "1"))


class Graphs(RuleBasedStateMachine):
    """Two worlds, fused float32 and reference float64, in which the same things happen."""

    outputs = Bundle("outputs")

    def __init__(self):
        super().__init__()
        self.kept = head.CHUNK_ELEMENTS["cpu"], routes.MOST_LINKS
        head.CHUNK_ELEMENTS["cpu"] = 4 * VOCAB  # four rows a chunk
        routes.MOST_LINKS = 1.0  # random chains link chunks more often than sequences do
        self.generator = torch.Generator().manual_seed(0)
        hidden, weight = self.normal(11, WIDTH), self.normal(VOCAB, WIDTH)
        self.worlds = [
            ("fused", hidden.clone().requires_grad_(), weight.clone().requires_grad_()),
            ("reference", hidden.double().requires_grad_(), weight.double().requires_grad_()),
        ]

    def teardown(self):
        head.CHUNK_ELEMENTS["cpu"], routes.MOST_LINKS = self.kept

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    @rule(
        target=outputs,
        objective=st.sampled_from(OBJECTIVES),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        normaliser=st.sampled_from(["exact", "batch"]),
        seed=st.integers(0, 1000),
    )
    def loss(self, objective, reduction, normaliser, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (11,), generator=generator)
        tokens[torch.rand(11, generator=generator) < 0.2] = -100
        order = torch.randperm(11, generator=generator)
        successor = torch.full((11,), -2)
        successor[order[:-1]] = order[1:]
        successor[order[-1]] = -1
        teacher = 3 * torch.randn(11, VOCAB, generator=generator)
        include = tokens.clamp(min=-1)
        actions = ops.select_actions(teacher, 5, 0.9, include=include, impl="reference")
        vocabulary = None
        if normaliser == "batch":
            vocabulary = ops.batch_vocabulary(actions, VOCAB, extra=4, generator=generator)
        return [
            ops.linear_td_loss(
                hidden,
                weight,
                tokens,
                actions=actions,
                successor=successor,
                objective=objective,
                reduction=reduction,
                normaliser=normaliser,
                vocabulary=vocabulary,
                impl=impl,
            )
            for impl, hidden, weight in self.worlds
        ]

    def spread(self, parts, seed, retain):
        """Backward of a random weighting of one part of an output, in both worlds."""
        for part in parts:
            generator = torch.Generator().manual_seed(seed)
            grad = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            part.backward(grad.to(part), retain_graph=retain)

    @rule(
        output=outputs,
        part=st.sampled_from(["loss", "q", "value", "td_error"]),
        seed=st.integers(0, 1000),
    )
    def backward(self, output, part, seed):
        self.spread([getattr(x, part) for x in output], seed, retain=True)

    @rule(output=consumes(outputs), seed=st.integers(0, 1000))
    def last_backward(self, output, seed):
        self.spread([x.loss for x in output], seed, retain=False)
        with pytest.raises(RuntimeError, match="second time"):
            output[0].loss.sum().backward()

    @rule(output=consumes(outputs), seed=st.integers(0, 1000))
    def backward_beside_another_use_of_hidden(self, output, seed):
        totals = [
            x.loss.sum() * 3 + x.value.sum() + hidden.square().sum()
            for x, (_, hidden, _) in zip(output, self.worlds, strict=True)
        ]
        self.spread(totals, seed, retain=False)

    @rule(output=consumes(outputs))
    def dropped(self, output):
        """A graph that nobody goes back through leaves nothing behind."""

    @rule()
    def zero_grad(self):
        for _, hidden, weight in self.worlds:
            hidden.grad = weight.grad = None

    @rule(rows=st.integers(0, 11))
    def a_call_without_grad(self, rows):
        """It takes the room that chunks of logits share."""
        _, hidden, weight = self.worlds[0]
        with torch.no_grad():
            ops.linear_select_actions(hidden[:rows], weight, 5, impl="fused")

    @invariant()
    def gradients_agree(self):
        (_, *fused), (_, *exact) = self.worlds
        for mine, wanted in zip(fused, exact, strict=True):
            assert (mine.grad is None) == (wanted.grad is None)
            if mine.grad is not None:
                error = (mine.grad.double() - wanted.grad).abs().max()
                assert error <= 3e-5 * (1 + wanted.grad.abs().max()), error


TestGraphs = Graphs.TestCase
TestGraphs.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
