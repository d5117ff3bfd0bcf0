"""What a student is worth: on the teacher's answers, on its own, and to a reader."""

from __future__ import annotations

import math
from typing import Any

import torch
from data import Examples
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdkd import records
from tdkd.cli.evaluate import collate, compare, references
from tdkd.cli.generate import sample
from tdkd.models import Head, last_hidden_state, lm_head

BATCH = 16
POSITIONS = ((0, 8), (8, 16), (16, 32), (32, 64), (64, 128))
"""Tokens of an answer that are counted together."""
DRAWS = 1000
"""Bootstrap draws of a confidence interval."""


def on_teacher(student: PreTrainedModel, teacher: Head, examples: Examples) -> dict[str, float]:
    """Teacher-forced: KL, reverse KL, top-1 agreement, acceptance, perplexity."""
    parts = []
    with torch.inference_mode():
        for first in range(0, len(examples), BATCH):
            batch = examples.batch(list(range(first, min(first + BATCH, len(examples)))))
            hidden = last_hidden_state(student, input_ids=batch.ids, attention_mask=batch.mask)
            given = hidden[batch.states], lm_head(student), batch.teacher_hidden, teacher
            parts.append(compare(*given, batch.tokens))
    *means, nll = torch.cat(parts).mean(0).tolist()
    names = ("kl", "reverse_kl", "top1", "acceptance")
    return {**dict(zip(names, means, strict=True)), "perplexity": math.exp(nll)}


def on_its_own(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[records.Record]],
    *,
    new_tokens: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Answers sampled at temperature 1: Rouge-L, and both KLs on the states that they visit."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    chat = records.Chat(tokenizer)
    result: dict[str, Any] = {}
    sums = torch.zeros(len(POSITIONS), 4, dtype=torch.float64)
    every: list[float] = []
    for name, data in sets.items():
        scores: list[float] = []
        for first in range(0, len(data), BATCH * 2):
            part = data[first : first + BATCH * 2]
            prompts = [chat.prompt(record) for record in part]
            drawn = sample(
                student, tokenizer, prompts, max_new_tokens=new_tokens,
                top_k=student.config.vocab_size, temperature=1.0, seed=seed + first,
            )  # fmt: skip
            for record, (tokens, _) in zip(part, drawn, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                scores.append(
                    max(scorer.score(r, text)["rougeL"].fmeasure for r in references(record))
                )
            said = [
                records.Encoded(p, tokens if cut else [*tokens, tokenizer.eos_token_id])
                for p, (tokens, cut) in zip(prompts, drawn, strict=True)
            ]
            sums += _along(student, teacher, said, tokenizer.pad_token_id)
        result[f"rouge_l_{name}"] = interval(scores)
        every += scores
    result["rouge_l"] = interval(every)
    whole = sums.sum(0)
    count = whole[3].item()
    for j, what in enumerate(("own_kl", "own_reverse_kl", "own_acceptance")):
        result[what] = whole[j].item() / count
        by_position = (sums[:, j] / sums[:, 3].clamp(min=1)).tolist()
        result[f"{what}_by_position"] = [
            value if n else None for value, n in zip(by_position, sums[:, 3].tolist(), strict=True)
        ]
    return result


def _along(
    student: PreTrainedModel, teacher: PreTrainedModel, said: list[records.Encoded], pad: int
) -> Tensor:
    """Sums over states of KL, reverse KL and acceptance, and their number, by position."""
    sums = torch.zeros(len(POSITIONS), 4, dtype=torch.float64)
    said = [s for s in said if s.completion]
    if not said:
        return sums
    with torch.inference_mode():
        ids, mask, states, tokens = collate(said, pad, torch.device("cpu"))
        hidden = [
            last_hidden_state(m, input_ids=ids, attention_mask=mask)[states]
            for m in (student, teacher)
        ]
        compared = compare(hidden[0], lm_head(student), hidden[1], lm_head(teacher), tokens)
    position = torch.cat([torch.arange(len(s.completion)) for s in said])
    for i, (low, high) in enumerate(POSITIONS):
        inside = (position >= low) & (position < high)
        sums[i, :3] = compared[inside][:, [0, 1, 3]].sum(0)
        sums[i, 3] = inside.sum()
    return sums


def interval(scores: list[float]) -> dict[str, float]:
    """Mean, and the 95 % bootstrap interval over prompts."""
    x = torch.tensor(scores, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(scores), (DRAWS, len(scores)), generator=generator)
    low, high = x[draws].mean(-1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"mean": float(x.mean()), "low": low, "high": high, "prompts": len(scores)}
