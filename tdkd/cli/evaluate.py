"""tdkd evaluate: how close a student is to its teacher on held-out responses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdkd import records
from tdkd.cli.console import console, progress_bar
from tdkd.cli.generate import sample
from tdkd.errors import UserError
from tdkd.models import (
    Head,
    check_positions,
    check_tokenizer,
    last_hidden_state,
    lm_head,
    load_model,
    load_tokenizer,
)

# Rows of logits that exist at a time: teacher and student, in float32.
CHUNK_ROWS = 256

METRICS = {
    "kl": "KL(teacher || student), nats a token, full vocabulary",
    "reverse_kl": "KL(student || teacher), nats a token",
    "top1": "positions where both rank the same token first",
    "acceptance": "sum min(p, q): what speculative decoding would accept",
    "perplexity": "of the student on the completions",
    "rouge_l": "Rouge-L F1 of the student's answers",
}


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[records.Record],
    *,
    max_length: int = 512,
    vocab_size: int | None = None,
    batch_size: int = 16,
    rouge: bool = True,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    samples: int = 0,
) -> dict[str, Any]:
    """Metrics over every response position of the records, teacher-forced, and Rouge-L of answers.

    Args:
        student: the model to judge, in eval mode.
        teacher: the model to compare with; the same vocabulary.
        tokenizer: of both.
        data: records with a prompt and a completion or references.
        max_length: tokens of prompt and completion that count.
        vocab_size: columns at and above it are padding; for models that pad differently.
        batch_size: sequences a forward.
        rouge: let the student answer, and score the answers (best over references, stemmed).
        max_new_tokens: length of an answer.
        temperature: of the answers; 0 is greedy.
        seed: of sampled answers.
        samples: answers to return beside the metrics.
    Returns:
        The metrics of ``METRICS``, ``examples``, ``positions``, and ``samples``.
    Raises:
        UserError: vocabularies differ or lack a token of the data, no record has a response within
            ``max_length``, or one is longer than the models can be given.
    """
    heads = lm_head(student), lm_head(teacher)
    sizes = heads[0].weight.shape[0], heads[1].weight.shape[0]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise UserError(
            f"teacher: expected the student's vocabulary of {sizes[0]}, got {sizes[1]}; where they "
            "differ by padding alone, set vocab-size"
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes):
        raise UserError(
            f"vocab-size: expected 1 to {min(sizes)}, the smaller vocabulary, got {vocab_size}"
        )
    chat = records.Chat(tokenizer)
    encoded = [chat.encode(record, max_length) for record in data]
    order = sorted(
        (i for i in range(len(data)) if encoded[i].completion),
        key=lambda i: len(encoded[i].prompt) + len(encoded[i].completion),
    )
    if not order:
        raise UserError(f"data: expected responses within max-length {max_length}, got none")
    longest = len(encoded[order[-1]].prompt) + len(encoded[order[-1]].completion)
    check_positions(longest, "max-length", student, teacher)
    largest = max(max(encoded[i].prompt + encoded[i].completion) for i in order)
    columns = min(sizes) if vocab_size is None else vocab_size
    if largest >= columns:
        raise UserError(
            f"vocab-size: expected more than {largest}, the largest token of the data, got "
            f"{columns}"
        )
    wanted = order if rouge else order[:samples]
    if wanted:
        longest = max(len(encoded[i].prompt) for i in wanted)
        check_positions(longest + max_new_tokens, "max-new-tokens", student)
    sums = torch.zeros(5, dtype=torch.float64)
    positions = 0
    with progress_bar() as progress, torch.inference_mode():
        task = progress.add_task("teacher-forced", total=len(order))
        for start in range(0, len(order), batch_size):
            batch = [encoded[i] for i in order[start : start + batch_size]]
            ids, mask, states, tokens = collate(batch, tokenizer.pad_token_id, student.device)
            inputs = {"input_ids": ids, "attention_mask": mask}
            hidden = [last_hidden_state(m, **inputs)[states] for m in (student, teacher)]
            rows = compare(hidden[0], heads[0], hidden[1], heads[1], tokens, vocab_size)
            sums += rows.sum(0).cpu()
            positions += tokens.numel()
            progress.update(task, advance=len(batch))
    kl, reverse_kl, top1, acceptance, nll = (sums / positions).tolist()
    result: dict[str, Any] = {
        "kl": kl,
        "reverse_kl": reverse_kl,
        "top1": top1,
        "acceptance": acceptance,
        "perplexity": math.exp(min(nll, 700.0)),
        "positions": positions,
        "examples": len(order),
    }
    if wanted:
        answers = _answers(
            student, tokenizer, [encoded[i].prompt for i in wanted], batch_size,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        if rouge:
            scorer = RougeScorer(["rougeL"], use_stemmer=True)
            scores = [
                max(scorer.score(text, answer)["rougeL"].fmeasure for text in references(data[i]))
                for i, answer in zip(wanted, answers, strict=True)
            ]
            result["rouge_l"] = sum(scores) / len(scores)
        # records in the order of the file, so that several students answer the same prompts
        by_record = dict(zip(wanted, answers, strict=True))
        result["samples"] = [
            {
                "prompt": records.messages(data[i]["prompt"])[-1]["content"],
                "reference": references(data[i])[0],
                "answer": by_record[i],
            }
            for i in sorted(by_record)[:samples]
        ]
    return result


def references(record: records.Record) -> list[str]:
    """What an answer is scored against."""
    return record.get("references") or [records.completion_text(record)]


def run(
    *,
    model: str,
    teacher: str,
    data: str,
    output: str,
    max_examples: int | None,
    max_length: int,
    vocab_size: int | None,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    rouge: bool,
    samples: int,
    seed: int,
    device: str,
) -> None:
    """The command; every argument is an option of ``tdkd evaluate``."""
    records.check_at_least(
        1,
        max_examples=max_examples,
        max_length=max_length,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    records.check_at_least(0, temperature=temperature, samples=samples)
    records.check_output(Path(output))
    loaded = records.read(data, answered=True)[:max_examples]
    tokenizer = load_tokenizer(model, chat=True)
    check_tokenizer(teacher, tokenizer)
    result = evaluate(
        load_model(model, device=device),
        load_model(teacher, device=device, argument="teacher"),
        tokenizer,
        loaded,
        max_length=max_length,
        vocab_size=vocab_size,
        batch_size=batch_size,
        rouge=rouge,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        samples=samples,
    )
    table = Table(title=f"{result['examples']} examples, {result['positions']} positions")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("what it is")
    for name, meaning in METRICS.items():
        if name in result:
            table.add_row(name, f"{result[name]:.4f}", meaning)
    # first, so that a full disk takes nothing away
    Console().print(table)
    records.write_whole(Path(output), {"model": model, "teacher": teacher, "data": data, **result})
    console.print(f"written to {output}", markup=False)


def collate(
    batch: list[records.Encoded], pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right-padded ids, mask, mask of states (each ``[B, T]``), and the tokens taken there."""
    width = max(len(e.prompt) + len(e.completion) for e in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    states = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        mask[row, :end] = 1
        states[row, len(prompt) - 1 : end - 1] = True
    tokens = torch.cat([torch.tensor(e.completion) for e in batch])
    return ids.to(device), mask.to(device), states.to(device), tokens.to(device)


def compare(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    tokens: Tensor,
    vocab_size: int | None = None,
) -> Tensor:
    """KL, reverse KL, top-1 agreement, acceptance and negative log-likelihood of N rows, float64
    ``[N, 5]``; no more than ``CHUNK_ROWS`` of them have logits at a time."""
    parts = []
    for start in range(0, tokens.numel(), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        log_q = student.logits(student_hidden[rows])[:, :vocab_size].log_softmax(-1)
        log_p = teacher.logits(teacher_hidden[rows])[:, :vocab_size].log_softmax(-1)
        parts.append(_compare(log_p, log_q, tokens[rows]))
    return torch.cat(parts)


def _compare(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    difference = log_p - log_q
    # 0 * inf where one of them excludes a token
    kl = torch.where(p > 0, p * difference, 0.0).sum(-1)
    reverse_kl = torch.where(q > 0, -q * difference, 0.0).sum(-1)
    top1 = (log_p.argmax(-1) == log_q.argmax(-1)).to(kl)
    acceptance = torch.minimum(p, q).sum(-1)
    nll = -log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.stack([kl, reverse_kl, top1, acceptance, nll], -1).double()


def _answers(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch_size: int,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    answers = []
    with progress_bar() as progress:
        task = progress.add_task("answers", total=len(prompts))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            drawn = sample(
                student,
                tokenizer,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + start,
            )
            answers += [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in drawn]
            progress.update(task, advance=len(batch))
    return answers
