"""tdkd cache: a teacher's action sets on a data set, for students to learn from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdkd import cache, logprobs, ops, records
from tdkd.cli.console import console, progress_bar
from tdkd.cli.distill import is_chat, prepared
from tdkd.cli.settings import data_file
from tdkd.errors import UserError
from tdkd.models import (
    Head,
    check_device,
    check_positions,
    eos_beside,
    last_hidden_state,
    lm_head,
    load_model,
    load_tokenizer,
)

SETTINGS = "settings.json"
"""What a cache that is not finished was begun with."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest of them."""


def run(
    *,
    model: str | None,
    data: str | None,
    served: str | None,
    tokenizer: str | None,
    output: str,
    action_top_k: int,
    action_top_p: float,
    teacher_temperature: float,
    max_length: int,
    tail: bool,
    log_probs: str,
    model_dtype: str,
    vocab_size: int | None,
    assistant_only_loss: bool,
    batch_size: int,
    shard_examples: int,
    device: str | None,
) -> float:
    """The command; every argument is an option of ``tdkd cache``.

    Returns:
        Seconds that this process had the teacher read and write.
    """
    records.check_at_least(
        1,
        action_top_k=action_top_k,
        max_length=max_length,
        batch_size=batch_size,
        shard_examples=shard_examples,
        vocab_size=vocab_size,
    )
    if action_top_k > cache.MOST_MEMBERS:
        raise UserError(
            f"action-top-k: expected at most the {cache.MOST_MEMBERS} members that a cache can "
            f"count, got {action_top_k}"
        )
    if not 0 < action_top_p <= 1:
        raise UserError(f"action-top-p: expected a number in (0, 1], got {action_top_p}")
    if not 0 < teacher_temperature < inf:
        raise UserError(
            f"teacher-temperature: expected a finite number > 0, got {teacher_temperature}"
        )
    if log_probs not in cache.DTYPES:
        raise UserError(f"log-probs: expected one of {', '.join(cache.DTYPES)}, got {log_probs!r}")
    shared = {
        "action_top_k": action_top_k,
        "action_top_p": action_top_p,
        "teacher_temperature": teacher_temperature,
        "max_length": max_length,
        "dtype": log_probs,
        "tail": tail,
        "assistant_only_loss": assistant_only_loss,
    }
    folder = Path(output)
    if served is not None:
        if model is not None or data is not None:
            raise UserError("served: expected neither --model nor --data beside it, got one")
        if tokenizer is None:
            raise UserError("tokenizer: expected the directory of the student's, got none")
        if teacher_temperature != 1:
            raise UserError(
                "teacher-temperature: expected 1 beside --served, whose log-probabilities are what "
                f"they are, got {teacher_temperature}"
            )
        if vocab_size is not None or assistant_only_loss:
            raise UserError(
                "served: expected neither --vocab-size nor --assistant-only-loss beside it, got one"
            )
        _of_a_server(Path(served), tokenizer, folder, shared, shard_examples)
        return 0.0
    if tokenizer is not None:
        raise UserError(
            f"tokenizer: expected it beside --served alone, got {tokenizer}; a model has its own"
        )
    if model is None or data is None:
        raise UserError("model: expected --model and --data, or --served, got neither")
    processes = _processes(device)
    dtype = _dtype(model_dtype, processes.device)
    own = load_tokenizer(model)
    examples = prepared(
        data, "data", own, max_length=max_length, assistant_only_loss=assistant_only_loss
    )
    teacher = load_model(model, dtype=dtype, device=processes.device, argument="model")
    longest, largest, _ = cache.extent(examples)
    check_positions(longest, "max-length", teacher)
    head = lm_head(teacher)
    columns = head.weight.shape[0]
    if vocab_size is not None and vocab_size > columns:
        raise UserError(
            f"vocab-size: expected at most the {columns} columns of the teacher, got {vocab_size}"
        )
    settings: dict[str, Any] = {
        **shared,
        "model_dtype": str(teacher.dtype).removeprefix("torch."),
        "vocab_size": columns if vocab_size is None else vocab_size,
    }
    if largest >= settings["vocab_size"]:
        raise UserError(
            f"vocab-size: expected more than {largest}, the largest token of the data, got "
            f"{settings['vocab_size']}"
        )
    if processes.is_main_process:
        _, first = next(records.lines(data, "data"))
        settings |= {
            "teacher": {"name": Path(model).name, "sha256": _checksum(Path(model))},
            "tokenizer": cache.tokenizer_hash(own),
            "chat_template": cache.template_hash(own) if is_chat(first) else None,
            "data": data_file(Path(data)),
            "tokens_sha256": cache.tokens_hash(examples),
        }
        _begin(folder, {**settings, "shard_examples": shard_examples})
    processes.wait_for_everyone()
    sets_of = _Sets(teacher, head, own, settings, batch_size)
    starts = range(0, len(examples), shard_examples)
    mine = list(enumerate(starts))[processes.process_index :: processes.num_processes]
    began, states, tokens = time.perf_counter(), 0, 0
    with progress_bar() as progress:
        task = progress.add_task("examples", total=len(examples))
        for number, start in mine:
            chosen = range(start, min(start + shard_examples, len(examples)))
            if cache.finished(folder, number):
                progress.update(task, advance=len(chosen))
                continue
            made = sets_of(
                examples.select(chosen), lambda size: progress.update(task, advance=size)
            )
            told = _write(folder, number, made, settings)
            states += told["states"]
            tokens += told["tokens"]
    seconds = time.perf_counter() - began
    processes.wait_for_everyone()
    if processes.is_main_process:
        rate = ""
        if states:
            rate = (
                f"; in this process {states / seconds:,.0f} states and {tokens / seconds:,.0f} "
                "tokens a second"
            )
        _finish(folder, len(starts), settings, rate)
    return seconds


