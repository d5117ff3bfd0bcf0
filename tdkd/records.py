"""JSONL records: reading with clear errors, appending whole lines, and tokens for a model.

A record is what TRL calls prompt-completion: ``prompt`` and ``completion`` as strings or as chat
messages. Two fields are ours: ``truncated`` says that the completion was cut before the model ended
it, and ``references`` (a list of strings) may stand in place of, or beside, the completion.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from tdkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]


class Encoded(NamedTuple):
    """Tokens of one record; the completion ends as the template ends one, unless it was cut."""

    prompt: list[int]
    completion: list[int]


# what json raises: on no JSON, no UTF-8, an integer of 4301 digits, brackets without end
_BROKEN = (ValueError, RecursionError)
UNRENDERED = (TemplateError, TypeError, ValueError, AttributeError, KeyError)
"""What chat templates raise on messages that they do not take."""


def read(path: str | Path, argument: str = "data", *, answered: bool = False) -> list[Record]:
    """The records of a JSONL file.

    Args:
        path: the file.
        argument: what an error calls it.
        answered: every record must have a completion or references.
    Raises:
        UserError: the file is missing, empty or not to be read, or a line is no JSON object with a
            prompt.
    """
    records = []
    for number, record in lines(path, argument):
        place = f"on line {number} of {path}"
        if "prompt" not in record:
            raise UserError(
                f'{argument}: expected an object with "prompt" {place}, got {_short(record)}'
            )
        for name in ("prompt", "completion"):
            absent = name == "completion" and record.get(name) is None
            if not absent and not _is_text(record[name]):
                raise UserError(
                    f"{argument}: expected {name} to be a string or chat messages with role and "
                    f"content {place}, got {_short(record[name])}"
                )
        references = record.get("references")
        references = [] if references is None else references
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise UserError(
                f"{argument}: expected references to be a list of strings {place}, got "
                f"{_short(references)}"
            )
        if answered and record.get("completion") is None and not references:
            raise UserError(
                f'{argument}: expected "completion" or "references" {place}, got '
                f"{', '.join(sorted(record))}"
            )
        records.append(record)
    if not records:
        raise UserError(f"{argument}: expected at least one record in {path}, got none")
    return records


def lines(
    path: str | Path, argument: str, skip: Callable[[UserError], object] | None = None
) -> Iterator[tuple[int, Record]]:
    """The numbers and objects of the lines of a JSONL file, but for empty lines.

    Args:
        path: the file.
        argument: what an error calls it.
        skip: gets the error of a line that is no JSON object, which is left out then.
    Raises:
        UserError: the file is missing or cannot be read, or a line is no JSON object.
    """
    path = check_file(path, argument)
    try:
        # bytes end at \n alone: text may hold line separators of Unicode
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = _parse(line, number, path, argument)
                except UserError as error:
                    if skip is None:
                        raise
                    skip(error)
                else:
                    yield number, record
    except OSError as error:
        raise UserError(
            f"{argument}: expected a JSONL file to read, got {path}: {error.strerror or error}"
        ) from error


def check_file(path: str | Path, argument: str) -> Path:
    """Refuses what is no file.

    Raises:
        UserError: it is a folder, or not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{argument}: expected a JSONL file, got {path}, which is no file")
    return path


def _parse(line: bytes, number: int, path: Path, argument: str) -> Record:
    try:
        record = json.loads(line)
    except _BROKEN as error:
        raise UserError(
            f"{argument}: expected JSON on line {number} of {path}, got {error}"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{argument}: expected a JSON object on line {number} of {path}, got {_short(record)}"
        )
    return record


def _short(value: Any) -> str:
    return repr(str(value)[:60])


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
    expected = f"a file to write, got {path}"
    check_directory(path.parent, "output", expected)
    if path.is_dir():
        raise UserError(f"output: expected a file to write, got the directory {path}")
    if path.exists() and not path.is_file():  # which a file would take the place of
        raise UserError(f"output: expected a regular file to write, got {path}")
    if path.exists():
        with _refusing("output", expected), path.open("ab"):
            pass


