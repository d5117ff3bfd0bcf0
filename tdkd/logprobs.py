"""Log-probabilities that serving engines return, as examples of a cache.

A line of the JSONL holds what was asked (``prompt``, a string or chat messages, or ``messages``)
and what came back: ``choices`` of an OpenAI-style body, or that body as ``response``, or as its
``body`` (as a batch has it). Of the first choice is read

- ``logprobs.content``: chat completions, ``top_logprobs`` a list of ``token`` and ``logprob``;
- ``logprobs.tokens``, ``token_logprobs``, ``top_logprobs``: completions, a mapping per token.

Tokens are ``token_id:123`` (vLLM's ``return_tokens_as_token_ids``), which is exact, or text, which
is looked up in the tokenizer. An alternative whose text is no token, or more than one, counts as
mass outside the set; a taken token like that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tdkd import records
from tdkd.cache import Example
from tdkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY_ID = "token_id:"
ARGUMENT = "served"


class Position(NamedTuple):
    """What the server says of one token."""

    token: str
    log_prob: float
    top: dict[str, float]


def read(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    k: int,
    top_p: float,
    max_length: int,
) -> Iterator[Example]:
    """The examples of a file; answers that the server ended also end here.

    A server rarely tells what it thought of the end token. Where it is not among the tokens, the
    end of a finished answer is learned as certain: a set that holds EOS alone.

    Raises:
        UserError: a line has none of the forms above, or a token that the tokenizer lacks.
    """
    names = _Names(tokenizer)
    empty = True
    for number, record in records.lines(path, ARGUMENT):
        place = f"on line {number} of {path}"
        positions, finished, chat = _positions(record, place)
        prompt = _prompt(record, tokenizer, chat, place)
        sets = [_members(position, names, k, top_p, place) for position in positions]
        eos = tokenizer.eos_token_id
        if finished and sets and sets[-1][0] != eos:
            sets.append((eos, {eos: 0.0}))
        sets = sets[: max(0, max_length - len(prompt))]
        if not sets or not prompt:
            continue
        empty = False
        masses = np.array([sum(map(math.exp, s.values())) for _, s in sets])
        eps = np.finfo(np.float32).eps
        yield Example(
            input_ids=np.array([*prompt, *(taken for taken, _ in sets)]),
            mask=np.arange(len(prompt) + len(sets)) >= len(prompt),
            count=np.array([len(s) for _, s in sets]),
            ids=np.concatenate([list(s) for _, s in sets]).astype(np.int64),
            log_probs=np.concatenate([list(s.values()) for _, s in sets]).astype(np.float32),
            log_tail=np.log(np.maximum(1 - masses, eps)).astype(np.float32),
        )
    if empty:
        raise UserError(
            f"{ARGUMENT}: expected an answer that begins within {max_length} tokens in {path}, got "
            "none"
        )


def model_name(path: Path) -> str | None:
    """The model that the first line names."""
    for _, record in records.lines(path, ARGUMENT):
        name = _body(record).get("model")
        return name if isinstance(name, str) else None
    return None


def _body(record: dict[str, Any]) -> dict[str, Any]:
    for name in ("response", "body"):
        if isinstance(record.get(name), dict):
            record = record[name]
    return record


def _positions(record: dict[str, Any], place: str) -> tuple[list[Position], bool, bool]:
    """What the server says of each token, whether it ended there, and whether it was a chat."""
    try:
        choice = _body(record)["choices"][0]
        given = choice["logprobs"]
        finished = choice.get("finish_reason") == "stop"
        if given.get("content") is not None:
            return [
                Position(
                    str(x["token"]),
                    float(x["logprob"]),
                    {str(t["token"]): float(t["logprob"]) for t in x.get("top_logprobs") or []},
                )
                for x in given["content"]
            ], finished, True  # fmt: skip
        columns = given["tokens"], given["token_logprobs"], given["top_logprobs"]
        return [
            Position(str(token), float(log_prob), {str(t): float(x) for t, x in top.items()})
            for token, log_prob, top in zip(*columns, strict=True)
        ], finished, False  # fmt: skip
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{ARGUMENT}: expected choices with logprobs of tokens {place}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _prompt(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, place: str
) -> list[int]:
    asked = record.get("prompt", record.get("messages"))
    if isinstance(asked, list) or (isinstance(asked, str) and chat):
        return records.prompt_ids(asked, tokenizer)
    if isinstance(asked, str):
        ids: list[int] = tokenizer(asked).input_ids
        return ids
    raise UserError(
        f"{ARGUMENT}: expected a prompt or messages {place}, got "
        f"{', '.join(sorted(record)) or 'nothing'}"
    )


def _members(
    position: Position, names: _Names, k: int, top_p: float, place: str
) -> tuple[int, dict[int, float]]:
    """The taken token and its set, by probability descending, the lowest id first among equals."""
    taken = names.id_of(position.token)
    if taken is None:
        raise UserError(
            f"{ARGUMENT}: expected every taken token to be one of the tokenizer {place}, got "
            f"{position.token!r}; let the server return ids (vLLM: return_tokens_as_token_ids)"
        )
    found = {names.id_of(token): log_prob for token, log_prob in position.top.items()}
    found[taken] = position.log_prob
    log_probs = {i: x for i, x in found.items() if i is not None}
    if not all(-math.inf <= x <= 0.01 for x in log_probs.values()):
        raise UserError(
            f"{ARGUMENT}: expected log-probabilities, of at most 0, {place}, got "
            f"{max(log_probs.values())}"
        )
    chosen: dict[int, float] = {}
    mass = 0.0
    for i, x in sorted(log_probs.items(), key=lambda item: (-item[1], item[0])):
        if len(chosen) == k or mass >= top_p * (1 - 1e-5):
            break
        chosen[i] = min(x, 0.0)
        mass += math.exp(x)
    if taken not in chosen:
        if len(chosen) == k:
            chosen.popitem()
        chosen[taken] = min(position.log_prob, 0.0)
    return taken, chosen


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
