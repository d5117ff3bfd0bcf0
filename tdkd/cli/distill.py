"""tdkd distill: TDTrainer from a YAML file and flags."""

from __future__ import annotations

import glob
import importlib.util
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from tdkd import checkpoints, curves, records
from tdkd.cache import Cache, extent
from tdkd.cli import settings
from tdkd.cli.console import console, shown_log
from tdkd.errors import UserError
from tdkd.models import check_model_path, load_model, load_tokenizer
from tdkd.trainer import TDConfig, TDTrainer


@dataclass
class DataConfig:
    """What to train on."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSONL of prompt and completion, or of messages."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, held out."})
    resume: bool = field(
        default=True,
        metadata={
            "help": "Go on from the last checkpoint in output_dir, with the settings that it was "
            "begun with; false moves what is there to earlier-1, earlier-2, ... and starts afresh."
        },
    )


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of the student's weights; auto is the checkpoint's own."""


class SameTokens(TDTrainer):
    """On a cache whose tokens are those that the student's chat template makes of the data."""

    _templates_must_agree = False


class Parser(TrlParser):
    """TRL's parser, which refuses in one line, and takes no beginning of a name for the name."""

    def __init__(self, *classes: type) -> None:
        super().__init__(classes, prog="tdkd distill", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def set_defaults_with_config(self, **fields: Any) -> list[str]:
        """Takes the fields of the YAML file, all of which must be known."""
        left = super().set_defaults_with_config(**fields)[::2]
        if left:
            _refuse_unknown("fields", [name.removeprefix("--") for name in left])
        return []

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Takes flags, all of which must be known."""
        found, left = super().parse_known_args(*args, **kwargs)
        if left:
            _refuse_unknown("flags", left)
        return found, left


def _refuse_unknown(what: str, names: list[str]) -> NoReturn:
    raise UserError(
        f"config: expected {what} of tdkd distill (--help lists them), got {' '.join(names)}"
    )


def run(args: list[str]) -> None:
    """``[config.yaml] [--flag value ...]``; flags win over the file."""
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    data, config, model = _parse(args)
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path: expected the student's directory, got none")
    _check_options(data, config, model)
    check_model_path(model.model_name_or_path, "model_name_or_path")
    if config.teacher_model_name_or_path is not None:
        check_model_path(config.teacher_model_name_or_path, "teacher_model_name_or_path")
    output = Path(config.output_dir)
    records.check_directory(output, "output_dir")
    if config.should_save:
        checkpoints.clear(output)
    last = checkpoints.last(output) if data.resume else None
    if last is not None:
        if config.save_only_model:
            raise UserError(
                f"resume: expected false with save_only_model, which left in {last} no state to go "
                "on from, got true"
            )
        checkpoints.check(last, checkpoints.NEEDED if _alone(config) else [checkpoints.STATE])
    tokenizer = load_tokenizer(model.model_name_or_path, argument="model_name_or_path")
    train = held_out = None
    kind = TDTrainer
    if config.teacher == "cache":
        if data.eval_file is not None:
            raise UserError(
                "eval_file: expected none with teacher: cache, which has no sets for it, got "
                f"{data.eval_file}"
            )
        if data.train_file is not None:
            records.check_file(data.train_file, "train_file")
            sets = Cache(config.teacher_cache or "", verify=False)
            sets.check_data(data.train_file, "train_file")
            # chat_template_path takes another template, which TRL reads later
            if not sets.same_template(tokenizer) and config.chat_template_path is None:
                sets.check_tokens(
                    prepared(
                        data.train_file,
                        "train_file",
                        tokenizer,
                        max_length=sets.manifest.max_length,
                        assistant_only_loss=sets.manifest.assistant_only_loss,
                    ),
                    "train_file",
                )
                kind = SameTokens
    else:
        if data.train_file is None:
            raise UserError("train_file: expected a JSONL file, got none")
        train = load_data(data.train_file, "train_file", tokenizer)
        if data.eval_file is not None:
            held_out = load_data(data.eval_file, "eval_file", tokenizer)
    begun = settings.settings(config, model, tokenizer, data.train_file)
    # checkpoints without them are of an older version
    if last is not None and (output / settings.NAME).exists():
        settings.check(output, begun)
    # logits do not exist, so that evaluation can only give losses
    config.prediction_loss_only = True

    with shown_log() if config.process_index == 0 else nullcontext():
        student = load_model(
            model.model_name_or_path,
            dtype="auto" if model.dtype == "auto" else getattr(torch, model.dtype),
            attn_implementation=model.attn_implementation,
            argument="model_name_or_path",
        )
        try:
            trainer = kind(
                student,
                args=config,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=tokenizer,
                peft_config=get_peft_config(model),
            )
        except UserError as error:
            raise UserError(_of_files(str(error))) from error
        except (ValueError, ImportError, RuntimeError) as error:
            # of options that TRL or transformers refuse; report_to is refused by the last
            if isinstance(error, RuntimeError) and "to be installed" not in str(error):
                raise
            raise UserError(f"config: {error}") from error
        if last is not None:
            console.print(f"resuming from {last}", markup=False, soft_wrap=True)
        elif trainer.is_world_process_zero():
            if earlier := checkpoints.set_aside(output, [settings.NAME]):
                console.print(f"earlier checkpoints are in {earlier}", markup=False, soft_wrap=True)
            records.write_whole(output / settings.NAME, begun)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if last is not None and trainer.state.global_step == checkpoints.step(last):
            console.print(
                "it was at the last step already: nothing was trained; for other settings take "
                "another output_dir or resume: false",
                markup=False,
                soft_wrap=True,
            )
    if trainer.is_world_process_zero():
        save_whole(trainer, tokenizer, output)
        records.write_whole(output / "log.json", trainer.state.log_history)
        console.print(
            f"student in {output / 'final'}, log in {output / 'log.json'}",
            markup=False,
            soft_wrap=True,
        )
        picture = output / "curves.png"
        if importlib.util.find_spec("matplotlib") is None:
            console.print('no curves.png: pip install "tdkd[train]"', markup=False)
        elif curves.draw(picture, trainer.state.log_history):
            console.print(f"curves in {picture}", markup=False, soft_wrap=True)


def _of_files(message: str) -> str:
    """What the trainer calls its data sets are files here."""
    for name in ("train", "eval"):
        # a path may hold the name as well
        message = re.sub(rf"(?<![/\w]){name}_dataset(?![/\w])", f"{name}_file", message)
    return message


def _check_options(data: DataConfig, config: TDConfig, model: ModelConfig) -> None:
    """Refuses options of TRL that have no use here, or none as the others are.

    Raises:
        UserError: naming the first one that was given.
    """
    paths = {
        **vars(data),
        "output_dir": config.output_dir,
        "model_name_or_path": model.model_name_or_path,
        "teacher_model_name_or_path": config.teacher_model_name_or_path,
    }
    for name, path in paths.items():
        if name != "resume" and not isinstance(path, str | None):
            raise UserError(f"{name}: expected one path, got {path!r}")
    if model.dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {model.dtype!r}")
    for name, given, default, instead in (
        ("model_init_kwargs", config.model_init_kwargs or {}, {}, "see dtype, attn_implementation"),
        ("resume_from_checkpoint", config.resume_from_checkpoint, None, "resume takes the last"),
        ("model_revision", model.model_revision, "main", "models are directories"),
        ("load_in_8bit", model.load_in_8bit, False, "weights are not quantised"),
        ("load_in_4bit", model.load_in_4bit, False, "weights are not quantised"),
    ):
        if given != default:
            raise UserError(f"{name}: expected it to be left out ({instead}), got {given!r}")
    if config.eval_strategy == "no" and data.eval_file is not None and config.teacher == "live":
        raise UserError(
            f"eval_file: expected none without eval_strategy (steps or epoch), got {data.eval_file}"
        )
    if config.eval_strategy != "no" and data.eval_file is None:
        raise UserError(
            f"eval_strategy: expected 'no' without eval_file, got {config.eval_strategy.value!r}"
        )


def save_whole(trainer: TDTrainer, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """The model and its tokenizer in ``final``, which appears whole or not at all."""
    with checkpoints.writing(output):
        checkpoints.clear(output)
        aside = output / checkpoints.UNFINISHED / "final"
        trainer.save_model(str(aside))
        tokenizer.save_pretrained(aside)
        checkpoints.publish(output, "final")


def _alone(config: TDConfig) -> bool:
    """Whether checkpoints hold all that one process needs, under the names of the Trainer."""
    sharded = config.deepspeed or config.fsdp
    return config.world_size == 1 and not sharded


def _parse(args: list[str]) -> tuple[DataConfig, TDConfig, ModelConfig]:
    parser = Parser(DataConfig, TDConfig, ModelConfig)
    try:
        return parser.parse_args_and_config(args)
    except FileNotFoundError as error:
        raise UserError(
            f"config: expected a YAML file, got {error.filename}, no such file"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"config: expected YAML, got {error}") from error
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"config: {error}") from error


# what TRL trains on
CHAT = "chat messages with a role"
FIELDS = (("prompt", "completion"), ("messages",), ("text",), ("input_ids",))


def _check_lines(path: str, argument: str) -> None:
    """Holds every line to the first: the same fields to train on, with the same kind of content.

    Raises:
        UserError: there is no line, or one is no JSON object, lacks a field or has another kind.
    """
    first: dict[str, str] = {}
    for number, record in records.lines(path, argument):
        place = f"on line {number} of {path}"
        if not first:
            found = [names for names in FIELDS if set(names) <= set(record)]
            if not found:
                raise UserError(
                    f"{argument}: expected prompt and completion, messages or text {place}, got "
                    f"{', '.join(sorted(record)) or 'no field'}"
                )
            first = {name: _kind(record[name]) for name in found[0]}
            kinds = list(dict.fromkeys(first.values()))
            if len(kinds) > 1:
                raise UserError(
                    f"{argument}: expected prompt and completion of one kind {place}, got "
                    f"{' and '.join(kinds)}"
                )
            if first.keys() - {"input_ids"} and not set(first.values()) <= {"a string", CHAT}:
                first = dict.fromkeys(first, f"a string or {CHAT}")
        for name, kind in first.items():
            got = _kind(record[name]) if name in record else "nothing"
            if got != kind:
                raise UserError(f"{argument}: expected {name} to be {kind} {place}, got {got}")
    if not first:
        raise UserError(f"{argument}: expected at least one record in {path}, got none")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        roles = [isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value]
        return CHAT if roles and all(roles) else "a list"
    return "null" if value is None else f"a value such as {str(value)[:40]!r}"


def load_data(path: str, argument: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Records, whose text the trainer will tokenise.

    Raises:
        UserError: there are none, they cannot be read or are not of one kind, or they need a chat
            template that the tokenizer has not.
    """
    _check_lines(path, argument)
    try:
        loaded = Dataset.from_json(glob.escape(path))
        if "timestamp" in str(loaded.features):  # Arrow's reading of a column of dates
            rows = [record for _, record in records.lines(path, argument)]
            names = dict.fromkeys(name for record in rows for name in record)
            loaded = Dataset.from_dict({name: [r.get(name) for r in rows] for name in names})
    except (ValueError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError):
            raise cause from error
        raise UserError(f"{argument}: expected JSONL records in {path}, got {cause}") from error
    sample: dict[str, Any] = loaded[0]
    if is_chat(sample) and not tokenizer.chat_template:
        raise UserError(
            f"model_name_or_path: expected a tokenizer with a chat template for the conversations "
            f"in {path}, got none"
        )
    return loaded


def is_chat(record: dict[str, Any]) -> bool:
    """Whether a chat template writes a record."""
    return "messages" in record or isinstance(record.get("prompt"), list)


def prepared(
    path: str,
    argument: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    assistant_only_loss: bool = False,
) -> Dataset:
    """``input_ids`` and ``labels`` as TRL's trainer would make them of a file.

    Raises:
        UserError: the file has nothing to learn from, or the chat template does not tell what the
            assistant says.
    """
    config = SFTConfig(
        max_length=max_length,
        assistant_only_loss=assistant_only_loss,
        shuffle_dataset=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
        # or this configuration would make the CPU the device of the process
        accelerator_config={"use_configured_state": True},
    )
    loaded = load_data(path, argument, tokenizer)
    template = None
    if assistant_only_loss:
        if not is_chat(loaded[0]) or "truncated" in loaded.column_names:
            raise UserError(
                "assistant-only-loss: expected chat messages that do not say truncated, got "
                f"{path} with {', '.join(sorted(loaded.column_names))}"
            )
        if not has_generation_markers(tokenizer.chat_template):
            try:
                template = get_training_chat_template(tokenizer)
            except ValueError as error:
                raise UserError(f"assistant-only-loss: {error}") from error
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=template,
        completion_only_loss={"prompt", "completion"} <= set(loaded.column_names),
    )
    tokenised = records.encode_truncated(loaded, tokenizer, argument)
    try:
        made = SFTTrainer._prepare_dataset(
            trainer, tokenised, tokenizer, config, packing=False, formatting_func=None,
            dataset_name=argument,
        )  # fmt: skip
    except records.UNRENDERED:
        records.check_rendered(tokenised, tokenizer, argument, template)
        raise
    if not len(made) or not extent(made).states:
        raise UserError(
            f"{argument}: expected a token to learn that has others before it, got none: every "
            f"response is empty, or cut off at max-length ({max_length})"
        )
    return made