def check_directory(path: Path, argument: str, what: str | None = None) -> None:
    """Makes a directory and tries whether it takes a file, or says in one line why it does not.

    Raises:
        UserError: it cannot be made, or is read-only.
    """
    with _refusing(argument, what or f"a directory to write to, got {path}"):
        path.mkdir(parents=True, exist_ok=True)
        # a mode says little: not to root, and not on a file system that is read-only
        with tempfile.TemporaryFile(dir=path):
            pass


@contextmanager
def _refusing(argument: str, expected: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # mkdir says that it exists
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{argument}: expected {expected}: {reason or error}") from error


def check_at_least(least: float, **options: float | None) -> None:
    """Refuses options of a command below ``least``; ``None`` stands for no limit."""
    for name, value in options.items():
        if value is not None and not value >= least:  # NaN is neither
            raise UserError(f"{name.replace('_', '-')}: expected a number >= {least}, got {value}")


def append(path: Path, records: Iterable[Record]) -> None:
    """Whole lines at the end of a file, on disk when this returns.

    Raises:
        UserError: the disk takes no more; the file is as it was.
    """
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    before = path.stat().st_size if path.exists() else 0
    try:
        # without a buffer, which would try again when the file is closed
        with path.open("ab", buffering=0) as file:
            _write(file.fileno(), lines.encode())
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise _unwritten(path, error) from error


def keep_lines(path: Path, multiple: int, total: int) -> int:
    """Cut what a killed process left behind to whole batches of whole lines; how many stay.

    Args:
        path: the file.
        multiple: lines of a batch.
        total: lines of the whole file, whose last batch may be smaller.
    Raises:
        UserError: a whole line is no JSON object; nothing is cut then.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.split(b"\n")[:-1]  # what follows the last newline was torn
    for number, line in enumerate(whole, 1):
        _parse(line, number, path, "output")
    kept = total if len(whole) == total else len(whole) // multiple * multiple
    size = sum(len(line) + 1 for line in whole[:kept])
    if size < len(content):
        os.truncate(path, size)
    return kept


def write_whole(path: Path, content: Any) -> None:
    """A file of JSON, or of the bytes that are given, that appears whole or not at all.

    Raises:
        UserError: the disk takes no more; what was there before is there still.
    """
    if not isinstance(content, bytes):
        content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            _write(file.fileno(), content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise _unwritten(path, error) from error


def write_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """A PNG of a matplotlib figure that appears whole or not at all.

    Raises:
        UserError: the disk takes no more.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())


def read_json(path: Path, argument: str = "output") -> dict[str, Any]:
    """The object that :func:`write_whole` wrote.

    Raises:
        UserError: it is no JSON any more, no object, or cannot be read.
    """
    try:
        held = json.loads(path.read_bytes())
    except (OSError, *_BROKEN) as error:
        raise UserError(f"{argument}: expected JSON in {path}, got {error}") from error
    if not isinstance(held, dict):
        raise UserError(f"{argument}: expected an object in {path}, got {held!r:.40}")
    return held


def check_settings(
    path: Path, settings: dict[str, Any], instead: str = "choose another --output"
) -> None:
    """Holds the settings of a command to those that its output was begun with.

    Args:
        path: where those are.
        settings: of this call.
        instead: what to do to start afresh.
    Raises:
        UserError: one of them is another.
    """
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"{name}: expected {before.get(name)!r} as in {path}, got {value!r}; {instead} to "
                "start afresh"
            )


