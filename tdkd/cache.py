"""A teacher's action sets on disk: made once, read by any number of students.

A cache is a folder of shards in Arrow's stream format (``datasets.Dataset.from_file`` opens one)
and ``manifest.json``, which is written last. A row of a shard is an example:

==============  ====================================================================
``input_ids``   its tokens
``mask``        which of them are learned from: the taken tokens of its states
``count``       members of the set of each state
``ids``         members of all its states, one after the other
``log_probs``   their full-vocabulary log-probabilities, nats
``log_tail``    log of the mass outside each set, where it is kept
==============  ====================================================================

Ids take two bytes in vocabularies of up to 65,536 tokens, else four; log-probabilities two, and so
does the count of a set, which has at most 65,535 members. States are numbered through the whole
cache. :meth:`Cache.dataset` gives examples whose *labels* are those numbers (-100 elsewhere): what
truncates, packs or shuffles labels carries the sets along, and :class:`Collator` puts tokens and
sets in their place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tdkd import records
from tdkd.errors import UserError, missing
from tdkd.types import ActionSet

try:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
MANIFEST = "manifest.json"
TOLD = ("file", "sha256", "bytes", "examples", "tokens", "states", "members")
"""What is told of a shard."""
DTYPES = ("float16", "bfloat16")
MOST_MEMBERS = int(np.iinfo(np.uint16).max)
LOWEST = float(np.finfo(np.float16).min)
"""Log-probabilities below it are kept as it."""
PART = 1 << 24
"""Bytes of a model that are hashed at a time."""
SAMPLES, SAMPLE_BYTES = 64, 1 << 14
"""Places in a file of a model that its fingerprint looks at, and how much it reads there."""
Array = npt.NDArray[Any]


class Example(NamedTuple):
    """The tokens of an example, and the sets of its states, one after the other."""

    input_ids: Array
    """``[T]``."""
    mask: Array
    """bool ``[T]``: S tokens that are learned from; never the first, which no state precedes."""
    count: Array  # type: ignore[assignment]  # hides tuple.count
    """``[S]``."""
    ids: Array
    """``[sum of count]``."""
    log_probs: Array
    """float32 ``[sum of count]``, nats."""
    log_tail: Array
    """float32 ``[S]``, nats; -inf where the set holds everything."""


@dataclass(frozen=True)
class Manifest:
    """What is in a cache, and of whom."""

    format: int
    teacher: dict[str, Any]
    """``name`` and ``sha256``: of its files, or None where a server was asked."""
    tokenizer: str
    """sha256 of what turns text into tokens: :func:`tokenizer_hash`."""
    chat_template: str | None
    """sha256 of the template that wrote the conversations; None where there are none."""
    data: dict[str, Any]
    """``name`` and ``sha256`` of the file."""
    tokens_sha256: str | None
    """:func:`tokens_hash` of what was prepared of it; None where a server was asked."""
    assistant_only_loss: bool
    model_dtype: str | None
    """of the teacher's weights; None where a server was asked."""
    vocab_size: int
    """Columns of the teacher's law: its head's, or fewer where padding was left out."""
    action_top_k: int
    action_top_p: float
    teacher_temperature: float
    max_length: int | None
    dtype: str
    tail: bool
    examples: int
    tokens: int
    states: int
    members: int
    bytes: int
    shards: list[dict[str, Any]]
    """``file``, ``sha256``, ``bytes``, and the numbers above, of each."""

    @property
    def bytes_a_state(self) -> float:
        return self.bytes / max(1, self.states)


def write_shard(
    folder: Path, number: int, examples: list[Example], *, vocab_size: int, dtype: str, tail: bool
) -> dict[str, Any]:
    """One shard and its checksum, each whole or not at all; what the manifest says of it."""
    id_type = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    half = pa.float16() if dtype == "float16" else pa.uint16()
    columns = {
        "input_ids": _lists("input_ids", [x.input_ids for x in examples], id_type),
        "mask": _lists("mask", [x.mask for x in examples], pa.bool_()),
        "count": _lists("count", [x.count for x in examples], pa.uint16()),
        "ids": _lists("ids", [x.ids for x in examples], id_type, large=True),
        "log_probs": _lists(
            "log_probs", [_halved(x.log_probs, dtype) for x in examples], half, large=True
        ),
    }
    if tail:
        columns["log_tail"] = _lists(
            "log_tail", [_halved(x.log_tail, dtype) for x in examples], half
        )
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content = sink.getvalue().to_pybytes()
    path = folder / shard_name(number)
    records.write_whole(path, content)
    told = {
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "examples": len(examples),
        "tokens": sum(len(x.input_ids) for x in examples),
        "states": sum(len(x.count) for x in examples),
        "members": sum(len(x.ids) for x in examples),
    }
    records.write_whole(path.with_suffix(".json"), told)
    return told


