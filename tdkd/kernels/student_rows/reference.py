"""student_rows: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.kernels.gather_q.reference import gather_q, scaled
from tdkd.kernels.soft_value.reference import above_peak
from tdkd.types import Scale, StudentRows


def student_rows(
    logits: Tensor,
    ids: Tensor,
    scale: Scale,
    *,
    log_weight: Tensor | None = None,
    state: Tensor | None = None,
) -> StudentRows:
    """Values of ``logits [..., V]`` at ``ids [..., k]``, and logsumexp of all other columns.

    Args:
        log_weight: ``[V]``, added to the columns outside the set (sampled ones stand for many).
        state: bool ``[...]``; rows without count as empty: -inf, and no gradient.
    """
    z = gather_q(logits, ids, scale)
    rest = scaled(logits, scale)
    if log_weight is not None:
        rest = rest + log_weight
    if rest.shape[-1] and ids.shape[-1]:
        # padded slots point at a spare column
        inside = torch.zeros(
            (*rest.shape[:-1], rest.shape[-1] + 1), dtype=torch.bool, device=rest.device
        ).scatter_(-1, torch.where(ids < 0, rest.shape[-1], ids.long()), True)[..., :-1]
        rest = rest.masked_fill(inside, -torch.inf)
    if state is not None:
        z = torch.where(state.unsqueeze(-1), z, -torch.inf)
        rest = torch.where(state.unsqueeze(-1), rest, -torch.inf)
    above, peak = above_peak(rest)
    return StudentRows(z, above + peak if rest.device.type == "mps" else above.double() + peak)