def _write(handle: int, content: bytes) -> None:
    """All of the content, on disk when this returns; a disk may take it in parts."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
    os.fsync(handle)


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"output: expected to write to {path}, got {error.strerror or error}")


def messages(prompt: str | list[Record]) -> list[Record]:
    """A prompt as chat messages; a string is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def completion_text(record: Record) -> str:
    """The completion (or the first reference) as text.

    Raises:
        UserError: the record has neither, or its completion is not one message of the assistant
            that is text alone.
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
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise UserError(
            f"completion: expected one message, got {len(completion)}; those before the last "
            "belong to the prompt"
        )
    message = completion[0]
    if message.get("role") != "assistant":
        raise UserError(
            f"completion: expected a message of the assistant, got one of {message.get('role')!r}"
        )
    if not isinstance(message.get("content"), str):
        raise UserError(
            f"completion: expected content that is text, got {_short(message.get('content'))}"
        )
    for name in ("tool_calls", "reasoning_content"):
        if message.get(name):
            raise UserError(
                f"completion: expected a message of content alone, got one with {name}; what the "
                "assistant writes behind the generation prompt belongs to its content"
            )
    return message["content"]


def render(
    turns: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    expected: str = "prompt: expected messages that the chat template takes",
    /,
    **options: Any,
) -> str:
    """What the chat template makes of messages.

    Raises:
        UserError: the template refuses them; it says what was ``expected``.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except UNRENDERED as error:
        raise UserError(f"{expected}, got {type(error).__name__}: {error}") from error


def template_options(record: Record) -> dict[str, Any]:
    """What a record tells the chat template beside its messages: ``tools``, a list or its JSON,
    and what is in ``chat_template_kwargs``.

    Raises:
        UserError: tools are a string that is no JSON, or the others no object.
    """
    tools, others = record.get("tools"), record.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except _BROKEN as error:
            raise UserError(f"tools: expected a list or its JSON, got {error}") from error
    if not isinstance(others, dict | None):
        raise UserError(f"chat_template_kwargs: expected an object, got {_short(others)}")
    return {"tools": tools, **(others or {})}


FORM = 1
"""To be raised where :meth:`Chat.encode` comes to make other tokens: the cache of datasets knows an
object by its fields, not by its code."""