def shard_name(number: int) -> str:
    return f"sets-{number:05d}.arrow"


def told_of(folder: Path, number: int) -> dict[str, Any] | None:
    """What :func:`write_shard` told of a shard; None where that, or the shard, is not there."""
    path = folder / shard_name(number)
    try:
        told: Any = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    return told if path.exists() and _tells(told) else None


def finished(folder: Path, number: int) -> bool:
    """Whether a shard is there, and still what it was."""
    told = told_of(folder, number)
    return told is not None and file_hash(folder / shard_name(number)) == told["sha256"]


def write_manifest(folder: Path, shards: list[dict[str, Any]], **settings: Any) -> Manifest:
    """Makes a cache of shards that are there."""
    sums = {
        name: sum(shard[name] for shard in shards)
        for name in ("examples", "tokens", "states", "members", "bytes")
    }
    manifest = Manifest(format=FORMAT, shards=shards, **settings, **sums)
    records.write_whole(folder / MANIFEST, asdict(manifest))
    return manifest


class Cache:
    """A cache on disk, memory-mapped.

    Args:
        path: its folder.
        verify: read all of it once, and compare checksums.
        argument: what an error calls it.
    Raises:
        UserError: there is no finished cache, or a file is not the one that was written.
    """

    def __init__(
        self, path: str | Path, *, verify: bool = True, argument: str = "teacher_cache"
    ) -> None:
        self.path = Path(path)
        self.argument = argument
        self.manifest = _read_manifest(self.path / MANIFEST, argument)
        for shard in self.manifest.shards:
            file = self.path / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"] or (verify and file_hash(file) != shard["sha256"]):
                got = "no such file" if size is None else f"{size} bytes of another checksum"
                raise UserError(
                    f"{argument}: expected the {shard['bytes']} bytes of {file} that the manifest "
                    f"names, got {got}; run tdkd cache again"
                )
        self._starts = np.cumsum([0, *(shard["states"] for shard in self.manifest.shards)])
        self._open: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the files itself
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.manifest.examples

    def dataset(self, *, streaming: bool = False) -> Dataset | IterableDataset:
        """Examples with ``input_ids`` and ``labels``, which number the states.

        Tokens stay on disk, labels take 4 bytes a token in memory (8 from 2^31 states on).

        Args:
            streaming: an iterable data set, which holds one shard's labels at a time and has as
                many shards as the cache.
        """
        numbers = list(range(len(self.manifest.shards)))
        if streaming:
            return IterableDataset.from_generator(self._examples, gen_kwargs={"shards": numbers})
        table = pa.concat_tables([self._table(number) for number in numbers])
        name = json.dumps([shard["sha256"] for shard in self.manifest.shards])
        # or datasets would read all of it to name it
        return Dataset(table, fingerprint=hashlib.sha256(name.encode()).hexdigest()[:16])

    def sets(self, states: Array) -> ActionSet:
        """The action sets of numbered states, ``[n, k]``; empty where a number is negative."""
        k = self.manifest.action_top_k
        ids = np.full((len(states), k), -1, np.int32)
        log_probs = np.full((len(states), k), -np.inf, np.float32)
        for shard, at, local in self._found(states):
            ids[at], log_probs[at] = shard.sets(local, k)
        held = torch.from_numpy(ids)
        return ActionSet(held, torch.from_numpy(log_probs), (held >= 0).sum(-1).int())

    def tokens(self, states: Array) -> Array:
        """The taken token of each state, ``[n]``; -100 where a number is negative."""
        tokens = np.full(len(states), -100, np.int64)
        for shard, at, local in self._found(states):
            tokens[at] = shard.tokens(local)
        return tokens

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
        """Refuses a tokenizer that is not the one of the cache.

        Raises:
            UserError: it makes other tokens.
        """
        got = tokenizer_hash(tokenizer)
        if got != self.manifest.tokenizer:
            raise UserError(
                f"{argument}: expected the tokenizer that {self.path} was made with "
                f"({self.manifest.tokenizer[:12]}), got another one ({got[:12]})"
            )

    def same_template(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer writes conversations as the cache's does, where it holds any."""
        kept = self.manifest.chat_template
        return kept is None or kept == template_hash(tokenizer)

    def check_template(self, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
        """Refuses a tokenizer whose chat template is not the one of the cache.

        Raises:
            UserError: it would write the conversations otherwise.
        """
        if not self.same_template(tokenizer):
            got = template_hash(tokenizer)
            raise UserError(
                f"{argument}: expected the chat template of the conversations in {self.path} "
                f"({str(self.manifest.chat_template)[:12]}), got "
                f"{'none' if got is None else f'another one ({got[:12]})'}; the student would meet "
                "other prompts than it learned from: give it the teacher's template, or its own to "
                "the teacher and run tdkd cache again"
            )

    def check_tokens(self, prepared: Dataset, argument: str) -> None:
        """Refuses examples whose tokens, or what is learned of them, are not those of the cache.

        Args:
            prepared: the data with ``input_ids`` and ``labels``, made with the student's tokenizer.
            argument: what an error calls it.
        Raises:
            UserError: one differs.
        """
        if tokens_hash(prepared) != self.manifest.tokens_sha256:
            raise UserError(
                f"{argument}: expected the tokens of {self.path}, got others of the same file, "
                "since the student's chat template is another: give it the teacher's, or its own "
                "to the teacher and run tdkd cache again"
            )

    def check_vocabulary(self, columns: int, argument: str) -> None:
        """Refuses a student whose law has other columns than the teacher's.

        Nobody tells how many a served teacher has: there the student needs those of the tokenizer.

        Raises:
            UserError: the numbers differ.
        """
        kept = self.manifest.vocab_size
        served = self.manifest.teacher.get("sha256") is None
        if columns < kept or (columns > kept and not served):
            raise UserError(
                f"{argument}: expected the {kept} columns of {self.path}, got {columns}; where "
                "teacher and student differ by padding alone, give their common number to tdkd "
                "cache --vocab-size and to vocab_size"
            )

    def check_data(self, file: str | Path, argument: str) -> None:
        """Refuses a data file that is not the one of the cache.

        Raises:
            UserError: its content is another.
        """
        data = self.manifest.data
        if file_hash(Path(file)) != data["sha256"]:
            raise UserError(
                f"{argument}: expected the content of {data['name']} as {self.path} was made from "
                f"({data['sha256'][:12]}), got {file} with another"
            )

    def _found(self, states: Array) -> Iterator[tuple[_Shard, Array, Array]]:
        """Shards, where their states stand among the given ones, and their numbers there."""
        states = np.asarray(states)
        if len(states) and states.max() >= self._starts[-1]:
            raise UserError(
                f"train_dataset: expected labels that number the {self._starts[-1]} states of "
                f"{self.path}, got {states.max()}; take the examples of Cache.dataset()"
            )
        owner = np.searchsorted(self._starts, states, side="right") - 1
        for number in np.unique(owner[states >= 0]):
            at = np.flatnonzero((owner == number) & (states >= 0))
            yield self._shard(int(number)), at, states[at] - self._starts[number]

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            shard = self.manifest.shards[number]
            self._open[number] = _Shard(self.path / shard["file"], self.manifest.dtype)
        return self._open[number]

    def _table(self, number: int) -> pa.Table:
        """``input_ids`` and ``labels`` of a shard's examples."""
        whole = self._shard(number).table.select(["input_ids", "mask"])
        mask = whole["mask"].chunk(0)
        taken = mask.values.to_numpy(zero_copy_only=False)
        small = self._starts[-1] < 1 << 31
        labels = np.full(len(taken), -100, np.int32 if small else np.int64)
        labels[taken] = self._starts[number] + np.arange(taken.sum())
        column = pa.ListArray.from_arrays(mask.offsets, pa.array(labels))
        return whole.drop_columns(["mask"]).append_column("labels", column)

    def _examples(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        for number in shards:
            yield from self._table(number).to_pylist()


class _Shard:
    """One file, mapped."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.dtype = dtype

    def sets(self, states: Array, k: int) -> tuple[Array, Array]:
        """``[n, k]`` ids and log-probabilities."""
        starts, counts = self._spans(states)
        slot = np.arange(k)
        held = slot < counts[:, None]
        place = (starts[:, None] + slot)[held]
        ids = np.full(held.shape, -1, np.int32)
        ids[held] = self._values("ids")[place]
        log_probs = np.full(held.shape, -np.inf, np.float32)
        log_probs[held] = self._single(self._values("log_probs")[place])
        tail = None
        if "log_tail" in self.table.column_names:
            tail = self._single(self._values("log_tail")[states])
        return ids, _normalised(log_probs, tail)

    def tokens(self, states: Array) -> Array:
        """``[n]``."""
        mask, where = self.table["mask"].chunk(0).values, self._offsets("mask")
        every = self._values("input_ids")
        tokens = np.empty(len(states), np.int64)
        for example, at, local in self._by_example(states):
            first, size = where[example], where[example + 1] - where[example]
            taken = mask.slice(first, size).to_numpy(zero_copy_only=False)
            tokens[at] = every[first + np.flatnonzero(taken)[local]]
        return tokens

    def _spans(self, states: Array) -> tuple[Array, Array]:
        """First member and number of members of each state."""
        counts, where = self._values("count"), self._offsets("count")
        members = self._offsets("ids")
        starts = np.empty(len(states), np.int64)
        for example, at, local in self._by_example(states):
            ends = np.cumsum(counts[where[example] : where[example + 1]], dtype=np.int64)
            starts[at] = members[example] + np.concatenate([[0], ends[:-1]])[local]
        return starts, counts[states].astype(np.int64)

    def _by_example(self, states: Array) -> Iterator[tuple[int, Array, Array]]:
        """Examples, where their states stand among the given ones, and their numbers there."""
        where = self._offsets("count")
        owner = np.searchsorted(where, states, side="right") - 1
        for example in np.unique(owner):
            at = np.flatnonzero(owner == example)
            yield int(example), at, states[at] - where[example]

    def _values(self, name: str) -> Array:
        return self.table[name].chunk(0).values.to_numpy()

    def _offsets(self, name: str) -> Array:
        return self.table[name].chunk(0).offsets.to_numpy()

    def _single(self, half: Array) -> Array:
        if self.dtype == "float16":
            return half.astype(np.float32)
        return (half.astype(np.uint32) << 16).view(np.float32)


class Collator:
    """Batches of a cache's examples: tokens as labels, and the sets of their states.

    Args:
        inner: what collates ``input_ids`` and ``labels``.
        cache: whose states the labels number.
    """

    def __init__(self, inner: Any, cache: Cache) -> None:
        self.inner = inner
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """As ``inner``, with ``action_ids`` int32 and ``action_log_probs`` float32 ``[B, T, k]``:
        the set from which the token at each place was taken.

        Raises:
            UserError: the examples are not of this cache.
        """
        batch: dict[str, Any] = self.inner(examples)
        states: Tensor = batch["labels"]
        flat = states.reshape(-1).numpy()
        labels = torch.from_numpy(self.cache.tokens(flat)).view_as(states)
        if not torch.where(labels >= 0, labels == batch["input_ids"], True).all():
            raise UserError(
                f"train_dataset: expected examples of {self.cache.path}, got others; take those of "
                "Cache.dataset()"
            )
        actions = self.cache.sets(flat)
        batch["labels"] = labels
        batch["action_ids"] = actions.ids.view(*states.shape, -1)
        batch["action_log_probs"] = actions.log_probs.view(*states.shape, -1)
        return batch


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the parts of a fast tokenizer that make tokens of text, and of its end token.

    How it pads and truncates is left out; for the chat template see :func:`template_hash`.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "tokenizer: expected a fast one, which says how it makes tokens, got "
            f"{type(tokenizer).__name__}"
        )
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core.pop("truncation", None)
    core.pop("padding", None)
    core["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of a chat template; None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def tokens_hash(prepared: Dataset) -> str:
    """sha256 of examples: their lengths, ``input_ids`` and ``labels``."""
    digests = [hashlib.sha256() for _ in range(3)]
    for table in prepared.with_format("arrow").iter(batch_size=1024):
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        columns = ids.value_lengths(), ids.flatten(), labels.flatten()
        for digest, column in zip(digests, columns, strict=True):
            digest.update(column.to_numpy().astype(np.int64).tobytes())
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


class Extent(NamedTuple):
    """What is in tokenised examples."""

    longest: int
    """Tokens of the longest sequence."""
    largest: int
    """The largest token, or 0."""
    states: int
    """Tokens that are learned from; never the first of a sequence, which no state precedes."""


def extent(prepared: Dataset) -> Extent:
    """Of examples with ``input_ids`` and ``labels``, which may be packed as TRL does it."""
    longest = largest = states = 0
    packed = "seq_lengths" in prepared.column_names
    for table in prepared.with_format("arrow").iter(batch_size=1024):
        ids = table["input_ids"].combine_chunks()
        tokens = ids.flatten().to_numpy()
        column = table["seq_lengths"].combine_chunks().flatten() if packed else ids.value_lengths()
        sizes = column.to_numpy()[column.to_numpy() > 0]
        learned = table["labels"].combine_chunks().flatten().to_numpy() != -100
        longest = max(longest, int(sizes.max(initial=0)))
        largest = max(largest, int(tokens.max(initial=0)))
        states += int(learned.sum() - learned[np.cumsum(sizes) - sizes].sum())
    return Extent(longest, largest, states)


def model_files(folder: Path) -> list[Path]:
    """A model's or an adapter's configuration and weights."""
    configs = [folder / "config.json", folder / "adapter_config.json"]
    return sorted([*folder.glob("*.safetensors"), next(filter(Path.is_file, configs))])


def folder_hash(folder: Path, advance: Callable[[int], object] | None = None) -> str:
    """sha256 of the names, sizes and contents of :func:`model_files`; ``advance`` gets bytes."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb", buffering=0) as file:
            while part := file.read(PART):
                digest.update(part)
                if advance is not None:
                    advance(len(part))
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """sha256 of the names and sizes of :func:`model_files`, and of some of their bytes.

    It takes no time, and tells a wrong path; that every byte is the same it cannot tell.
    """
    digest = hashlib.sha256()
    for path in model_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb", buffering=0) as file:
            for i in range(SAMPLES):
                file.seek(i * size // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"expected to read {path}, got {error.strerror or error}") from error


def _read_manifest(place: Path, argument: str) -> Manifest:
    if not place.is_file():
        raise UserError(
            f"{argument}: expected a folder that tdkd cache has finished, got {place.parent} "
            f"without {MANIFEST}"
        )
    given = records.read_json(place, argument)
    form = given.get("format")
    if form != FORMAT:
        raise UserError(
            f"{argument}: expected format {FORMAT} in {place}, got {form}; run tdkd cache again"
        )
    known = [field.name for field in fields(Manifest)]
    lost = [name for name in known if name not in given]
    shards = given.get("shards")
    if not lost and not (isinstance(shards, list) and all(map(_tells, shards))):
        lost = [f"{', '.join(TOLD)} of each shard"]
    if lost:
        raise UserError(
            f"{argument}: expected {', '.join(lost)} in {place}, got none; run tdkd cache again"
        )
    return Manifest(**{name: given[name] for name in known})


def _tells(told: Any) -> bool:
    return isinstance(told, dict) and set(TOLD) <= told.keys()


def _lists(
    name: str, values: list[Array], kind: pa.DataType, *, large: bool = False
) -> pa.ListArray | pa.LargeListArray:
    """A column; ``large``: the values of all its rows may be 2^31 and more."""
    offsets = np.cumsum([0, *map(len, values)])
    most = np.iinfo(np.int64 if large else np.int32).max
    if offsets[-1] > most:
        raise UserError(
            f"shard-examples: expected at most {most} {name} in a file, got {offsets[-1]}; take "
            "fewer examples"
        )
    flat = np.concatenate(values) if values else np.empty(0)
    # numpy's half is Arrow's
    numbers = flat.astype(kind.to_pandas_dtype())
    if pa.types.is_integer(kind) and (numbers != flat).any():
        raise UserError(
            f"{name}: expected numbers of at most {np.iinfo(numbers.dtype).max}, got {flat.max()}"
        )
    made = pa.LargeListArray if large else pa.ListArray
    offset_type = pa.int64() if large else pa.int32()
    return made.from_arrays(pa.array(offsets, offset_type), pa.array(numbers, kind))


def _halved(values: Array, dtype: str) -> Array:
    """Two bytes each, rounded to nearest; bfloat16 as its bits."""
    finite = np.where(np.isneginf(values), values, np.maximum(values, LOWEST))
    if dtype == "float16":
        return finite.astype(np.float16)
    bits = torch.from_numpy(finite.astype(np.float32)).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16)


def _normalised(log_probs: Array, log_tail: Array | None) -> Array:
    """Log-probabilities that add up to one with the tail, or to no more than one without it.

    Rounding moves the mass of a set by more than what a sure teacher leaves outside it.
    """
    with np.errstate(divide="ignore"):
        total = np.exp(log_probs.astype(np.float64)).sum(-1)
        if log_tail is None:
            excess = np.log(np.maximum(total, 1.0))
        else:
            excess = np.log(total + np.exp(log_tail.astype(np.float64)))
    held = total > 0
    excess = np.where(held, excess, 0.0)
    return (log_probs - excess[:, None]).astype(np.float32)