def verify(path: str) -> None:
    """``tdkd cache --verify PATH``: every file against its checksum."""
    _tell(cache.Cache(path, argument="verify"), "")


class _Sets:
    """The teacher's sets of tokenised examples."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        head: Head,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        batch_size: int,
    ) -> None:
        self.teacher, self.head, self.batch_size = teacher, head, batch_size
        self.pad = tokenizer.pad_token_id
        self.options = {
            "k": settings["action_top_k"],
            "top_p": settings["action_top_p"],
            "temperature": settings["teacher_temperature"],
            "vocab_size": settings["vocab_size"],
            "bias": head.bias,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
        }

    def __call__(self, examples: Dataset, advance: Callable[[int], object]) -> list[cache.Example]:
        rows = [(torch.tensor(x["input_ids"]), torch.tensor(x["labels"])) for x in examples]
        # neighbours of one length waste no padding
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        done: dict[int, cache.Example] = {}
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            done.update(zip(chosen, self._batch([rows[i] for i in chosen]), strict=True))
            advance(len(chosen))
        return [done[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _batch(self, rows: list[tuple[Tensor, Tensor]]) -> Iterator[cache.Example]:
        ids, labels = (
            pad_sequence([row[i] for row in rows], batch_first=True, padding_value=value)
            for i, value in enumerate((self.pad, -100))
        )
        sizes = torch.tensor([len(row) for row, _ in rows])
        mask = torch.arange(ids.shape[1]) < sizes[:, None]
        keep = labels != -100
        # no state precedes the first token
        keep[:, 0] = False
        device = self.head.weight.device
        hidden = last_hidden_state(
            self.teacher, input_ids=ids.to(device), attention_mask=mask.long().to(device)
        )
        states = keep[:, 1:].to(device)
        actions = ops.linear_select_actions(
            hidden[:, :-1][states], self.head.weight,
            include=ids[:, 1:].to(device)[states], **self.options,
        )  # fmt: skip
        log_probs, members = actions.log_probs.cpu(), actions.ids.cpu()
        # float32 knows the mass outside to its epsilon
        outside = 1 - log_probs.double().exp().sum(-1)
        tail = outside.clamp(min=torch.finfo(torch.float32).eps).log()
        first = 0
        for (tokens, _), kept in zip(rows, keep, strict=True):
            here = slice(first, first + int(kept.sum()))
            first = here.stop
            held = members[here] >= 0
            yield cache.Example(
                input_ids=tokens.numpy(),
                mask=kept[: len(tokens)].numpy(),
                count=held.sum(-1).numpy(),
                ids=members[here][held].numpy(),
                log_probs=log_probs[here][held].numpy(),
                log_tail=tail[here].numpy(),
            )


def _of_a_server(
    path: Path,
    directory: str,
    folder: Path,
    shared: dict[str, Any],
    shard_examples: int,
) -> None:
    """A cache of the log-probabilities that a serving engine returned."""
    chats = logprobs.has_chats(path)
    tokenizer = load_tokenizer(directory, argument="tokenizer", chat=chats)
    settings = {
        **shared,
        "model_dtype": None,
        "vocab_size": len(tokenizer),
        "teacher": {"name": logprobs.model_name(path), "sha256": None},
        "tokenizer": cache.tokenizer_hash(tokenizer),
        "chat_template": cache.template_hash(tokenizer) if chats else None,
        "data": data_file(path),
        "tokens_sha256": None,
    }
    left = logprobs.Left()
    examples = logprobs.read(
        path, tokenizer, k=shared["action_top_k"], top_p=shared["action_top_p"],
        max_length=shared["max_length"], eos=eos_beside(directory, tokenizer), left=left,
    )  # fmt: skip
    number = 0
    while part := list(islice(examples, shard_examples)):
        if not number:  # before, the file may be one of which nothing can be used
            _begin(folder, {**settings, "shard_examples": shard_examples})
        _write(folder, number, part, settings)
        number += 1
    _finish(folder, number, settings, "")
    if left.answers or left.states:
        console.print(f"{path}: {left}", markup=False, soft_wrap=True)


def _write(
    folder: Path, number: int, part: list[cache.Example], settings: dict[str, Any]
) -> dict[str, Any]:
    how = {name: settings[name] for name in ("vocab_size", "dtype", "tail")}
    return cache.write_shard(folder, number, part, **how)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on with what was begun otherwise."""
    records.check_directory(folder, "output")
    place = folder / SETTINGS
    if place.exists():
        _check_tokens(place, settings)
        records.check_settings(place, settings)
    elif any(folder.iterdir()):
        raise UserError(f"output: expected a new folder or one of tdkd cache, got {folder}")
    else:
        records.write_whole(place, settings)


