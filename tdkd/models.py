"""Hugging Face models as the ops need them: loading, the head, the backbone, a pruned student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tdkd.errors import UserError
from tdkd.kernels.gather_q.reference import scaled
from tdkd.types import Scale

# what transformers raises on a directory that it cannot make sense of
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError)


class Head(NamedTuple):
    """The language-model head: logits are ``softcap(logit_scale * (hidden @ weight.T + bias))``."""

    weight: Tensor
    """``(V, H)``."""
    bias: Tensor | None
    """``(V,)``."""
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)`` in float32 or better, for callers who can hold them."""
        product = nn.functional.linear(hidden, self.weight, self.bias)
        return scaled(product, Scale(1.0, self.softcap, self.logit_scale))


def check_model_path(path: str | Path, argument: str = "model") -> Path:
    """A local model directory, or one line that says what is wrong with it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}: expected a model directory, got {path}, which does not exist")
    if not path.is_dir():
        raise UserError(f"{argument}: expected a model directory, got the file {path}")
    if not (path / "config.json").is_file():
        raise UserError(f"{argument}: expected a model directory with config.json, got {path}")
    return path


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    argument: str = "model",
) -> PreTrainedModel:
    """A causal language model from a local directory, from safetensors alone, in eval mode.

    Raises:
        UserError: the directory is missing, is no model, or cannot be read.
    """
    path = check_model_path(path, argument)
    check_device(device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(
            f"{argument}: expected a causal language model with safetensors weights in {path}, got "
            f"{_first_line(error)}"
        ) from error
    if report["missing_keys"]:
        # transformers would go on with random weights in their place
        raise UserError(
            f"{argument}: expected weights for every parameter in {path}, got none for "
            f"{min(report['missing_keys'])}"
        )
    return model.to(device).eval()


def check_device(device: str | torch.device) -> None:
    """Refuses, in one line, a device that torch does not know or that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: expected one that torch can use, such as cpu or cuda, got {device}"
        ) from error


def load_tokenizer(
    path: str | Path, *, argument: str = "model", chat: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ``chat`` demands a chat template.

    Raises:
        UserError: there is none, it cannot be read, or it has no chat template.
    """
    path = check_model_path(path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(
            f"{argument}: expected a tokenizer in {path}, got {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{argument}: expected a tokenizer with an EOS token in {path}, got none")
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"{argument}: expected a tokenizer with a chat template in {path}, got none"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lm_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with what its config does to the logits."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:
            # Granite and MiniCPM divide by it, HyperCLOVA X multiplies
            scale = float(config.logits_scaling)
            scale = scale if config.model_type == "hyperclovax" else 1.0 / scale
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, getattr(output, "bias", None), softcap, scale)


def last_hidden_state(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, T, H)``: what the head would see, without running the head. PEFT wrappers are fine."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return causal.base_model(**inputs, use_cache=False).last_hidden_state


def prune_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A student with ``layers`` of the model's layers: evenly spaced, first and last kept.

    Weights are copied; the tokenizer, the embeddings and the head stay the teacher's.

    Raises:
        UserError: the model does not have that many layers, or keeps them where we do not look.
    """
    backbone = model.base_model
    found = [
        (name, child)
        for name, child in backbone.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    ]
    if len(found) != 1:
        raise UserError(
            f"model: expected one list of {model.config.num_hidden_layers} layers in "
            f"{type(backbone).__name__}, got {len(found)}"
        )
    name, blocks = found[0]
    total = len(blocks)
    if not 1 <= layers <= total:
        raise UserError(f"layers: expected 1 to {total}, the model's own, got {layers}")
    kept = [round(i * (total - 1) / max(1, layers - 1)) for i in range(layers)]

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    student = type(model)(config).to(dtype=model.dtype, device=model.device)
    weights = model.state_dict()
    prefix = f"{model.base_model_prefix}.{name}."
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith(prefix):
            index, rest = key.removeprefix(prefix).split(".", 1)
            if int(index) in kept:
                renamed[f"{prefix}{kept.index(int(index))}.{rest}"] = tensor
        else:
            renamed[key] = tensor
    student.load_state_dict(renamed)
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's and the generation config's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
