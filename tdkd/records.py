"""JSONL records: reading with clear errors, appending whole lines, and tokens for a model.

A record is what TRL calls prompt-completion: ``prompt`` and ``completion`` as strings or as chat
messages. Two fields are ours: ``truncated`` says that the completion was cut before the model ended
it, and ``references`` (a list of strings) may stand in place of, or beside, the completion.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tdkd.errors import UserError

Record = dict[str, Any]


class Encoded(NamedTuple):
    """Tokens of one record; the completion ends with EOS unless it was truncated."""

    prompt: list[int]
    completion: list[int]


def read(path: str | Path, argument: str = "data") -> list[Record]:
    """The records of a JSONL file.

    Raises:
        UserError: the file is missing or empty, or a line is no JSON object with a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{argument}: expected a JSONL file, got {path}, which is no file")
    records = []
    # not splitlines: text may hold line separators of Unicode
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{argument}: expected JSON on line {number} of {path}, got {error}"
            ) from error
        if not isinstance(record, dict) or "prompt" not in record:
            raise UserError(
                f'{argument}: expected an object with "prompt" on line {number} of {path}, got '
                f"{line[:60].decode(errors='replace')!r}"
            )
        for name in ("prompt", "completion"):
            if not _is_text(record.get(name, "")):
                raise UserError(
                    f"{argument}: expected {name} to be a string or chat messages with role and "
                    f"content on line {number} of {path}, got {str(record[name])[:60]!r}"
                )
        references = record.get("references", [])
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise UserError(
                f"{argument}: expected references to be a list of strings on line {number} of "
                f"{path}, got {str(references)[:60]!r}"
            )
        records.append(record)
    if not records:
        raise UserError(f"{argument}: expected at least one record in {path}, got none")
    return records


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )


def check_output(path: Path) -> None:
    """Makes the directory of a file to be written, or says in one line why it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: expected a file to write, got {path}: {error.strerror}"
        ) from error
    if path.is_dir():
        raise UserError(f"output: expected a file to write, got the directory {path}")


def check_at_least(least: float, **options: float | None) -> None:
    """Refuses options of a command below ``least``; ``None`` stands for no limit."""
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{name.replace('_', '-')}: expected a number >= {least}, got {value}")


def append(path: Path, records: Iterable[Record]) -> None:
    """Whole lines at the end of a file, on disk when this returns."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, multiple: int) -> int:
    """Cut what a killed process left behind to whole batches of whole lines; how many stay."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = content.split(b"\n")[:-1]  # what follows the last newline was torn
    kept = len(lines) // multiple * multiple
    size = sum(len(line) + 1 for line in lines[:kept])
    if size < len(content):
        with path.open("r+b") as file:
            file.truncate(size)
    return kept


def write_whole(path: Path, content: Any) -> None:
    """A JSON file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def messages(prompt: str | list[Record]) -> list[Record]:
    """A prompt as chat messages; a string is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def completion_text(record: Record) -> str:
    """The completion (or the first reference) as text.

    Raises:
        UserError: the record has neither.
    """
    completion = record.get("completion")
    if completion is None:
        references = record.get("references")
        if not references:
            raise UserError(
                'data: expected "completion" or "references" in each record, got '
                f"{', '.join(sorted(record))}"
            )
        return references[0]
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_ids(prompt: str | list[Record], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt, up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(
        messages(prompt), tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokens of a record through the chat template, at most ``max_length`` of them."""
    prompt = prompt_ids(record["prompt"], tokenizer)
    completion = tokenizer(completion_text(record), add_special_tokens=False).input_ids
    if not record.get("truncated", False):
        completion = [*completion, tokenizer.eos_token_id]
    return Encoded(prompt[:max_length], completion[: max(0, max_length - len(prompt))])
