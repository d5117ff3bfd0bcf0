"""The student's own answers to the prompts of the data: sampling, replay, and where time goes.

A step draws everything from its number and the seed, so that a run that goes on from a checkpoint
does what an unbroken one does.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdkd.bootstrap import without_value_head
from tdkd.errors import UserError, missing
from tdkd.models import backbone, cache_argument, generating, left_padded, lm_head
from tdkd.objectives import Objective

try:
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
    from trl.generation import vllm_generation
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

logger = logging.getLogger("tdkd")

IGNORED = -100
SHARED = 4098
"""What all processes draw is drawn as if by this rank."""
Batch = dict[str, Any]
Tokens = list[int]


class Answer(NamedTuple):
    """A prompt and what was sampled after it; the answer ends with EOS, or was cut."""

    prompt: Tokens
    completion: Tokens


@dataclass(frozen=True)
class Sampling:
    """The law that answers are drawn from."""

    max_completion_length: int = 512
    temperature: float = 1.0
    """divides the logits; 0 is greedy."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    teacher_mixture: float = 0.0
    """Probability that a token is the teacher's."""
    vocab_size: int | None = None
    """Columns at and above it are padding."""
    positions: int | None = None
    """What a prompt and its answer may take together: there too an answer is cut."""

    def room(self, prompt: Tokens) -> int:
        """Tokens that the answer to a prompt may have.

        Raises:
            UserError: there is no room for one.
        """
        if self.positions is None:
            return self.max_completion_length
        if len(prompt) >= self.positions:
            raise UserError(
                f"max_length: expected prompts of fewer tokens than the {self.positions} positions "
                f"(max_position_embeddings) of student and teacher, got one of {len(prompt)}"
            )
        return min(self.max_completion_length, self.positions - len(prompt))

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities ``[B, V]``, float32, from logits ``[B, columns]``, columns <= V or padding.

        Filters apply as in transformers: temperature, top-k, top-p.
        """
        logits = logits[:, : self.vocab_size].float()
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probs.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token ``[B]`` at which each row's distribution function passes a number in [0, 1)."""
    reached = probs.cumsum(-1)
    point = uniform.to(reached).unsqueeze(-1) * reached[:, -1:]
    token = torch.searchsorted(reached, point, right=True).clamp(max=probs.shape[-1] - 1)
    # rounding may point beyond the last token with a probability, or between two
    possible = probs.gather(-1, token) > 0
    return torch.where(possible, token, probs.argmax(-1, keepdim=True)).squeeze(-1)


class Stepwise:
    """Next-token logits of a model, one new token at a time: it keeps its keys and values."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        self.body = backbone(model)
        self.head = lm_head(model)
        name = cache_argument(model)
        assert name is not None  # see check
        self.name = name
        self.mask = mask
        self.cache: Any = None
        self.seen = 0
        self.positioned = "position_ids" in inspect.signature(self.body.forward).parameters

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits ``[B, V]`` after ids ``[B, T]``, of which earlier calls have seen the first."""
        new = ids.shape[1] - self.mask.shape[1]
        self.mask = nn.functional.pad(self.mask, (0, new), value=1)
        options: dict[str, Any] = {self.name: self.cache}
        if self.positioned:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, self.seen :]
        out = self.body(
            input_ids=ids[:, self.seen :],
            attention_mask=self.mask,
            use_cache=True,
            **options,
        )
        self.cache, self.seen = out[self.name], ids.shape[1]
        return self.head.logits(out.last_hidden_state[:, -1])


