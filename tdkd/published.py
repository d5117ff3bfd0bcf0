"""The loss that the paper's authors published, as one dense reference.

No kernel and no objective to train with: it shows what the published code computes, so that a
result of it can be compared with ours. docs/published_code.md says where the two part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdkd.ops import select_actions

FLOOR = -10.0
"""Lowest Q that the published code knows, nats below the row's maximum."""


def published_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    *,
    top_p: float = 0.8,
    epsilon: float = 1e-5,
    temperature: float = 1.0,
    chi2: bool = True,
    gamma: float = 0.99,
    alpha: float = 0.1,
    pad_token_id: int,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Loss of the code published with arXiv 2505.20335, value and gradient.

    With A the teacher's top-p set, V the vocabulary, and m = 1 on tokens that are not padding::

        Q(a)  = max(z(a)/T - max z/T, -10)                            a in V
        pi(a) ~ softmax_V(Q)(a) [a in A] / top_p + epsilon            normalised over V
        value = m sum_V pi(a) (Q(a) - log pi(a))
        L     = value - gamma value' - mean_V phi(m [a in A] Q(a) - gamma value')

    with ``phi(x) = x - x^2 / (4 alpha)``, or ``phi(x) = x`` without ``chi2``. Value' is the next
    column's. L is summed over all columns but the last and divided by the number of tokens there
    that are not padding.

    It departs from the paper's objective (:class:`tdkd.objectives.IQLearn`) in nine ways:

    1. Q is shifted by the row's maximum: a state keeps no level of its own.
    2. Q is cut off at -10 below that maximum: no gradient there, and -inf logits gain mass.
    3. The value is ``E_pi[Q - log pi]`` under a policy that ``epsilon`` smooths over the whole
       vocabulary, in place of ``logsumexp_A Q`` (to which it tends as epsilon goes to 0).
    4. Before the smoothing the policy on the set is divided by ``top_p``, not by the student's own
       mass there: the less mass the student has on the set, the more uniform is its policy.
    5. phi is averaged uniformly over the vocabulary: the taken token has no say, and the
       imitation term shrinks as 1/V.
    6. Tokens outside the set are in that average with Q = 0, which is the row's maximum.
    7. The last column is no state: its token is never imitated.
    8. States are told from padding by ``token != pad``: with pad == EOS the end of a response is
       never imitated, and the state before it counts as terminal.
    9. A padded response that was cut off counts as ended there: value' = 0.

    Args:
        student_logits: ``(B, T, V)``; column t is the state in which ``tokens[:, t]`` is taken.
        teacher_logits: ``(B, T, V)``; has no say when ``support`` is given. No gradient.
        tokens: response tokens ``(B, T)``, padded on the right with ``pad_token_id``.
        top_p: teacher probability that a set must reach, in (0, 1].
        epsilon: weight that smoothing gives each token, > 0.
        temperature: divides the student's logits, > 0; the teacher's are taken as they are.
        chi2: subtract the chi-squared regulariser.
        gamma: discount; 0.99 is written into the published code.
        alpha: strength of chi2; 0.1 is written into the published code.
        pad_token_id: token that marks padding.
        support: bool ``(B, T, V)``, the action sets; None takes them from ``teacher_logits``.
    Returns:
        ``(loss, mean value)``, two scalars in nats; float32, float64 where the student's logits
        are. The mean is over all B x T columns, padding included with 0.
    Raises:
        ValueError: shapes do not fit, ``epsilon`` or ``temperature`` is not > 0, or no column but
            the last holds a token.

    >>> student, teacher = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    >>> tokens = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 3, 4]])
    >>> loss, value = published_loss(student, teacher, tokens, pad_token_id=0)
    """
    if student_logits.dim() != 3:
        raise ValueError(f"student_logits: expected (B, T, V), got {tuple(student_logits.shape)}")
    shape = student_logits.shape
    _expect("tokens", tokens, shape[:2])
    for name, number in (("epsilon", epsilon), ("temperature", temperature)):
        if not number > 0:
            raise ValueError(f"{name}: expected a number > 0, got {number!r}")
    if support is None:
        _expect("teacher_logits", teacher_logits, shape)
        selected = select_actions(teacher_logits, k=shape[-1], top_p=top_p, impl="reference")
        ids = selected.ids.long()
        # padded slots point at a spare column
        members = torch.where(ids < 0, shape[-1], ids)
        support = tokens.new_zeros((*shape[:2], shape[-1] + 1), dtype=torch.bool)
        support = support.scatter(-1, members, True)[..., :-1]
    _expect("support", support, shape)
    state = tokens != pad_token_id
    states = state[:, :-1].sum()
    if not states:
        raise ValueError(
            f"tokens: expected one that is not padding ({pad_token_id}) before the last column, "
            "got none"
        )

    z = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    q = (z - z.max(-1, keepdim=True).values).clamp(min=FLOOR)
    policy = q.softmax(-1) * support / top_p + epsilon
    policy = policy / policy.sum(-1, keepdim=True)
    value = (policy * (q - policy.log())).sum(-1) * state

    future = gamma * value[:, 1:]
    inside = support & state.unsqueeze(-1)
    error = (q * inside)[:, :-1] - future.unsqueeze(-1)  # (B, T - 1, V)
    imitation = (error - error.square() / (4 * alpha) if chi2 else error).mean(-1)
    loss = (value[:, :-1] - future - imitation).sum() / states
    return loss, value.mean()


def _expect(name: str, x: Tensor, shape: torch.Size) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected {tuple(shape)} to fit student_logits, got {tuple(x.shape)}"
        )
