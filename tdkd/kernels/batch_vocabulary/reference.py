"""batch_vocabulary: the definition in plain PyTorch, which every device runs."""

import torch
from torch import Tensor

from tdkd.kernels.gather_q.reference import scaled
from tdkd.types import Scale, Vocabulary

LAW_ROWS = 64
"""Rows whose mean probabilities are the law of a student: more of them changed nothing."""
LAW_LOGITS = 8 << 20
"""Logits that these rows have at most, 32 MiB: with a very large head they are fewer."""
LAW_FLOOR = 0.1
"""Share of that law that is spread evenly, so that no weight exceeds ten times the uniform one."""


def student_law(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, state: Tensor
) -> Tensor:
    """Mean probabilities ``[V]`` of a student over some of its rows ``[N, H]`` that are states,
    evenly spaced among them, and a floor. Whatever they are, estimates by :func:`batch_vocabulary`
    stay unbiased."""
    hidden, weight = hidden.detach(), weight.detach()
    count, columns = hidden.shape[0], weight.shape[0]
    even = hidden.new_full((columns,), LAW_FLOOR / columns, dtype=torch.float32)
    if not count:
        return even
    most = min(count, LAW_ROWS, max(1, LAW_LOGITS // columns))
    # the numbers of states among states; how many there are only the device knows
    number, slot = state.cumsum(0), torch.arange(most, device=hidden.device)
    states = number[-1]
    wanted = torch.where(states > most, slot * states // most, slot) + 1
    some, here = torch.searchsorted(number, wanted).clamp(max=count - 1), (slot < states).float()
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden[some].to(weight.dtype) @ weight.T).float()  # no copy of the head
    if bias is not None:
        logits += bias.detach().float()
    # a row with NaN has no probabilities to give
    share = scaled(logits, scale).softmax(-1).nan_to_num_(0.0)
    return even.add_(here @ share / here.sum().clamp(min=1.0), alpha=1.0 - LAW_FLOOR)


def batch_vocabulary(
    ids: Tensor,
    vocab_size: int,
    *,
    extra: int,
    law: Tensor | None,
    capacity: int | None,
    generator: torch.Generator | None,
) -> Vocabulary:
    """The union of all ids >= 0, and ``extra`` of the other columns, with their weights.

    With a capacity nothing waits for the device.
    """
    device = ids.device
    union = torch.zeros(vocab_size + 1, dtype=torch.bool, device=device)
    # an assignment of True would wait for a GPU
    union.index_fill_(0, torch.where(ids < 0, vocab_size, ids.long()).flatten(), 1)
    union = union[:vocab_size]
    outside = (~union).double()
    if law is None:
        chance = outside * (extra / outside.sum().clamp(min=1.0)).clamp(max=1.0)
    else:
        chance = inclusion(outside * law.double(), extra)
    chosen = systematic(chance, generator)
    weight = torch.where(union, 0.0, -chance.clamp(min=torch.finfo(torch.float64).tiny).log())
    held = union | chosen
    if capacity is None:
        columns = held.nonzero().squeeze(-1)
        return Vocabulary(columns.to(torch.int32), weight[columns].float())

    fits = held.sum() <= capacity
    message = f"capacity: expected room for the union of all sets and the sample, got {capacity}"
    if device.type == "cpu" and not torch.compiler.is_compiling() and not bool(fits):
        raise ValueError(message)
    torch._assert_async(fits, message)
    place = torch.where(held, held.cumsum(0) - 1, capacity).clamp(max=capacity)
    columns = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    columns[place] = torch.arange(vocab_size, dtype=torch.int32, device=device)
    log_weight = torch.full((capacity + 1,), -torch.inf, dtype=torch.float32, device=device)
    log_weight[place] = weight.float()
    # what is not held went to the last place, which is cut off
    return Vocabulary(columns[:capacity], log_weight[:capacity])


def inclusion(share: Tensor, count: int) -> Tensor:
    """Chances in [0, 1], proportional to ``share`` below 1, that add up to ``count``, or to the
    number of columns with a share where there are fewer."""
    if not share.numel():
        return share
    falling = share.sort(descending=True).values
    left = count - torch.arange(share.numel(), device=share.device)
    rest = falling.flip(0).cumsum(0).flip(0)
    # the largest are certain as long as they ask for more of what is left than there is
    certain = ((falling * left >= rest) & (falling > 0)).long().cumprod(0)
    number = certain.sum()
    least = torch.where(certain > 0, falling, torch.inf).amin()
    at = number.clamp(max=share.numel() - 1).view(1)  # without a dimension it would wait
    ratio = left.gather(0, at) / rest.gather(0, at).clamp(min=1e-300)
    return torch.where(share >= least, 1.0, share * ratio.clamp(min=0.0)).clamp(max=1.0)


def systematic(chance: Tensor, generator: torch.Generator | None) -> Tensor:
    """bool: each column with its own chance, as many as the chances add up to (within one).

    Columns in random order lie end to end on a line, each as long as its chance; those that
    contain one of the points u, u + 1, u + 2 ... are in.
    """
    source = generator.device if generator is not None else chance.device
    order = torch.randperm(chance.numel(), generator=generator, device=source).to(chance.device)
    start = torch.rand((), generator=generator, device=source, dtype=torch.float64)
    line = torch.cat([start.to(chance.device).view(1), chance[order]]).cumsum(0)
    chosen = torch.zeros_like(chance, dtype=torch.bool)
    chosen[order] = line[1:].floor() > line[:-1].floor()
    # whatever rounding does to the line
    return (chosen & (chance > 0)) | (chance >= 1)