class Chat:
    """How a tokenizer's chat template writes prompts and answers.

    An answer follows the generation prompt as it is, without what a template would put into it,
    such as an empty block of thoughts. It ends with the token that ends a turn, such as
    ``<|im_end|>``, which need not be the tokenizer's EOS; what the template writes behind that is
    no part of it.

    Args:
        tokenizer: where it has no chat template, or one that takes no user turn with its answer
            alone, answers end with its EOS.
    """

    end: int
    """Id of the token that ends an answer."""
    between: str
    """White space that the template writes between the generation prompt and an answer."""
    closing: str
    """What the template writes behind an answer, up to the token that ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.form = tokenizer, FORM
        self.between, after = self._around()
        ends = [
            (at, -len(token.content), token.content, i)
            for i, token in tokenizer.added_tokens_decoder.items()
            # some vocabularies have added tokens for runs of white space
            if token.content.strip() and (at := after.find(token.content)) >= 0
        ]
        if ends:
            at, _, text, self.end = min(ends)
            self.closing = after[:at] + text
        else:
            self.closing, self.end = tokenizer.eos_token or "", tokenizer.eos_token_id

    def _around(self) -> tuple[str, str]:
        """What stands between the generation prompt and an answer, and what behind it."""
        mark = "\u241f"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        if not self.tokenizer.chat_template:
            return "", ""
        try:
            asked = render(turns[:1], self.tokenizer, add_generation_prompt=True)
            before, _, after = render(turns, self.tokenizer).partition(mark)
        except UserError:
            return "", ""
        between = before.removeprefix(asked)
        # else a block of thoughts, which is the answer's own business
        return "" if between.strip() else between, after

    def prompt(self, record: Record) -> list[int]:
        """Tokens of a record's prompt, up to where the assistant begins to speak.

        Raises:
            UserError: the template refuses it.
        """
        return self._tokens(self._prompt_text(record))

    def encode(self, record: Record, max_length: int | None = None) -> Encoded:
        """Tokens of a record, at most ``max_length`` of them.

        Raises:
            UserError: the record has no answer of one message, ``truncated`` is no boolean, or the
                template refuses the prompt.
        """
        truncated = record.get("truncated")
        if not isinstance(truncated, bool | None):
            raise UserError(f"truncated: expected true or false, got {truncated!r}")
        text = self._prompt_text(record)
        answer = self.between + completion_text(record) + ("" if truncated else self.closing)
        prompt, whole = self._tokens(text), self._tokens(text + answer)
        size = len(prompt)
        # else they merge across the border, as they do not while a model writes; alone, a text of
        # SentencePiece would begin with a space
        joined = whole[:size] == prompt
        completion = whole[size:] if joined else self._tokens(answer)
        if max_length is None:
            return Encoded(prompt, completion)
        return Encoded(prompt[:max_length], completion[: max(0, max_length - size)])

    def _prompt_text(self, record: Record) -> str:
        options = {**template_options(record), "add_generation_prompt": True}
        return render(messages(record["prompt"]), self.tokenizer, **options)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def check_rendered(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, argument: str, template: str | None = None
) -> None:
    """Refuses the first conversation of a data set that cannot be rendered as TRL does it.

    Args:
        dataset: a Dataset or IterableDataset of :mod:`datasets`.
        tokenizer: has the chat template.
        argument: what an error calls the data set.
        template: one in place of the tokenizer's.
    Raises:
        UserError: naming the example, counted from 0.
    """
    for number, record in enumerate(dataset.with_format(None)):
        place = f"in example {number}"
        turns = record.get("messages") or record.get("prompt")
        if not isinstance(turns, list):
            continue
        if "chat_template_kwargs" in record and record["chat_template_kwargs"] is None:
            raise UserError(
                f"{argument}: expected chat_template_kwargs in every example or in none, got none "
                f"{place}"
            )
        expected = f"{argument}: expected messages that the chat template takes {place}"
        try:
            options = template_options(record)
        except UserError as error:
            raise UserError(f"{argument}: {error} {place}") from error
        if template is not None:
            options = {"chat_template": template, **options}
        render(turns + (record.get("completion") or []), tokenizer, expected, **options)


def encode_truncated(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, argument: str, num_proc: int | None = None
) -> Any:
    """A data set of TRL, tokenised if its records say ``truncated``; any other one as it is.

    A chat template closes every answer. An answer that was cut has no end to learn, and its last
    state no known successor. One that says ``truncated: false`` ends with the token that ends a
    turn; what the template writes behind that, which TRL would learn, is not learned. Both follow
    the generation prompt verbatim (:class:`Chat`).

    Args:
        dataset: a Dataset or IterableDataset of :mod:`datasets`, in any format.
        tokenizer: has the chat template.
        argument: what an error calls the data set.
        num_proc: processes that tokenise a Dataset.
    Returns:
        The data set with ``input_ids`` and ``completion_mask``, or the one given.
    Raises:
        UserError: they are no chat messages of prompt and completion, or :meth:`Chat.encode`
            refuses.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "truncated" not in columns or "input_ids" in columns:
        return dataset
    dataset = dataset.with_format(None)  # else arrays of torch or NumPy stand for what is JSON
    first = next(iter(dataset), None)
    if first is None:
        return dataset
    if not all(isinstance(first.get(name), list) for name in ("prompt", "completion")):
        raise UserError(
            f"{argument}: expected chat messages as prompt and completion where records say "
            f"truncated, got {', '.join(sorted(columns))}; drop truncated where no answer was cut"
        )
    chat = Chat(tokenizer)

    def tokens(record: Record) -> dict[str, list[int]]:
        try:
            prompt, completion = chat.encode(record)
        except UserError as error:
            raise UserError(f"{argument}: {error}") from error
        mask = [0] * len(prompt) + [1] * len(completion)
        return {"input_ids": prompt + completion, "completion_mask": mask}

    from datasets import Dataset

    is_streamed = not isinstance(dataset, Dataset)
    how = {} if is_streamed else {"num_proc": num_proc, "desc": "Tokenising"}
    return dataset.map(tokens, remove_columns=columns, **how)
