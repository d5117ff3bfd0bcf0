"""Training one student by one method: AdamW, warm-up, cosine; resumes where it was killed."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from data import Batch, Examples, order
from methods import Method
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tdkd import records
from tdkd.bootstrap import TargetNetwork, add_value_head, state_value
from tdkd.cli.generate import sample
from tdkd.models import Head, last_hidden_state, lm_head
from tdkd.ops import ActionSet

CHECKPOINT_SECONDS = 600.0


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Examples,
    method: Method,
    folder: Path,
    *,
    steps: int,
    size: int,
    rate: float,
    seed: int,
    look: Callable[[PreTrainedModel], dict[str, float]],
    looks: int = 5,
) -> list[dict[str, Any]]:
    """Trains in place, writes ``model`` and ``log.json`` into the folder, and returns the log.

    Where a gradient is not finite it ends early, without ``model``.

    ``look``: scores of the student on its way, under ``scores`` of so many of the log's steps,
    evenly, the last included.
    """
    student.train()
    if method.value_head:
        add_value_head(student, student.config.hidden_size)
    parameters = dict(student.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    target = None
    if method.target_decay is not None:
        target = TargetNetwork(student, method.target_decay)
    slow = {} if target is None else dict(target.network.named_parameters())
    log: list[dict[str, Any]] = []
    saved = folder / "checkpoint.safetensors"
    if saved.exists():
        log = _restore(saved, parameters, optimiser, slow)
    heads, at = (lm_head(student), lm_head(teacher)), time.monotonic()
    for step, chosen in enumerate(order(len(examples), size, steps, seed)):
        if step < len(log):
            continue
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(step, steps)
        began = time.perf_counter()
        batch = drawn(student, teacher, examples, chosen, method, seed=seed * 1_000_003 + step)
        network = None if target is None else target.network
        loss, told = forward(student, *heads, batch, method, target=network)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if not math.isfinite(float(norm)):
            records.write_whole(folder / "log.json", log)
            return log
        optimiser.step()
        if target is not None:
            target.on_optimizer_step(None, SimpleNamespace(global_step=step), None)
        optimiser.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        log.append(
            {"loss": loss.item(), "grad_norm": float(norm), "tokens": batch.tokens.numel(),
             "seconds": seconds, **told}
        )  # fmt: skip
        print(f"  {step + 1}/{steps} loss {log[-1]['loss']:.4f} ({seconds:.1f} s)", flush=True)
        if (step + 1) * looks // steps > step * looks // steps:
            student.eval()
            log[-1]["scores"] = look(student)
            student.train()
        if time.monotonic() - at > CHECKPOINT_SECONDS:
            _save(saved, parameters, optimiser, slow, log)
            at = time.monotonic()
    student.eval()
    student.save_pretrained(folder / "model")
    records.write_whole(folder / "log.json", log)
    saved.unlink(missing_ok=True)
    return log


def drawn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Examples,
    chosen: list[int],
    method: Method,
    seed: int,
) -> Batch:
    """The batch of a step: the examples, or the student's own answers to their prompts."""
    if not method.lmbda:
        return examples.batch(chosen)
    source = random.Random(seed)
    mine = [at for at in range(len(chosen)) if source.random() < method.lmbda]
    own: dict[int, records.Encoded] = {}
    if mine:
        prompts = [examples.encoded[chosen[at]].prompt for at in mine]
        student.eval()
        answers = sample(
            student, examples.tokenizer, prompts, max_new_tokens=examples.new_tokens,
            top_k=student.config.vocab_size, seed=seed,
        )  # fmt: skip
        student.train()
        for at, prompt, (tokens, cut) in zip(mine, prompts, answers, strict=True):
            own[at] = records.Encoded(prompt, tokens if cut else [*tokens, examples.eos])
    batch = examples.batch(chosen, own)
    with torch.no_grad():
        hidden = last_hidden_state(teacher, input_ids=batch.ids, attention_mask=batch.mask)
    return batch._replace(teacher_hidden=hidden[batch.states])


def forward(
    student: PreTrainedModel,
    head: Head,
    teacher: Head,
    batch: Batch,
    method: Method,
    actions: ActionSet | None = None,
    target: PreTrainedModel | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, and what there is to tell of it. ``target``: whose V' it learns."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    rows = last_hidden_state(student, **inputs)[batch.states]
    slow = None
    if target is not None:
        with torch.no_grad():
            theirs = last_hidden_state(target, **inputs)[batch.states]
            slow = theirs, lm_head(target), state_value(target, theirs)
    given = batch.teacher_hidden, teacher, batch.tokens, batch.successor, actions
    value = state_value(student, rows)
    return method.loss(rows, head, *given, state_value=value, own=batch.own, target=slow)


def seconds_a_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Examples,
    methods: dict[str, Method],
    *,
    size: int,
    rounds: int = 4,
) -> dict[str, dict[str, float]]:
    """Seconds of a step of each method, in turns on the same batches: the fastest, which nothing
    else on the machine delayed.

    ``live``: the teacher's body runs, where the method needs a teacher at all. ``cache``: its sets
    are there, for methods that know the teacher by its sets alone.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    if any(method.value_head for method in methods.values()):
        add_value_head(student, student.config.hidden_size)
    body: list[float] = []
    heads = lm_head(student), lm_head(teacher)
    parameters = list(student.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=0.0)
    student.train()
    for chosen in order(len(examples), size, rounds, seed=0):
        batch = examples.batch(chosen)
        began = time.perf_counter()
        with torch.inference_mode():
            last_hidden_state(teacher, input_ids=batch.ids, attention_mask=batch.mask)
        body.append(time.perf_counter() - began)
        for name, method in methods.items():
            began = time.perf_counter()
            given = batch
            if method.lmbda:
                given = drawn(student, teacher, examples, chosen, method, seed=len(body))
            actions = method.select(given.teacher_hidden, heads[1], given.tokens)
            selected = time.perf_counter()
            # a target network takes the time of the student's own body and head
            target = None if method.target_decay is None else student
            forward(student, *heads, given, method, actions, target)[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            done = time.perf_counter()
            alone = not method.needs_teacher or method.lmbda > 0
            found = {"live": done - began + (0.0 if alone else body[-1])}
            if actions is not None and not method.needs_live_teacher:
                found["cache"] = done - selected
            for way, seconds in found.items():
                times[name].setdefault(way, []).append(seconds)
            print(f"  {name}: {found}", flush=True)
    return {
        name: {way: min(seconds) for way, seconds in found.items()} for name, found in times.items()
    }


def schedule(step: int, steps: int) -> float:
    """Linear over the first tenth, then a cosine to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * along))


def _save(
    path: Path,
    parameters: dict[str, Any],
    optimiser: torch.optim.AdamW,
    target: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    tensors: dict[str, Tensor] = {f"target/{name}": value for name, value in target.items()}
    for name, parameter in parameters.items():
        state = optimiser.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}/{name}"] = state[key]
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"log": json.dumps(log)})
    temporary.replace(path)


def _restore(
    path: Path, parameters: dict[str, Any], optimiser: torch.optim.AdamW, target: dict[str, Any]
) -> list[dict[str, Any]]:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(tensors[f"target/{name}"])
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        optimiser.state[parameter] = {
            key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")
        }
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["log"])