class Sampler(LogitsProcessor):
    """Sampling as greedy search: every token but the drawn one gets -inf.

    One number a token decides, from a table made beforehand. ``generate``'s own sampler takes V
    numbers from the global generator, which a resumed run would find elsewhere.
    """

    def __init__(
        self,
        sampling: Sampling,
        uniform: Tensor,
        teacher: Stepwise | None,
        prefilled: Callable[[], None],
    ) -> None:
        self.sampling = sampling
        self.uniform = uniform
        self.teacher = teacher
        self.prefilled = prefilled
        """Called when the prompts have been seen."""
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = self.sampling.law(scores)
        if self.teacher is not None:
            other = self.sampling.law(self.teacher(input_ids))
            # heads may be padded differently
            width = max(probs.shape[-1], other.shape[-1])
            probs, other = (nn.functional.pad(p, (0, width - p.shape[-1])) for p in (probs, other))
            probs = torch.lerp(probs, other, self.sampling.teacher_mixture)
        if self.step == 0:
            self.prefilled()
        token = draw(probs, self.uniform[:, self.step])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, token.unsqueeze(-1), 0.0)


def sample(
    student: nn.Module,
    prompts: list[Tokens],
    sampling: Sampling,
    *,
    eos: list[int],
    pad_token_id: int,
    generator: torch.Generator,
    teacher: nn.Module | None = None,
    batch_size: int | None = None,
    clock: Clock | None = None,
) -> list[Tokens]:
    """One answer to each prompt, from transformers' ``generate`` with its cache.

    Args:
        student: a causal language model; adapters of PEFT are fine, wrappers of accelerate are not.
        prompts: token ids; none is empty. They are padded on the left.
        sampling: the law.
        eos: tokens that end an answer.
        pad_token_id: what stands on the left of shorter prompts.
        generator: a CPU generator; answer i takes its numbers from row i of one table.
        teacher: for ``sampling.teacher_mixture`` > 0: token by token the law is
            ``(1 - mixture) student + mixture teacher`` (MiniLLM, arXiv 2306.08543), each with the
            filters on.
        batch_size: answers that are written at once, None for all. Memory of keys and values is
            theirs; answers change no more than by the rounding of other paddings.
        clock: counts under "prefill" until all of a batch of prompts have been seen.
    Returns:
        For each prompt its new tokens, with the EOS that ended them; one that was cut has none.
    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    model: Any = student.get_base_model() if hasattr(student, "get_base_model") else student  # type: ignore[operator]
    table = torch.rand(len(prompts), sampling.max_completion_length, generator=generator)
    mixed = teacher if sampling.teacher_mixture else None
    answers: dict[int, Tokens] = {}
    for rows, room in _together(prompts, sampling, batch_size):
        ids, mask = left_padded([prompts[i] for i in rows], pad_token_id, model.device)
        config = GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=eos, pad_token_id=pad_token_id
        )
        sampler = Sampler(
            sampling,
            table[rows].to(model.device),
            None if mixed is None else Stepwise(mixed, mask),
            (lambda: None) if clock is None else partial(clock.add, "prefill", clock.now()),
        )
        with generating(model, config):
            out = model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        written = [_ended(row, eos) for row in out[:, ids.shape[1] :].tolist()]
        answers.update(zip(rows, written, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _together(
    prompts: list[Tokens], sampling: Sampling, batch_size: int | None
) -> Iterator[tuple[list[int], int]]:
    """Which prompts are answered at once, and the room for their answers, which is the same."""
    room = [sampling.room(prompt) for prompt in prompts]
    # neighbours of one length waste no padding
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for here, group in groupby(order, key=room.__getitem__):
        rows = list(group)
        size = batch_size or len(rows)
        for first in range(0, len(rows), size):
            yield rows[first : first + size], here


def _ended(tokens: Tokens, eos: list[int]) -> Tokens:
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[: end + 1]


class VLLM:
    """Answers from vLLM in the training process, by TRL's integration.

    The student's weights are pushed to it before each generation, without its value head, which
    changes no probability and has no place there. Its randomness is its own: a run that goes on
    from a checkpoint gets other answers than an unbroken one.

    Args:
        student: TRL's trainer's model, PEFT or plain; vLLM starts from its ``name_or_path``.
        accelerator: of the trainer.
        tokenizer: of the student.
        sampling: the law; without a teacher in it.
        eos: tokens that end an answer.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes.
        batch_size: answers that it writes at once; None leaves it to vLLM.
    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        student: nn.Module,
        accelerator: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        eos: list[int],
        gpu_memory_utilization: float,
        batch_size: int | None = None,
    ) -> None:
        self.eos = eos
        self.student = student
        try:
            self.engine = vllm_generation.VLLMGeneration(
                student,
                accelerator,
                tokenizer,
                mode="colocate",
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=batch_size,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_completion_length=sampling.max_completion_length,
                generation_kwargs={"stop_token_ids": eos},
            )
        except ImportError as error:
            raise UserError(f"use_vllm: expected vLLM to be installed, got {error}") from error

    def __call__(self, prompts: list[Tokens], generator: torch.Generator) -> list[Tokens]:
        """One answer to each prompt, as :func:`sample` gives them; ``generator`` has no say."""
        with without_value_head(self.student):
            self.engine.sync_weights()
        _, completions, *_ = self.engine.generate(prompts, None, 1)
        return [_ended(list(completion), self.eos) for completion in completions]


