"""Writes tdkd/benchmark/sets.npz: the action sets of a real teacher, for the benchmark.

    python benchmarks/real_sets.py --models runs/demo

SmolLM2-135M-Instruct reads answers that it wrote itself (`make demo`): the sets of the first 2,048
positions, k = 64, p = 0.8, the taken token in. Ids alone: no text, no probabilities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from tdkd import ops, records
from tdkd.benchmark.linear import SETS
from tdkd.cli.evaluate import collate
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer

ROWS, K, TOP_P, ANSWERS = 2048, 64, 0.8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/demo"))
    directory = parser.parse_args().models
    tokenizer = load_tokenizer(str(directory / "teacher"), chat=True)
    teacher = load_model(str(directory / "teacher"))
    head = lm_head(teacher)
    chat = records.Chat(tokenizer)
    answers = [
        chat.encode(record, max_length=128)
        for name in ("heldout.jsonl", "train.jsonl")
        for record in records.read(str(directory / name))
    ]
    ids, taken = torch.empty(0, K, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for start in range(0, len(answers), ANSWERS):
        batch = collate(
            answers[start : start + ANSWERS], tokenizer.pad_token_id, torch.device("cpu")
        )
        inputs, mask, states, tokens = batch
        with torch.no_grad():
            hidden = last_hidden_state(teacher, input_ids=inputs, attention_mask=mask)[states]
        actions = ops.linear_select_actions(hidden, head.weight, K, TOP_P, include=tokens)
        ids, taken = torch.cat([ids, actions.ids])[:ROWS], torch.cat([taken, tokens])[:ROWS]
        if ids.shape[0] == ROWS:
            break
    if ids.shape[0] < ROWS:
        raise SystemExit(f"expected {ROWS} positions of answers in {directory}, got {len(ids)}")
    held = ids >= 0
    count = held.sum(-1)
    np.savez_compressed(
        SETS,
        members=ids[held].numpy().astype(np.uint16),
        count=count.numpy().astype(np.uint8),
        tokens=taken.numpy().astype(np.uint16),
    )
    union = ids[held].unique().numel()
    print(f"{SETS.name}: {ROWS} sets, {count.float().mean():.1f} members, {union} distinct tokens")


if __name__ == "__main__":
    main()
