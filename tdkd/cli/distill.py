"""tdkd distill: TDTrainer from a YAML file and flags."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config

from tdkd import records
from tdkd.cli.console import console
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
        default=True, metadata={"help": "Go on from the last checkpoint in output_dir."}
    )


class Parser(TrlParser):
    """TRL's parser, which refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(args: list[str]) -> None:
    """``[config.yaml] [--flag value ...]``; flags win over the file."""
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    data, config, model = _parse(args)
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path: expected the student's directory, got none")
    if data.train_file is None:
        raise UserError("train_file: expected a JSONL file, got none")
    check_model_path(model.model_name_or_path, "model_name_or_path")
    if config.teacher_model_name_or_path is not None:
        check_model_path(config.teacher_model_name_or_path, "teacher_model_name_or_path")
    tokenizer = load_tokenizer(model.model_name_or_path, argument="model_name_or_path")
    train = _dataset(data.train_file, "train_file", tokenizer, config)
    held_out = None
    if data.eval_file is not None:
        held_out = _dataset(data.eval_file, "eval_file", tokenizer, config)
    # logits do not exist, so that evaluation can only give losses
    config.prediction_loss_only = True

    trainer = TDTrainer(
        load_model(model.model_name_or_path, argument="model_name_or_path"),
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    output = Path(config.output_dir)
    last = get_last_checkpoint(str(output)) if data.resume and output.is_dir() else None
    if last is not None:
        console.print(f"resuming from {last}", soft_wrap=True)
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        save_whole(trainer, tokenizer, output / "final")
        records.write_whole(output / "log.json", trainer.state.log_history)
        console.print(
            f"student in {output / 'final'}, log in {output / 'log.json'}", soft_wrap=True
        )


def save_whole(trainer: TDTrainer, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """The model and its tokenizer in a directory that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.save_model(str(temporary))
    tokenizer.save_pretrained(temporary)
    before = path.with_name(path.name + ".old")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        os.replace(path, before)
    os.replace(temporary, path)
    shutil.rmtree(before, ignore_errors=True)


def _parse(args: list[str]) -> tuple[DataConfig, TDConfig, ModelConfig]:
    parser = Parser((DataConfig, TDConfig, ModelConfig), prog="tdkd distill")
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


def _dataset(
    path: str, argument: str, tokenizer: PreTrainedTokenizerBase, config: TDConfig
) -> Dataset:
    """Records for TRL, which tokenises them; those that say ``truncated`` are tokenised here.

    A chat template closes every answer. An answer that was cut has no end to learn, and its last
    state no known successor.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{argument}: expected a JSONL file, got {path}, which is no file")
    try:
        loaded = Dataset.from_json(str(file)) if file.stat().st_size else None
    except (ValueError, DatasetsError) as error:
        raise UserError(f"{argument}: expected JSONL records in {path}, got {error}") from error
    if loaded is None or not len(loaded):
        raise UserError(f"{argument}: expected at least one record in {path}, got none")
    columns = set(loaded.column_names)
    if not columns & {"messages", "text", "input_ids"} and not {"prompt", "completion"} <= columns:
        raise UserError(
            f"{argument}: expected prompt and completion, messages or text in {path}, got "
            f"{', '.join(sorted(columns))}"
        )
    sample: dict[str, Any] = loaded[0]
    conversational = "messages" in columns or isinstance(sample.get("prompt"), list)
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"model_name_or_path: expected a tokenizer with a chat template for the conversations "
            f"in {path}, got none"
        )
    if "truncated" not in columns:
        return loaded

    if not isinstance(sample.get("prompt"), list) or "completion" not in columns:
        raise UserError(
            f"{argument}: expected chat messages as prompt and completion where records say "
            f"truncated, got {path} with {', '.join(sorted(columns))}"
        )

    def tokens(record: dict[str, Any]) -> dict[str, list[int]]:
        encoded = records.encode(record, tokenizer, config.max_length or 1 << 30)
        ids = [*encoded.prompt, *encoded.completion]
        return {"input_ids": ids, "labels": [-100] * len(encoded.prompt) + encoded.completion}

    return loaded.map(tokens, remove_columns=loaded.column_names, desc="Tokenising")