def _check_tokens(place: Path, settings: dict[str, Any]) -> None:
    """Says what makes other tokens of the same data and template, where nothing else differs."""
    before = records.read_json(place)
    if [name for name, value in settings.items() if before.get(name) != value] == ["tokens_sha256"]:
        raise UserError(
            f"tokens_sha256: expected the tokens that {place.parent} was begun with, got others of "
            "the same data; a chat template that writes today's date (Llama 3) makes others every "
            'day: give the records one, as "chat_template_kwargs": {"date_string": ...}, and '
            "choose another --output to start afresh"
        )


def _finish(folder: Path, shards: int, settings: dict[str, Any], rate: str) -> None:
    told = [cache.told_of(folder, number) for number in range(shards)]
    lost = [cache.shard_name(number) for number, x in enumerate(told) if x is None]
    if lost:
        raise UserError(f"output: expected {', '.join(lost)} in {folder}, got none; run it again")
    cache.write_manifest(folder, [x for x in told if x is not None], **settings)
    _tell(cache.Cache(folder, verify=False, argument="output"), rate)


def _tell(made: cache.Cache, rate: str) -> None:
    what = made.manifest
    console.print(
        f"{made.path}: {what.examples:,} examples, {what.states:,} states, "
        f"{what.members / max(1, what.states):.1f} members a set, {what.bytes:,} bytes: "
        f"{what.bytes_a_state:.0f} a state, tokens included{rate}",
        markup=False,
        soft_wrap=True,
    )


def _checksum(model: Path) -> str:
    """That of a model's files; large ones take minutes."""
    total = sum(path.stat().st_size for path in cache.model_files(model))
    with progress_bar() as progress:
        task = progress.add_task("bytes of the teacher's checksum", total=total)
        return cache.folder_hash(model, lambda size: progress.update(task, advance=size))


def _processes(device: str | None) -> PartialState:
    """This process among those that `accelerate launch` started, each with its own device."""
    if device is None:
        return PartialState(timeout=PATIENCE)
    check_device(device)
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if state.num_processes == 1:
        state.device = torch.device(device)
    return state


def _dtype(name: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """``auto`` is the checkpoint's own, but float32 on a CPU, where halves are no faster."""
    known: dict[str, torch.dtype | Literal["auto"]] = {
        "auto": torch.float32 if device.type == "cpu" else "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise UserError(f"model-dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
