"""batch_vocabulary: the definition in plain PyTorch."""

import torch
from torch import Tensor

from tdkd.types import Vocabulary


def batch_vocabulary(
    ids: Tensor, vocab_size: int, *, extra: int, generator: torch.Generator | None
) -> Vocabulary:
    """The union of all ids >= 0, and ``extra`` columns sampled uniformly from the rest."""
    union = torch.zeros(vocab_size + 1, dtype=torch.bool, device=ids.device)
    union[torch.where(ids < 0, vocab_size, ids.long()).flatten()] = True
    union = union[:vocab_size]
    rest = (~union).nonzero().squeeze(-1)
    sampled = min(extra, rest.numel())
    device = generator.device if generator is not None else ids.device
    draw = torch.randperm(rest.numel(), generator=generator, device=device)[:sampled]
    chosen = rest[draw.to(rest.device)]
    weight = torch.zeros(vocab_size, device=ids.device)
    if sampled:
        weight[chosen] = torch.tensor(rest.numel() / sampled, dtype=torch.float64).log().float()
    columns = union.index_fill(0, chosen, True).nonzero().squeeze(-1)
    return Vocabulary(columns.to(torch.int32), weight[columns])
