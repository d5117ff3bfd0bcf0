"""settings.json: what the checkpoints of tdkd distill were begun with, and go on with alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from tdkd import records
from tdkd.cache import MANIFEST, Cache, file_hash, fingerprint, template_hash
from tdkd.config import TDConfig

NAME = "settings.json"
ELSEWHERE = {
    # told by content, not by path
    "teacher_cache",
    "teacher_model_name_or_path",
    # how, not what
    "generation_batch_size",
    "teacher_cache_verify",
    "use_vllm",
    "vllm_gpu_memory_utilization",
}
OURS = {x.name for x in fields(TDConfig)} - {x.name for x in fields(SFTConfig)} - ELSEWHERE
"""Fields of TDConfig that determine the training; of TRL's and transformers' see ``THEIRS``."""
THEIRS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "assistant_only_loss",
    "average_tokens_across_devices",
    "bf16",
    "chat_template_path",
    "completion_only_loss",
    "data_seed",
    "dataloader_drop_last",
    "dataset_text_field",
    "eos_token",
    "fp16",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "optim_target_modules",
    "packing",
    "packing_strategy",
    "padding_free",
    "seed",
    "shuffle_dataset",
    "train_sampling_strategy",
    "truncation_mode",
    "warmup_steps",
    "weight_decay",
}
ADAPTER = ("dtype", "lora_", "use_")
"""How the fields of ModelConfig begin that make adapters and choose weights."""


def settings(
    config: TDConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, data: str | None
) -> dict[str, Any]:
    """What determines the training, as JSON has it; ``data``: the file, without a cache."""
    teacher = config.teacher_model_name_or_path
    step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    found = {
        "model_name_or_path": _model(model.model_name_or_path or ""),
        "teacher_model_name_or_path": None if teacher is None else _model(teacher),
        "chat_template": template_hash(tokenizer),
        "per_device_train_batch_size * gradient_accumulation_steps * processes": step,
        **{name: x for name, x in vars(model).items() if name.startswith(ADAPTER)},
        **{name: x for name, x in vars(config).items() if name in OURS | THEIRS},
    }
    if config.teacher_cache is not None:
        path = Cache(config.teacher_cache, verify=False).path
        found["teacher_cache"] = {"name": path.name, "sha256": file_hash(path / MANIFEST)}
    else:
        found["train_file"] = data_file(Path(data or ""))
    known: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return known


def check(output: Path, given: dict[str, Any]) -> None:
    """Refuses to go on with what was begun otherwise.

    Raises:
        UserError: naming the first setting that differs.
    """
    before = records.read_json(output / NAME, "output_dir")
    # a field that is new in a library has no earlier value
    both = {name: value for name, value in given.items() if name in before}
    records.check_settings(output / NAME, both, "give --resume false or another --output_dir")


def data_file(path: Path) -> dict[str, str]:
    """Name and checksum of a file of records."""
    return {"name": path.name, "sha256": file_hash(path)}


def _model(path: str) -> dict[str, str]:
    return {"name": Path(path).name, "fingerprint": fingerprint(Path(path))}
