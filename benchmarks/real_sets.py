"""Writes tdkd/benchmark/sets.npz: the action sets of a real teacher, for the benchmark.

    python benchmarks/real_sets.py --models runs/demo
    python benchmarks/real_sets.py --rows 8192 --top-p 1 --output benchmarks/sets/8192-p1.npz

SmolLM2-135M-Instruct reads answers that it wrote itself (`make demo`): the sets of the first 2,048
positions, k = 64, p = 0.8, the taken token in. Ids alone: no text, no probabilities. Others are for
`tdkd bench --sets FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdkd import ops, records
from tdkd.benchmark.linear import SETS
from tdkd.cli.evaluate import collate
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer

K, ANSWERS = 64, 16


class States(NamedTuple):
    """Positions of answers as a teacher sees them, ``[N, H]`` and ``[N]``, and its head."""

    hidden: Tensor
    taken: Tensor
    weight: Tensor


def states_of(models: Path, rows: int, most: int) -> States:
    """The first positions of the demo's answers, held-out ones first: at least ``rows``, or the
    command ends, and at most ``most``."""
    tokenizer = load_tokenizer(str(models / "teacher"), chat=True)
    teacher = load_model(str(models / "teacher"))
    weight = lm_head(teacher).weight
    chat = records.Chat(tokenizer)
    answers = [
        chat.encode(record, max_length=128)
        for name in ("heldout.jsonl", "train.jsonl")
        for record in records.read(str(models / name))
    ]
    hidden, taken = weight.new_empty(0, weight.shape[1]), torch.empty(0, dtype=torch.long)
    for start in range(0, len(answers), ANSWERS):
        some = answers[start : start + ANSWERS]
        inputs, mask, states, tokens = collate(some, tokenizer.pad_token_id, torch.device("cpu"))
        with torch.no_grad():
            found = last_hidden_state(teacher, input_ids=inputs, attention_mask=mask)[states]
        hidden, taken = torch.cat([hidden, found])[:most], torch.cat([taken, tokens])[:most]
        if len(taken) == most:
            break
    if len(taken) < rows:
        raise SystemExit(f"expected {rows} positions of answers in {models}, got {len(taken)}")
    return States(hidden, taken, weight)


def write_sets(path: Path, ids: Tensor, taken: Tensor) -> None:
    """The file that :func:`tdkd.benchmark.cases.read_sets` reads, of at most 65,536 tokens."""
    held = ids >= 0
    np.savez_compressed(
        path,
        members=ids[held].numpy().astype(np.uint16),
        count=held.sum(-1).numpy().astype(np.uint8),
        tokens=taken.numpy().astype(np.uint16),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--output", type=Path, default=SETS)
    options = parser.parse_args()
    hidden, taken, weight = states_of(options.models, options.rows, options.rows)
    ids = ops.linear_select_actions(hidden, weight, K, options.top_p, include=taken).ids
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_sets(options.output, ids, taken)
    members = ids[ids >= 0]
    print(
        f"{options.output.name}: {options.rows} sets, "
        f"{members.numel() / options.rows:.1f} members, "
        f"{members.unique().numel()} distinct tokens"
    )


if __name__ == "__main__":
    main()
