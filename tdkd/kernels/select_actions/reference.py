"""select_actions: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.kernels.gather_q.reference import scaled
from tdkd.types import ActionSet, Scale

# A prefix reaches top_p when it comes within this factor of it. Sums of probabilities are rounded,
# and without a margin every nucleus that ends exactly on top_p (ten equal tokens, top_p = 0.5)
# would be decided by the order of a summation instead of by this definition.
REACHED = 1.0 - 1e-5


def top_ids(logits: Tensor, k: int) -> Tensor:
    """int64 ``[..., k]``: ids by (logit descending, id ascending); ``k <= V``, no NaN."""
    values, ids = logits.topk(k)
    # topk takes any of the tokens that tie with the k-th value; the lowest ids are meant
    kth = values[..., -1:]
    vocabulary = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int32)
    tied = torch.where(logits == kth, vocabulary, logits.shape[-1])
    lowest = tied.topk(k, largest=False, sorted=True).values.long()
    above = (values > kth).sum(-1, keepdim=True)
    position = torch.arange(k, device=logits.device).expand_as(ids)
    repaired = lowest.gather(-1, (position - above).clamp(min=0))
    ids = torch.where(position < above, ids, repaired)
    # ties among the tokens above: ids ascending, then a stable sort by value
    ids = ids.sort(-1).values
    order = torch.sort(logits.gather(-1, ids), dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)


def select_actions(
    logits: Tensor,
    k: int,
    top_p: float,
    scale: Scale,
    include: Tensor | None,
    state: Tensor | None = None,
) -> ActionSet:
    """Top-p prefix of (probability descending, id ascending), cut at ``k``.

    Rows where ``state`` (bool ``[...]``) is False have an empty set.
    """
    logits = logits.detach()
    vocab = logits.shape[-1]
    if vocab == 0:
        return _empty(logits, k)
    usable = ~(logits.isnan() | (logits == torch.inf)).any(-1) & (logits != -torch.inf).any(-1)
    if state is not None:
        usable = usable & state
    logits = torch.where(usable.unsqueeze(-1), logits, 0.0)

    kept = min(k, vocab)
    ids = top_ids(logits, kept)
    if scale.softcap is None:
        # the largest first: a level of -1000, divided by a temperature, would be rounded
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = scaled(wide - wide.amax(-1, keepdim=True), scale)
    else:
        z = scaled(logits, scale)
        z = z - z.amax(-1, keepdim=True)
    log_z = z.exp().sum(-1, keepdim=True).log()
    log_probs = z.gather(-1, ids) - log_z

    member = (logits.gather(-1, ids) != -torch.inf) & usable.unsqueeze(-1)
    if top_p < 1.0:
        probs = log_probs.double().exp()
        before = probs.cumsum(-1) - probs
        member &= before < top_p * REACHED
    count = member.sum(-1)
    ids = torch.where(member, ids, -1)
    log_probs = torch.where(member, log_probs, -torch.inf)
    if kept < k:
        ids = torch.nn.functional.pad(ids, (0, k - kept), value=-1)
        log_probs = torch.nn.functional.pad(log_probs, (0, k - kept), value=-torch.inf)

    if include is not None:
        taken = include.long().unsqueeze(-1)
        wanted = (taken >= 0) & usable.unsqueeze(-1)
        missing = wanted & ~(ids == taken).any(-1, keepdim=True)
        # appended, or in place of the last member when the set is full
        slot = count.unsqueeze(-1).clamp(max=k - 1)
        here = missing & (torch.arange(k, device=ids.device) == slot)
        taken_log_prob = z.gather(-1, taken.clamp(min=0)) - log_z
        ids = torch.where(here, taken, ids)
        log_probs = torch.where(here, taken_log_prob, log_probs)
        count = torch.where(missing.squeeze(-1), (count + 1).clamp(max=k), count)
    ids, count = ids.to(torch.int32), count.to(torch.int32)
    return ActionSet(ids.contiguous(), log_probs.contiguous(), count.contiguous())


def _empty(logits: Tensor, k: int) -> ActionSet:
    shape = (*logits.shape[:-1], k)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return ActionSet(
        logits.new_full(shape, -1, dtype=torch.int32),
        logits.new_full(shape, -torch.inf, dtype=dtype),
        logits.new_zeros(shape[:-1], dtype=torch.int32),
    )
