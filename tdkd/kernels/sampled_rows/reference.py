"""sampled_rows: the definition in plain PyTorch."""

from torch import Tensor

from tdkd.kernels.linear_gather_q.reference import linear_gather_q
from tdkd.kernels.linear_rows.reference import linear_rows
from tdkd.types import Scale, StudentRows, Vocabulary


def sampled_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: Scale,
    vocabulary: Vocabulary,
) -> StudentRows:
    """``linear_rows`` on the columns of a vocabulary that need not hold ``ids``: the values there
    are of the whole head, and the vocabulary is for the mass outside alone."""
    z = linear_gather_q(hidden, weight, bias, ids, scale)
    return StudentRows(z, linear_rows(hidden, weight, bias, ids, scale, vocabulary).log_rest)
