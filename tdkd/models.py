"""Hugging Face models as the ops need them: loading, the head, the backbone, a pruned student."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tdkd.errors import UserError, missing
from tdkd.kernels.gather_q.reference import scaled
from tdkd.records import Chat
from tdkd.types import Scale

try:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

logger = logging.getLogger("tdkd")

# what transformers raises on a directory that it cannot make sense of
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)

# what configs call the numbers of a head
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        product = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        return scaled(product, Scale(1.0, self.softcap, self.logit_scale))


def check_model_path(path: str | Path, argument: str = "model") -> Path:
    """A local model directory, or one line that says what is wrong with it."""
    path = Path(path)
    try:
        if not path.exists():
            raise UserError(
                f"{argument}: expected a model directory, got {path}, which does not exist"
            )
        if not path.is_dir():
            raise UserError(f"{argument}: expected a model directory, got the file {path}")
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise UserError(f"{argument}: expected a model directory with config.json, got {path}")
    except OSError as error:
        raise UserError(
            f"{argument}: expected a model directory, got {path}: {error.strerror}"
        ) from error
    return path


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter alone, which names its base model."""
    path = Path(path)
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    argument: str = "model",
) -> PreTrainedModel:
    """A causal language model from a local directory, from safetensors alone, in eval mode.

    ``dtype="auto"`` is the checkpoint's own. The adapter of a PEFT directory is merged into the
    base model that it names.

    Raises:
        UserError: the directory is missing, is no model, or cannot be read.
    """
    path = check_model_path(path, argument)
    check_device(device)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if is_adapter(path):
        return _merged(path, argument, device=device, **options)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            **options,
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


def _merged(path: Path, argument: str, **options: Any) -> PreTrainedModel:
    """The base model that an adapter names, with the adapter in its weights."""
    from peft import PeftConfig, PeftModel

    if not (path / "adapter_model.safetensors").is_file():  # PEFT would unpickle another file
        raise UserError(f"{argument}: expected adapter_model.safetensors in {path}, got none")
    try:
        named = PeftConfig.from_pretrained(path).base_model_name_or_path
        if not named:
            raise UserError(f"{argument}: expected an adapter that names its model, got none")
        base = load_model(named, argument=argument, **options)
        adapted = PeftModel.from_pretrained(base, path)
        _untie(base)
        return adapted.merge_and_unload().requires_grad_(True).eval()
    except UserError as error:
        raise UserError(f"{error} (the base model of the adapter in {path})") from error
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(
            f"{argument}: expected an adapter of a causal language model in {path}, got "
            f"{_first_line(error)}"
        ) from error


def _untie(model: PreTrainedModel) -> None:
    """Gives embeddings and head, if they share a weight and have adapters, one each: merged into
    what they share, the adapter of either would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embeddings, head = (
        end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends
    )
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def has_added_adapter(model: nn.Module) -> bool:
    """Whether transformers' ``add_adapter`` put adapters in, without a ``PeftModel`` around it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def load_added_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Puts the weights that ``save_pretrained`` wrote into the active adapter."""
    from peft import set_peft_model_state_dict

    state = load_file(folder / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    set_peft_model_state_dict(model, state, adapter_name=model.active_adapters()[0])


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
    tokenizer = _tokenizer(path, argument)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{argument}: expected a tokenizer with an EOS token in {path}, got none")
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"{argument}: expected a tokenizer with a chat template in {path}, got none"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, argument: str = "teacher"
) -> None:
    """Refuses a model for which an id is another token than for ``tokenizer``.

    Tokens that were added to a vocabulary may differ, as names of reserved ones do. A directory
    without a tokenizer is not judged.

    Raises:
        UserError: naming the first such token.
    """
    path = check_model_path(path, argument)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    expected, got = _vocabulary(tokenizer), _vocabulary(_tokenizer(path, argument))
    for i in sorted(expected.keys() & got.keys()):
        if expected[i] != got[i]:
            raise UserError(
                f"{argument}: expected the student's tokenizer, whose token {i} is "
                f"{expected[i]!r}, got {got[i]!r} in {path}"
            )


