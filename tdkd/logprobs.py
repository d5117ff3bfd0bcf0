"""Log-probabilities that serving engines return, as examples of a cache.

A line of the JSONL holds what was asked (``prompt``, a string or chat messages, or ``messages``)
and what came back: ``choices`` of an OpenAI-style body, or that body as ``response``, or as its
``body`` (as a batch has it). Each choice is an answer. Of one is read

- ``logprobs.content``: chat completions, ``top_logprobs`` a list of ``token`` and ``logprob``;
- ``logprobs.tokens``, ``token_logprobs``, ``top_logprobs``: completions, a mapping per token; with
  ``echo`` they begin with the prompt.

An answer that was there before, ``completion`` beside the prompt, is read of what a server says of
the tokens that it is given: vLLM's ``prompt_logprobs``, or completions with ``echo``. It was asked
for both together, as the tokenizer and its chat template put them.

Tokens are ``token_id:123`` (vLLM's ``return_tokens_as_token_ids``), which is exact, or text, which
is looked up in the tokenizer. An alternative whose text is no token, or more than one, counts as
mass outside the set; an answer with a taken token like that cannot be used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tdkd import records
from tdkd.cache import Example
from tdkd.errors import UserError
from tdkd.kernels.select_actions.reference import REACHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY_ID = "token_id:"
ARGUMENT = "served"
UNKNOWN = -9999.0
"""What servers write, at most, for a token that they tell no log-probability of."""
Sets = list[tuple[int, dict[int, float]]]
"""Taken tokens and their sets."""


class Position(NamedTuple):
    """What the server says of one token."""

    token: str
    log_prob: float | None
    top: dict[str, float]


@dataclass
class Left:
    """What of a file cannot be used."""

    answers: int = 0
    """Whole answers, and lines that hold none."""
    first: str = ""
    """Why the first of them."""
    states: int = 0
    """Of other answers: those whose taken token the server gave no probability."""

    def add(self, error: UserError) -> None:
        self.answers += 1
        self.first = self.first or str(error)

    def __str__(self) -> str:
        told = []
        if self.answers:
            told.append(f"{self.answers:,} answers left out, the first since {self.first}")
        if self.states:
            told.append(
                f"{self.states:,} states left out, since their tokens have no log-probability"
            )
        return "; ".join(told)


def read(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    k: int,
    top_p: float,
    max_length: int,
    eos: Collection[int] = (),
    left: Left | None = None,
) -> Iterator[Example]:
    """The examples of a file; answers that the server ended also end here.

    A server rarely tells what it thought of the end token. Where no such token ends an answer that
    is finished, and no stop string did, its end is learned as certain: a set that holds EOS alone.

    Args:
        path: the file.
        tokenizer: the student's, and so the teacher's.
        k: cap of a set.
        top_p: probability that a set must reach.
        max_length: tokens of an example.
        eos: every token that ends an answer, beside the tokenizer's own.
        left: told of what cannot be used.
    Raises:
        UserError: no answer of the file can be used; why, of the first.
    """
    left = Left() if left is None else left
    reader = _Reader(tokenizer, k, top_p, max_length, {tokenizer.eos_token_id, *eos}, left)
    used = False
    for number, record in records.lines(path, ARGUMENT, left.add):
        place = f"on line {number} of {path}"
        for choice in range(_choices(record)):
            try:
                example = reader(record, choice, place)
            except UserError as error:
                left.add(error)
                continue
            if example is not None:
                used = True
                yield example
    if left.answers and not used:
        raise UserError(f"{left.first}; no answer of the file can be used")
    if not used:
        raise UserError(f"{ARGUMENT}: expected at least one answer in {path}, got none")


def model_name(path: Path) -> str | None:
    """The first model that is named."""
    for _, record in records.lines(path, ARGUMENT, lambda error: None):
        name = _body(record).get("model")
        if isinstance(name, str):
            return name
    return None


def has_chats(path: Path) -> bool:
    """Whether a line needs the chat template: it holds messages, or the answer of a chat."""
    return any(_is_chat(record) for _, record in records.lines(path, ARGUMENT, lambda error: None))


def _is_chat(record: dict[str, Any]) -> bool:
    if isinstance(record.get("prompt", record.get("messages")), list):
        return True
    choices = _body(record).get("choices")
    told = [
        choice.get("logprobs")
        for choice in (choices if isinstance(choices, list) else [])
        if isinstance(choice, dict)
    ]
    return any(isinstance(given, dict) and given.get("content") is not None for given in told)


def _body(record: dict[str, Any]) -> dict[str, Any]:
    for name in ("response", "body"):
        if isinstance(record.get(name), dict):
            record = record[name]
    return record


def _choices(record: dict[str, Any]) -> int:
    """How many answers a line has; one where that cannot be told, which is an error later."""
    choices = _body(record).get("choices")
    return max(1, len(choices)) if isinstance(choices, list) else 1


class _Reader:
    """Examples of lines."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        k: int,
        top_p: float,
        max_length: int,
        eos: set[int],
        left: Left,
    ) -> None:
        self.tokenizer, self.names = tokenizer, _Names(tokenizer)
        self.k, self.top_p, self.max_length = k, top_p, max_length
        self.chat = records.Chat(tokenizer)
        self.eos, self.left = eos, left

    def __call__(self, record: dict[str, Any], number: int, place: str) -> Example | None:
        """One answer; None for one that was there before, which is the same in each choice.

        Raises:
            UserError: it cannot be used.
        """
        body, existing = _body(record), "completion" in record
        positions: list[Position] = []
        chat = False
        try:
            choice = body["choices"][number]
            asked = (body.get("usage") or {}).get("prompt_tokens")
            scored = choice.get("prompt_logprobs") or body.get("prompt_logprobs")
            if not (existing and scored):
                positions, chat = _positions(choice.get("logprobs"))
            # a stop string would be the reason, and is no token to learn
            ended = (choice.get("finish_reason"), choice.get("stop_reason")) == ("stop", None)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{ARGUMENT}: expected choices with logprobs of tokens {place}, got "
                f"{type(error).__name__}: {error}"
            ) from error
        echoed = bool(positions) and not chat and positions[0].log_prob is None
        if existing and (scored or echoed):
            if number:
                return None
            prompt, whole, kept = self._existing(record, place)
            self._same_length(asked, whole, place)
            if scored:
                positions = _scored(scored, whole, place)
            self._same_tokens(positions[: len(whole)], whole, place)
            positions, ended = positions[len(prompt) : kept], False
        else:
            prompt = self._prompt(record, chat, place)
            self._same_length(asked, prompt, place)
            if echoed:
                self._same_tokens(positions[: len(prompt)], prompt, place)
                positions = positions[len(prompt) :]
        if not prompt or not positions:
            raise UserError(
                f"{ARGUMENT}: expected a prompt and an answer {place}, got {len(prompt)} and "
                f"{len(positions)} tokens"
            )
        sets = [self._set(position, place) for position in positions]
        if ended and sets[-1][0] not in self.eos:
            eos = self.chat.end if chat else self.tokenizer.eos_token_id
            sets.append((eos, {eos: 0.0}))
        return self._example(prompt, sets, place)

    def _example(self, prompt: list[int], sets: Sets, place: str) -> Example:
        sets = sets[: max(0, self.max_length - len(prompt))]
        known = [held for _, held in sets if held]
        if not known:
            raise UserError(
                f"{ARGUMENT}: expected an answer that begins within {self.max_length} tokens, and "
                f"a log-probability of a taken token, {place}, got none"
            )
        self.left.states += len(sets) - len(known)
        masses = np.array([sum(map(math.exp, held.values())) for held in known])
        eps = np.finfo(np.float32).eps
        return Example(
            input_ids=np.array([*prompt, *(taken for taken, _ in sets)]),
            mask=np.array([False] * len(prompt) + [bool(held) for _, held in sets]),
            count=np.array([len(held) for held in known]),
            ids=np.concatenate([list(held) for held in known]).astype(np.int64),
            log_probs=np.concatenate([list(held.values()) for held in known]).astype(np.float32),
            log_tail=np.log(np.maximum(1 - masses, eps)).astype(np.float32),
        )

    def _prompt(self, record: dict[str, Any], chat: bool, place: str) -> list[int]:
        asked = record.get("prompt", record.get("messages"))
        if isinstance(asked, list) or (isinstance(asked, str) and chat):
            return self._chat(record, records.messages(asked), place, add_generation_prompt=True)
        if isinstance(asked, str):
            ids: list[int] = self.tokenizer(asked).input_ids
            return ids
        raise UserError(
            f"{ARGUMENT}: expected a prompt or messages {place}, got "
            f"{', '.join(sorted(record)) or 'nothing'}"
        )

    def _existing(self, record: dict[str, Any], place: str) -> tuple[list[int], list[int], int]:
        """The tokens of a prompt that its completion leaves as they are, those of both, and how
        many of these are kept: of an answer that was cut, none behind its content."""
        alone = self._prompt(record, False, place)
        prompt: Any = record.get("prompt", record.get("messages"))
        completion = record["completion"]
        if isinstance(prompt, list) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if type(prompt) is not type(completion):
            raise UserError(
                f"{ARGUMENT}: expected prompt and completion as strings or chat messages {place}, "
                f"got {type(prompt).__name__} and {type(completion).__name__}"
            )
        whole: list[int]
        if isinstance(prompt, list):
            whole = self._chat(record, prompt + completion, place)
        else:
            whole = self.tokenizer(prompt + completion).input_ids
        same = 0
        while same < min(len(alone), len(whole)) and alone[same] == whole[same]:
            same += 1
        kept = len(whole)
        if record.get("truncated") and isinstance(prompt, list):
            kept = self._until_cut({**record, "prompt": prompt}, whole, place)
        return whole[:same], whole, kept

    def _until_cut(self, record: dict[str, Any], whole: list[int], place: str) -> int:
        """How many tokens of a conversation come before the end that the template gives it."""
        try:
            encoded = self.chat.encode(record)
        except UserError as error:
            raise UserError(f"{ARGUMENT}: {error} {place}") from error
        cut = encoded.prompt + encoded.completion
        if whole[: len(cut)] != cut:
            raise UserError(
                f"{ARGUMENT}: expected the chat template to write an answer that was cut as its "
                f"prompt, and then its content, {place}, got other tokens"
            )
        return len(cut)

    def _chat(
        self,
        record: dict[str, Any],
        messages: list[records.Record],
        place: str,
        **options: bool,
    ) -> list[int]:
        expected = f"{ARGUMENT}: expected messages that the chat template takes {place}"
        try:
            told = records.template_options(record)
        except UserError as error:
            raise UserError(f"{ARGUMENT}: {error} {place}") from error
        text = records.render(messages, self.tokenizer, expected, **{**told, **options})
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _same_length(self, asked: Any, ids: list[int], place: str) -> None:
        """Refuses what the server read as more or fewer tokens than stand here."""
        if asked is not None and asked != len(ids):
            raise UserError(
                f"{ARGUMENT}: expected the {len(ids)} tokens of the tokenizer and its chat "
                f"template to be what the server was asked {place}, got usage.prompt_tokens of "
                f"{asked}"
            )

    def _same_tokens(self, positions: list[Position], ids: list[int], place: str) -> None:
        named = [self.names.id_of(position.token) for position in positions]
        if named != ids:
            raise UserError(
                f"{ARGUMENT}: expected the {len(ids)} tokens that the tokenizer and its chat "
                f"template make of what was asked {place}, got others"
            )

    def _set(self, position: Position, place: str) -> tuple[int, dict[int, float]]:
        """The taken token and its set, by probability descending, the lowest id first among
        equals; an empty one where the token has no log-probability."""
        taken = self.names.id_of(position.token)
        if taken is None:
            raise UserError(
                f"{ARGUMENT}: expected every taken token to be one of the tokenizer {place}, got "
                f"{position.token!r}; let the server return ids (vLLM: return_tokens_as_token_ids)"
            )
        own = UNKNOWN if position.log_prob is None else position.log_prob
        found = {self.names.id_of(token): log_prob for token, log_prob in position.top.items()}
        found[taken] = own
        log_probs = {i: x for i, x in found.items() if i is not None}
        if not all(-math.inf <= x <= 0.01 for x in log_probs.values()):
            raise UserError(
                f"{ARGUMENT}: expected log-probabilities, of at most 0, {place}, got "
                f"{max(log_probs.values())}"
            )
        if own <= UNKNOWN:
            return taken, {}
        chosen: dict[int, float] = {}
        mass = 0.0
        for i, x in sorted(log_probs.items(), key=lambda item: (-item[1], item[0])):
            if x <= UNKNOWN or len(chosen) == self.k or mass >= self.top_p * REACHED:
                break
            chosen[i] = min(x, 0.0)
            mass += math.exp(x)
        if taken not in chosen:
            if len(chosen) == self.k:
                chosen.popitem()
            chosen[taken] = min(own, 0.0)
        return taken, chosen