class Replay:
    """The last ``size`` answers, to be learned from again."""

    def __init__(self, size: int) -> None:
        self.answers: deque[Answer] = deque(maxlen=size)

    def add(self, answers: list[Answer]) -> None:
        """Keeps them; the oldest go where there is no room."""
        self.answers.extend(answers)

    def sample(self, count: int, generator: torch.Generator) -> list[Answer]:
        """``count`` of them, distinct where there are as many."""
        held = len(self.answers)
        if count <= held:
            chosen = torch.randperm(held, generator=generator)[:count]
        else:
            chosen = torch.randint(held, (count,), generator=generator)
        return [self.answers[i] for i in chosen.tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        """int32: all tokens in a row, and the lengths ``[answers, 2]``."""
        flat = [token for answer in self.answers for part in answer for token in part]
        lengths = [[len(part) for part in answer] for answer in self.answers]
        return {
            "tokens": torch.tensor(flat, dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32).reshape(-1, 2),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts back what :meth:`state_dict` gave."""
        parts = state["tokens"].split(state["lengths"].flatten().tolist())
        self.answers.clear()
        for prompt, completion in zip(parts[::2], parts[1::2], strict=True):
            self.answers.append(Answer(prompt.tolist(), completion.tolist()))


def sequences(batch: Batch) -> list[tuple[Tokens, Tokens]]:
    """``(input_ids, labels)`` of every sequence of a collated batch, padded or padding-free."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if "attention_mask" in batch:
        here = batch["attention_mask"].bool().cpu()
        rows = zip(ids, labels, here, strict=True)
        return [(i[keep].tolist(), of[keep].tolist()) for i, of, keep in rows]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    spans = [slice(*span) for span in zip(starts, ends, strict=True)]
    return [(ids[0, span].tolist(), labels[0, span].tolist()) for span in spans]


class Rollouts:
    """Puts the student's own answers in place of some of the data's.

    Args:
        collate: makes a batch of ``{"input_ids", "labels"}`` of each sequence, as the data's are.
        lmbda: probability that a sequence becomes the student's own answer to its prompt.
        replay_size: answers that are kept.
        replay_ratio: probability that a step takes its answers from those in place of new ones, in
            all processes or in none: one that writes answers keeps the others waiting.
        eos: tokens that end an answer.
        seed: of the run; ``rank`` of the process.
        total: adds a tensor up over the processes.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Tokens]]], Batch],
        *,
        lmbda: float,
        replay_size: int,
        replay_ratio: float,
        eos: list[int],
        seed: int,
        rank: int,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        self.collate = collate
        self.lmbda = lmbda
        self.replay_ratio = replay_ratio
        self.replay = Replay(replay_size)
        self.eos = eos
        self.seed = seed
        self.rank = rank
        self.total = total

    def __call__(
        self,
        batches: list[Batch],
        step: int,
        answer: Callable[[list[Tokens], torch.Generator], list[Tokens]],
    ) -> tuple[list[Batch], dict[str, float]]:
        """The micro-batches of a step with answers in them.

        All of a step are sampled at once: how long that takes is a matter of tokens in a row, not
        of how many rows there are.

        Args:
            batches: as the data loader gave them.
            step: number of the optimizer step.
            answer: the answers to prompts, as :func:`sample` gives them.
        Returns:
            ``(batches, metrics)``: batches with ``expert_weight``, float32 like ``labels``, as
            :func:`tdkd.ops.td_loss` takes it; and what the log shows.
        Raises:
            UserError: a sequence has no prompt.
        """
        if step == 0:  # a run begins, perhaps not this trainer's first
            self.replay.answers.clear()
        generator = self._generator(step, self.rank)
        given = [sequences(batch) for batch in batches]
        places = [
            (b, i)
            for b, batch in enumerate(given)
            for i, (_, labels) in enumerate(batch)
            if any(label != IGNORED for label in labels[1:])
        ]
        chosen = torch.rand(len(places), generator=generator) < self.lmbda
        places = [place for place, own in zip(places, chosen.tolist(), strict=True) if own]
        if self._again(step):
            answers = self.replay.sample(len(places), generator)
        else:
            prompts = [self._prompt(*given[b][i]) for b, i in places]
            completions = answer(prompts, generator) if prompts else []
            answers = [Answer(*pair) for pair in zip(prompts, completions, strict=True)]
            self.replay.add(answers)
        own = dict(zip(places, answers, strict=True))
        made = [
            self._batch(batch, {i: answer for (b, i), answer in own.items() if b == number})
            for number, batch in enumerate(given)
        ]
        counts = torch.tensor(
            [
                sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in made),
                sum(len(answer.completion) for answer in answers),
                len(answers),
                sum(answer.completion[-1] not in self.eos for answer in answers),
            ]
        )
        learned, answered, answers_in_all, cut = self.total(counts).tolist()
        weight = learned / (learned - answered) if learned > answered else 0.0
        for batch in made:
            batch["expert_weight"] = torch.where(batch.pop("on_policy"), 0.0, weight)
        metrics = {"on_policy": answered / max(1, learned)}
        if answers_in_all:
            metrics["completions/mean_length"] = answered / answers_in_all
            metrics["completions/clipped_ratio"] = cut / answers_in_all
        return made, metrics

    def _prompt(self, ids: Tokens, labels: Tokens) -> Tokens:
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        # TRL hides the first token of each sequence of a padding-free batch, prompt or not
        if first <= int(getattr(self.collate, "padding_free", False)):
            raise UserError(
                "lmbda: expected examples with a prompt (prompt and completion, or messages with "
                "assistant_only_loss) to generate from, got one that is learned from its beginning"
            )
        return ids[:first]

    def _generator(self, step: int, of: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 4099 + of)

    def _again(self, step: int) -> bool:
        """Whether a step learns from kept answers. All processes say the same: they draw from one
        generator, and one that holds none yet, as the new one of a larger run, speaks for all."""
        shared = self._generator(step, SHARED)
        if torch.rand((), generator=shared).item() >= self.replay_ratio:
            return False
        return not self.total(torch.tensor([int(not self.replay.answers)])).item()

    def _batch(self, given: list[tuple[Tokens, Tokens]], own: dict[int, Answer]) -> Batch:
        pairs = list(given)
        for i, (prompt, completion) in own.items():
            pairs[i] = (prompt + completion, [IGNORED] * len(prompt) + completion)
        batch = self.collate([{"input_ids": ids, "labels": labels} for ids, labels in pairs])
        # the collator knows where each sequence goes
        flags = [[int(i in own)] * len(ids) for i, (ids, _) in enumerate(pairs)]
        placed = self.collate(
            [{"input_ids": ids, "labels": f} for (ids, _), f in zip(pairs, flags, strict=True)]
        )
        batch["on_policy"] = (placed["labels"] == 1) & (batch["labels"] != IGNORED)
        return batch

    def save(self, folder: Path) -> None:
        """Writes the answers that are kept; the folder is one of a checkpoint being made."""
        torch.save(self.replay.state_dict(), folder / self._name)

    def load(self, folder: Path) -> None:
        """Puts back the answers of a checkpoint; that of a run that kept none has no file."""
        self.replay.answers.clear()
        file = folder / self._name
        if file.is_file():
            self.replay.load_state_dict(torch.load(file, weights_only=True))
        elif self.replay.answers.maxlen:
            logger.warning("replay: no %s in %s, beginning with none", file.name, folder)

    @property
    def _name(self) -> str:
        return f"replay_{self.rank}.pt"


def check(
    args: Any, objective: Objective | None, collator: Any, teacher: nn.Module | None, *, whole: bool
) -> None:
    """Refuses what answers of the student cannot be made or learned from with.

    Args:
        args: a :class:`tdkd.config.TDConfig` with ``lmbda`` > 0.
        objective: what is minimised; None for a plain warm start.
        collator: the trainer's.
        teacher: the one that scores; None where the objective is.
        whole: whether each process holds all weights.
    Raises:
        UserError: naming what does not fit.
    """
    if objective is None:
        raise UserError(f"lmbda: expected 0 without a teacher's objective, got {args.lmbda}")
    if not whole:
        raise UserError(
            f"lmbda: expected 0 with FSDP or DeepSpeed, whose weights are sharded, got {args.lmbda}"
        )
    if not isinstance(collator, DataCollatorForLanguageModeling):
        raise UserError(
            "data_collator: expected TRL's DataCollatorForLanguageModeling with lmbda > 0, got "
            f"{type(collator).__name__}"
        )
    if args.packing and args.packing_strategy != "bfd":
        raise UserError(
            "packing_strategy: expected 'bfd', which keeps prompts whole, with lmbda > 0, got "
            f"{args.packing_strategy!r}"
        )
    if args.lmbda == 1 and (args.lm_weight or objective.demonstrations):
        raise UserError(
            "lmbda: expected a number < 1 with lm_weight or with an objective that learns from the "
            f"data's own tokens, got 1 with lm_weight {args.lm_weight} and {objective!r}"
        )
    if (args.generation_batch_size or 0) % args.world_size:
        raise UserError(
            f"generation_batch_size: expected a multiple of the {args.world_size} processes, got "
            f"{args.generation_batch_size}"
        )
    if args.teacher_mixture and cache_argument(teacher) is None:
        raise UserError(
            "teacher_mixture: expected a teacher that keeps keys and values, to write token by "
            f"token, got {type(teacher).__name__}; set it to 0"
        )


class Clock:
    """Seconds spent in named parts of a step, on the device's own clock where it has one.

    On a GPU a part is two events, which are read when the log is written: no step waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self.steps = 0
        """Steps since the last reading."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what happens inside for ``name``."""
        start = self.now()
        yield
        self.add(name, start)

    def expect(self, name: str) -> None:
        """Names a part that may not happen: all processes must tell the same ones."""
        self.spans.setdefault(name, [])

    def now(self) -> Any:
        """A moment."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any) -> None:
        """Counts what has happened since ``start`` for ``name``."""
        self.spans.setdefault(name, []).append((start, self.now()))

    def read(self) -> dict[str, float]:
        """Seconds a step of each part, since the last call."""
        spans, steps = self.spans, max(1, self.steps)
        self.spans, self.steps = {}, 0
        seconds = {
            name: sum(self._between(*span) for span in of) / steps for name, of in spans.items()
        }
        if "learn" in seconds:  # the teacher scores within it
            seconds["learn"] -= seconds.get("score", 0.0)
        return seconds

    def _between(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