def _tokenizer(path: Path, argument: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(
            f"{argument}: expected a tokenizer in {path}, got {_first_line(error)}"
        ) from error


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder
    return {i: token for token, i in tokenizer.get_vocab().items() if i not in added}


def lm_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with what its config does to the logits.

    A LoRA adapter on the head is in the weight, differentiably: ``base + scaling * B @ A``.

    Raises:
        UserError: the head has an adapter that is no such sum, or dropout in a trainable one.
    """
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    named = _first_of(config, LOGIT_SCALES)
    # MPT has the field and its forward no use for it
    scale = 1.0 if named is None or config.model_type == "mpt" else float(named)
    divisor = _first_of(config, LOGIT_DIVISORS) if named is None else None
    if divisor is not None:
        # HyperCLOVA X multiplies by what Granite and MiniCPM divide by
        scale = float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor
    bias = getattr(output, "bias", None)
    return Head(_weight(output), bias, _first_of(config, SOFTCAPS), scale)


def _first_of(config: Any, names: tuple[str, ...]) -> Any:
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def _weight(output: Any) -> Tensor:
    """The weight of an output layer, with the product of its LoRA adapters in it."""
    if not hasattr(output, "base_layer"):
        return output.weight
    from peft.tuners import lora

    if isinstance(output, lora.Linear):
        if output.disable_adapters and output.merged:
            output.unmerge()  # as its forward does
        weight = output.base_layer.weight
        if output.disable_adapters or output.merged:
            return weight
        adapters = [name for name in output.active_adapters if name in output.lora_A]
        plain = [
            name not in output.lora_variant
            and not output.lora_bias[name]
            and not (
                getattr(output.lora_dropout[name], "p", 0)
                and output.lora_A[name].weight.requires_grad
            )
            for name in adapters
        ]
        if all(plain):
            # a sum in the better dtype of the two: bfloat16 would round small updates away
            return sum((output.get_delta_weight(name) for name in adapters), weight)
    raise UserError(
        "lm_head: expected no adapter on the head but plain LoRA without lora_dropout, got "
        f"{type(output).__name__}; take it out of target_modules or train it whole in "
        "modules_to_save"
    )


def backbone(model: nn.Module) -> nn.Module:
    """A causal model's body, without its head; PEFT wrappers are fine."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # the text half of Llama 4 has none of the name that its family gives to bodies
    return getattr(causal, "model", causal) if causal.base_model is causal else causal.base_model


def last_hidden_state(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, T, H)``: what the head would see, without running the head. PEFT wrappers are fine."""
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


def cache_argument(model: Any) -> str | None:
    """What a body calls its keys and values of earlier tokens, as an argument and in its output:
    ``past_key_values`` before transformers 5.24, ``cache`` since. None where it has none: the state
    of Mamba goes by that name too, and goes wrong beside a mask."""
    body = backbone(model)
    given = inspect.signature(body.forward).parameters
    if getattr(body, "_is_stateful", False) and "position_ids" not in given:
        return None
    return next((name for name in ("cache", "past_key_values") if name in given), None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each module is in its own again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Around ``model.generate``: eval mode (without dropout and gradient checkpointing, which would
    refuse the cache), eager, with ``config`` as the model's own, whose penalties must not enter.
    All is put back."""
    own = model.generation_config
    model.generation_config = config
    try:
        # a compiled body would be traced again for every length
        with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.generation_config = own


def left_padded(
    prompts: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]`` of prompts, padded on the left, as ``generate`` takes them."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    real = [[0] * n + [1] * (width - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


@torch.no_grad()
def check_packed(model: PreTrainedModel, argument: str = "model") -> None:
    """Refuses a model that reads across the sequences of a padding-free batch, whose limits the
    positions alone tell.

    Two sequences of four tokens go through its body, side by side and in one row. A model that
    cannot run on them is not judged.

    Raises:
        UserError: hidden states differ by more than rounding.
    """
    ids = torch.arange(8, device=model.device).view(2, 4)
    positions = torch.arange(4, device=model.device).repeat(2).unsqueeze(0)
    try:
        with _evaluating(model):
            apart = last_hidden_state(model, input_ids=ids).flatten(0, 1).float()
            packed = last_hidden_state(model, input_ids=ids.view(1, 8), position_ids=positions)[0]
    except Exception as error:
        logger.warning("%s: padding-free batches not checked, %s", argument, _first_line(error))
        return
    rounding = max(1e-3, 8 * torch.finfo(packed.dtype).eps)
    if (packed.float() - apart).abs().max() > rounding * apart.abs().max():
        raise UserError(
            f"{argument}: expected a model that keeps the sequences of padding_free or packed "
            f"batches apart, got {model.config.model_type}, which reads from one into the next; "
            "pad the batches"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel, argument: str = "model") -> None:
    """Refuses a model whose own logits are not those of its head as we read it.

    Four tokens go through it, twice. A model that cannot run on them alone is not judged.

    Raises:
        UserError: they are not finite, or differ by more than rounding.
    """
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    with _evaluating(model):
        try:
            logits = model(input_ids=ids).logits.float()
        except Exception as error:
            logger.warning("%s: head not checked, %s", argument, _first_line(error))
            return
        try:
            hidden = last_hidden_state(model, input_ids=ids)
            read = lm_head(model).logits(hidden).to(logits.device)
            # the model rounds scaled and capped logits to its dtype, and Head.logits does not
            rounding = max(1e-3, 8 * torch.finfo(hidden.dtype).eps)
            same = read.shape == logits.shape and bool(
                (read - logits).abs().max() <= rounding * logits.abs().max()
            )
        except (AttributeError, RuntimeError, TypeError):
            same = False
    if not same and not logits.isfinite().all():
        raise UserError(
            f"{argument}: expected finite logits, got NaN or infinity from "
            f"{model.config.model_type}; look at its weights and its dtype"
        )
    if not same:
        raise UserError(
            f"{argument}: expected logits that are softcap(logit_scale * (hidden @ weight.T + "
            f"bias)), got other ones from {model.config.model_type}"
        )


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


def positions(*models: nn.Module) -> int | None:
    """How long a sequence may be for all of some models; None where none has a limit."""
    limits = [_limit(model.config.get_text_config()) for model in models]  # type: ignore[union-attr,operator]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(config: Any) -> int | None:
    """Positions of a text config, stretched by its RoPE scaling where that has a factor."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:  # XLNet calls "no limit" -1
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # of the whole model, or by type of layer
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    stretched = [
        int(factor * (scaling.get("original_max_position_embeddings") or limit))
        for scaling in scalings
        if (factor := scaling.get("factor")) is not None
    ]
    return max([limit, *stretched])


def check_positions(longest: int, argument: str, *models: nn.Module) -> None:
    """Refuses sequences that are longer than a model can be given.

    Raises:
        UserError: naming the option that would shorten them.
    """
    limit = positions(*models)
    if limit is not None and longest > limit:
        raise UserError(
            f"{argument}: expected sequences of at most {limit} tokens, the positions of the model "
            f"(max_position_embeddings), got one of {longest}"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, the generation config's, and the one that
    closes an answer in the chat template."""
    return _ends(model.generation_config, tokenizer)


def eos_beside(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As :func:`eos_token_ids`, of a tokenizer's directory: a generation config may lie there."""
    there = (Path(path) / "generation_config.json").is_file()
    return _ends(GenerationConfig.from_pretrained(path) if there else None, tokenizer)


def _ends(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ends = [*listed, tokenizer.eos_token_id, Chat(tokenizer).end]
    return sorted({i for i in ends if i is not None})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