def _positions(given: dict[str, Any]) -> tuple[list[Position], bool]:
    """What the server says of each token, and whether it was a chat."""
    if given.get("content") is not None:
        return [
            Position(
                str(x["token"]),
                float(x["logprob"]),
                {str(t["token"]): float(t["logprob"]) for t in x.get("top_logprobs") or []},
            )
            for x in given["content"]
        ], True  # fmt: skip
    tokens = given["tokens"]
    columns = given["token_logprobs"], given.get("top_logprobs") or [None] * len(tokens)
    return [
        Position(
            str(token),
            None if log_prob is None else float(log_prob),
            {str(t): float(x) for t, x in (top or {}).items()},
        )
        for token, log_prob, top in zip(tokens, *columns, strict=True)
    ], False  # fmt: skip


def _scored(listed: Any, ids: list[int], place: str) -> list[Position]:
    """What vLLM says of the tokens that it was given; nothing of the first."""
    try:
        if len(listed) != len(ids):
            raise ValueError(f"{len(listed)} positions for {len(ids)} tokens")
        found = [
            {str(i): float(x["logprob"]) for i, x in (position or {}).items()}
            for position in listed
        ]
        return [
            Position(
                f"{BY_ID}{taken}",
                None if position is None else told[str(taken)],
                {f"{BY_ID}{i}": x for i, x in told.items()},
            )
            for taken, position, told in zip(ids, listed, found, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{ARGUMENT}: expected prompt_logprobs of the tokens that the tokenizer and its chat "
            f"template make of prompt and completion {place}, got {type(error).__name__}: {error}"
        ) from error


class _Names:
    """Tokens by what a server calls them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.size = len(tokenizer)
        # after another token: at the start some tokenizers drop the space that a token begins with
        anchor = tokenizer("a", add_special_tokens=False).input_ids[-1]
        before = len(tokenizer.decode([anchor]))
        whole = [[anchor, i] for i in range(self.size)]
        self.ids: dict[str, int | None] = {}
        for i, text in enumerate(tokenizer.batch_decode(whole, skip_special_tokens=False)):
            name = text[before:]
            # what two tokens are called names neither
            self.ids[name] = None if name in self.ids else i

    def id_of(self, name: str) -> int | None:
        if name.startswith(BY_ID):
            number = name[len(BY_ID) :]
            known = number.isdecimal() and int(number) < self.size
            return int(number) if known else None
        return self.ids.get(name)
