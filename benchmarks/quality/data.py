"""What all methods share: prompts, the teacher's answers, and its last hidden states there.

From hidden states and the head everything about the teacher follows exactly, so its body runs once
for all methods and seeds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdkd import records
from tdkd.cli import generate
from tdkd.cli.evaluate import collate
from tdkd.models import last_hidden_state

EVAL_SETS = ("dolly", "selfinst", "vicuna")
BATCH = 32


class Batch(NamedTuple):
    """Sequences, and the rows of their responses."""

    ids: Tensor
    """``[B, T]``, right-padded."""
    mask: Tensor
    """``[B, T]``."""
    states: Tensor
    """bool ``[B, T]``: N positions from which a response token is taken."""
    tokens: Tensor
    """``[N]``: those tokens."""
    successor: Tensor
    """``[N]``."""
    teacher_hidden: Tensor
    """``[N, H_t]``."""
    own: Tensor
    """bool ``[N]``: rows of the student's own answers."""


def answers(
    model: Path, prompts: Path, output: Path, *, examples: int, prompt_tokens: int, new_tokens: int
) -> list[records.Record]:
    """The teacher's answers to the first prompts of a file that are short enough."""
    if not output.with_suffix(".prompts").exists():
        chosen = records.read(prompts)
        random.Random(0).shuffle(chosen)
        short = [r for r in chosen if len(str(r["prompt"])) <= 4 * prompt_tokens][:examples]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in short)
        records.write_whole(output.with_suffix(".prompts"), lines.encode())
    generate.run(
        model=str(model),
        output=str(output),
        prompts=str(output.with_suffix(".prompts")),
        num_examples=examples,
        max_prompt_tokens=prompt_tokens,
        max_new_tokens=new_tokens,
        batch_size=64,
        top_k=50,
        temperature=1.0,
        seed=0,
        device="cpu",
    )
    return records.read(output)


class Examples:
    """Encoded records with the teacher's hidden states, which are kept in a file."""

    def __init__(
        self,
        data: list[records.Record],
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: Path,
        new_tokens: int,
        max_length: int = 256,
    ) -> None:
        self.tokenizer, self.new_tokens = tokenizer, new_tokens
        chat = records.Chat(tokenizer)
        encoded = [chat.encode(record, max_length) for record in data]
        kept = [i for i, e in enumerate(encoded) if e.completion]
        self.records = [data[i] for i in kept]
        self.encoded = [encoded[i] for i in kept]
        self.pad = tokenizer.pad_token_id
        self.eos = tokenizer.eos_token_id
        sizes = [len(e.completion) for e in self.encoded]
        self.start = np.cumsum([0, *sizes])
        if not cache.exists():
            self._keep(teacher, cache)
        self.hidden = np.load(cache, mmap_mode="r")
        assert self.hidden.shape[0] == self.start[-1], f"{cache} belongs to other data"

    def _keep(self, teacher: PreTrainedModel, cache: Path) -> None:
        hidden = np.empty((int(self.start[-1]), teacher.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for first in range(0, len(self.encoded), BATCH):
                chosen = range(first, min(first + BATCH, len(self.encoded)))
                part = [self.encoded[i] for i in chosen]
                ids, mask, states, _ = collate(part, self.pad, torch.device("cpu"))
                given = last_hidden_state(teacher, input_ids=ids, attention_mask=mask)[states]
                hidden[self.start[first] : self.start[chosen.stop]] = given.numpy()
                print(f"teacher's hidden states: {chosen.stop} of {len(self.encoded)}", flush=True)
        temporary = cache.with_name(cache.name + ".tmp.npy")
        np.save(temporary, hidden)
        temporary.replace(cache)

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, chosen: list[int], own: dict[int, records.Encoded] | None = None) -> Batch:
        """``own``: other answers to some of the examples, by their place among the chosen; the
        teacher's hidden states are missing there (zeros)."""
        own = own or {}
        part = [own.get(at, self.encoded[i]) for at, i in enumerate(chosen)]
        ids, mask, states, tokens = collate(part, self.pad, torch.device("cpu"))
        width = self.hidden.shape[1]
        # copies: the file is mapped read-only
        hidden = [
            torch.zeros(len(own[at].completion), width)
            if at in own
            else torch.tensor(self.hidden[self.start[i] : self.start[i + 1]])
            for at, i in enumerate(chosen)
        ]
        successor = torch.arange(1, tokens.numel() + 1)
        last = torch.tensor([len(e.completion) for e in part]).cumsum(0) - 1
        # an answer that does not end with EOS was cut off
        successor[last] = torch.where(tokens[last] == self.eos, -1, -2)
        mine = [torch.full((len(e.completion),), at in own) for at, e in enumerate(part)]
        return Batch(ids, mask, states, tokens, successor, torch.cat(hidden), torch.cat(mine))


def order(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Which examples each step sees: epochs in random order, the same for every method."""
    source = random.Random(seed)
    stream: list[int] = []
    while len(stream) < size * steps:
        epoch = list(range(count))
        source.shuffle(epoch)
        stream += epoch
    return [stream[i * size : (i + 1) * size] for i in range(steps)]
