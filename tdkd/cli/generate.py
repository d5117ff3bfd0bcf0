"""tdkd generate: a teacher answers prompts, or writes prompts and answers by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tdkd import records
from tdkd.cli.console import console, progress_bar
from tdkd.errors import UserError
from tdkd.models import (
    cache_argument,
    check_positions,
    eos_token_ids,
    generating,
    left_padded,
    load_model,
    load_tokenizer,
)


class TopKSampler(LogitsProcessor):
    """Sampling from the top-k as greedy search over Gumbel noise.

    ``generate``'s own sampler draws over the whole vocabulary, a third of a step on a CPU, and from
    the global generator; this one draws k numbers a row from its own, so that a batch can be done
    again.
    """

    def __init__(self, k: int, temperature: float, generator: torch.Generator) -> None:
        self.k = k
        self.temperature = temperature
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top = scores.topk(min(self.k, scores.shape[-1]))
        noise = torch.rand(top.values.shape, generator=self.generator).to(scores)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()
        drawn = top.values / self.temperature + gumbel
        return torch.full_like(scores, -torch.inf).scatter_(-1, top.indices, drawn)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    top_k: int = 50,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[tuple[list[int], bool]]:
    """One continuation of each prompt, sampled from the top-k (``temperature=0``: greedy).

    The law is the model's logits alone: no penalty of its generation config enters.

    Returns:
        For each prompt the new tokens without the stop token, and whether they were cut off.
    """
    stop = eos_token_ids(model, tokenizer)
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    width = ids.shape[1]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    options: dict[str, Any] = {}
    if temperature > 0:
        generator = torch.Generator().manual_seed(seed)
        sampler = TopKSampler(top_k, temperature, generator)
        options["logits_processor"] = LogitsProcessorList([sampler])
    with generating(model, config):
        name = cache_argument(model)
        if name and len(prompts) > 1 and width > 1 and all(p == prompts[0] for p in prompts):
            # one row computes what all of them share
            cache = DynamicCache(config=model.config)
            model(ids[:1, :-1], **{name: cache}, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
            options[name] = cache
        out = model.generate(ids, attention_mask=mask, generation_config=config, **options)
    result = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), None)
        result.append((row if end is None else row[:end], end is None))
    return result


def run(
    *,
    model: str,
    output: str,
    prompts: str | None,
    num_examples: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    top_k: int,
    temperature: float,
    seed: int,
    device: str,
) -> None:
    """The command; every argument is an option of ``tdkd generate``."""
    records.check_at_least(
        1,
        num_examples=num_examples,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        top_k=top_k,
    )
    records.check_at_least(0, temperature=temperature)
    given = None if prompts is None else records.read(prompts, "prompts")
    tokenizer = load_tokenizer(model, chat=True)
    out = Path(output)
    records.check_output(out)
    settings = {
        "model": str(model),
        "prompts": prompts,
        # the file's path does not say whether it is still the same
        "prompts_sha256": prompts and hashlib.sha256(Path(prompts).read_bytes()).hexdigest(),
        "num_examples": num_examples,
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "top_k": top_k,
        "temperature": temperature,
        "seed": seed,
    }
    _same_settings(out, settings)
    teacher = load_model(model, device=device)
    chat = records.Chat(tokenizer)
    overhead = len(chat.prompt({"prompt": ""}))  # what the template adds
    sampling: dict[str, Any] = {"top_k": top_k, "temperature": temperature}
    if given is None:
        most = len(_user_opening(tokenizer)) + max_prompt_tokens
        check_positions(most, "max-prompt-tokens", teacher)
        # as long as a prompt may come
        check_positions(overhead + max_prompt_tokens + max_new_tokens, "max-new-tokens", teacher)
        records.write_whole(_settings_path(out), settings)
        written = _write_prompts(
            teacher, tokenizer, out, num_examples, max_prompt_tokens, batch_size, seed, sampling
        )
        given = [{"prompt": text} for text in written]
    encoded = [chat.prompt(record) for record in given]
    # neighbours of one length waste no padding
    order = sorted(range(len(given)), key=lambda i: (len(encoded[i]), i))
    order = [i for i in order if len(encoded[i]) <= max_prompt_tokens + overhead]
    if not order:
        raise UserError(
            f"prompts: expected prompts of at most {max_prompt_tokens} tokens, got none that short"
        )
    if len(order) < len(given):
        console.print(
            f"{len(given) - len(order)} prompts are longer than {max_prompt_tokens}", markup=False
        )

    check_positions(len(encoded[order[-1]]) + max_new_tokens, "max-new-tokens", teacher)
    if prompts is not None:
        records.write_whole(_settings_path(out), settings)
    size = out.stat().st_size if out.exists() else 0
    done = records.keep_lines(out, batch_size, len(order))
    if size and out.stat().st_size < size:
        console.print(
            f"{out}: a batch that was not finished is dropped and done again", markup=False
        )
    if done:
        console.print(f"{out}: {done} of {len(order)} answers are there already", markup=False)
    with progress_bar() as progress:
        task = progress.add_task("answers", total=len(order), completed=done)
        for start in range(done, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = sample(
                teacher,
                tokenizer,
                [encoded[i] for i in batch],
                max_new_tokens=max_new_tokens,
                seed=_batch_seed(seed, "answers", start // batch_size),
                **sampling,
            )
            texts = [
                _text(chat, encoded[i], *answer) for i, answer in zip(batch, answers, strict=True)
            ]
            records.append(out, _answered([given[i] for i in batch], answers, texts))
            progress.update(task, advance=len(batch))
    console.print(f"{len(order)} records in {out}", markup=False)


def _text(chat: records.Chat, prompt: list[int], tokens: list[int], truncated: bool) -> str:
    """An answer as the content of a message, which is encoded to the tokens that were written."""
    decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
    text = decode(tokens)
    while truncated and text.endswith("\ufffd"):  # cut within a character
        tokens = tokens[:-1]
        text = decode(tokens)
    # behind its prompt: alone, SentencePiece drops the space that an answer begins with
    before, whole = decode(prompt), decode([*prompt, *tokens])
    if whole.startswith(before):
        text = whole.removeprefix(before)
    return text.removeprefix(chat.between)


def _answered(
    given: list[records.Record], answers: list[tuple[list[int], bool]], texts: list[str]
) -> Iterator[records.Record]:
    for record, (_, truncated), text in zip(given, answers, texts, strict=True):
        yield {
            **record,
            "prompt": records.messages(record["prompt"]),
            "completion": [{"role": "assistant", "content": text}],
            "truncated": truncated,
        }


def _write_prompts(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    num_examples: int,
    max_prompt_tokens: int,
    batch_size: int,
    seed: int,
    sampling: dict[str, Any],
) -> list[str]:
    """What an instruct model writes when it is given the opening of a user turn (Magpie)."""
    state_path = out.with_name(out.name + ".prompts.json")
    state: dict[str, Any] = {"batches": 0, "prompts": []}
    if state_path.exists():
        state |= records.read_json(state_path)
    opening = _user_opening(tokenizer)
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=num_examples, completed=len(state["prompts"]))
        while len(state["prompts"]) < num_examples:
            drawn = sample(
                teacher,
                tokenizer,
                [opening] * batch_size,
                max_new_tokens=max_prompt_tokens,
                seed=_batch_seed(seed, "prompts", state["batches"]),
                **sampling,
            )
            seen = set(state["prompts"])
            fresh = []
            for tokens, truncated in drawn:
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                if text and not truncated and text not in seen:
                    seen.add(text)
                    fresh.append(text)
            state["batches"] += 1
            state["prompts"] += fresh
            records.write_whole(state_path, state)
            progress.update(task, completed=min(num_examples, len(state["prompts"])))
            if state["batches"] >= 10 and len(state["prompts"]) < state["batches"]:
                raise UserError(
                    f"model: expected a teacher that writes prompts, got {len(state['prompts'])} "
                    f"in {state['batches']} batches of {batch_size}; pass --prompts"
                )
    return state["prompts"][:num_examples]


def _user_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    marker = "\u241f"
    text = records.render([{"role": "user", "content": marker}], tokenizer)
    return tokenizer(text.split(marker)[0], add_special_tokens=False).input_ids


def _batch_seed(seed: int, stage: str, batch: int) -> int:
    # distinct streams for the stages and batches of one run
    return seed * 1_000_003 + batch * 2 + (stage == "answers")


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    path = _settings_path(out)
    if path.exists():
        records.check_settings(path, settings)
    elif out.exists():
        raise UserError(f"output: expected a new file or one of tdkd generate, got {out}")


def _settings_path(out: Path) -> Path:
    return out.with_name(out.name + ".settings.json")
