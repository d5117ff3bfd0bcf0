"""What V and V' are in training beyond the student's own: a value head, and a target network.

Both are kept beside the student: neither is a part of the weights that ``save_pretrained`` writes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkd.errors import UserError, missing
from tdkd.objectives import Objective

try:
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback
except (ImportError, RuntimeError) as error:  # lazy modules raise the latter
    raise missing(error) from error

VALUE_HEAD = "value_head.safetensors"
TARGET = "target.safetensors"
NAME = "td_value_head"
"""The parameter of the student that is its value head."""


def check_of_use(
    objective: Objective | None, *, gamma: float, target_network: str, value_head: bool
) -> None:
    """Refuses what would cost without a say in the loss.

    Raises:
        UserError: the objective does not look ahead, or (``target_network``) gamma is 0, or it
            counts from the first state, where V' must be the student's own.
    """
    looks_ahead = objective is not None and objective.looks_ahead
    told = "none" if objective is None else repr(objective)
    if value_head and not looks_ahead:
        raise UserError(
            "value_head: expected an objective that looks ahead, since v(s) cancels in the others, "
            f"got {told}"
        )
    if target_network != "none" and not (looks_ahead and gamma):
        raise UserError(
            "target_network: expected an objective that looks ahead and gamma > 0, since V' has no "
            f"say in the others, got {told} and gamma {gamma:g}"
        )
    if target_network != "none" and objective is not None and objective.starts:
        raise UserError(
            "target_network: expected none with an objective that counts from the first state of a "
            f"response, where V' must be the student's own, got {target_network} with {told}"
        )


def check_whole(whole: bool, *, target_network: str, value_head: bool) -> None:
    """Refuses models that are sharded.

    Raises:
        UserError: there would be an average or a vector of a part of the student.
    """
    for name, on in (("target_network", target_network != "none"), ("value_head", value_head)):
        if on and not whole:
            raise UserError(f"{name}: expected a student that is whole, got FSDP or DeepSpeed")


def add_value_head(student: nn.Module, width: int) -> None:
    """Gives a student ``v(s) = hidden @ vector``, float32 ``(width,)``, zero at first, unless it
    has one from an earlier trainer.

    As a parameter of the student it is trained, clipped and reduced over ranks with it; its state
    dict does not tell.
    """
    if NAME in student._parameters:
        return
    device = next(student.parameters()).device
    student.register_parameter(NAME, nn.Parameter(torch.zeros(width, device=device)))
    student.register_state_dict_post_hook(_left_out)
    student.register_load_state_dict_post_hook(_not_missed)


def remove_value_head(student: nn.Module) -> None:
    """Takes the value head of an earlier trainer out, if there is one."""
    student._parameters.pop(NAME, None)


def _left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(prefix + NAME, None)


def _not_missed(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.rpartition(".")[2] != NAME]


@contextmanager
def without_value_head(student: nn.Module) -> Iterator[None]:
    """A student whose parameters are those of its architecture, for who copies them by name."""
    vector = student._parameters.pop(NAME, None)
    try:
        yield
    finally:
        if vector is not None:
            student.register_parameter(NAME, vector)


def state_value(student: nn.Module, hidden: Tensor) -> Tensor | None:
    """``(N,)`` float32 or better: v of the states with hidden states ``(N, H)``; None without a
    value head."""
    vector = getattr(student, NAME, None)
    if vector is None:
        return None
    dtype = torch.promote_types(hidden.dtype, vector.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(dtype) @ vector.to(dtype)


def save_value_head(student: nn.Module, folder: Path) -> None:
    """Writes ``value_head.safetensors`` into ``folder``, if there is one to write."""
    vector = getattr(student, NAME, None)
    if vector is not None:
        _write(folder / VALUE_HEAD, {"weight": vector.detach()})


def load_value_head(student: nn.Module, folder: Path) -> None:
    """Takes back what :func:`save_value_head` wrote, if the student has a value head.

    Raises:
        UserError: there is none in ``folder``, or one of another size.
    """
    vector = getattr(student, NAME, None)
    if vector is not None:
        saved = _read(folder / VALUE_HEAD, {"weight": vector}, "value_head")
        with torch.no_grad():
            vector.copy_(saved["weight"])


class TargetNetwork(TrainerCallback):
    """A student whose parameters follow those of the one that learns; as a callback it moves once
    an optimizer step, after it.

    ``target = decay * target + (1 - decay) * student`` every so many steps (Polyak averaging, as in
    DDPG, arXiv 1509.02971; decay 0 with some hundred steps between are the copies of DQN). Only
    parameters that train have a second copy: the others, as those under LoRA, are shared. Averages
    of low-precision parameters are kept in float32, where a hundredth of a step is not lost.

    Args:
        student: the one that learns, before any wrapper.
        decay: in [0, 1).
        every: optimizer steps between two moves, >= 1.
    """

    def __init__(self, student: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self._student = student
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.network: Any = copy.deepcopy(student, shared)
        """In eval mode, without gradients."""
        trained = dict(_trained(student))
        self._own = {n: p for n, p in self.network.named_parameters() if n in trained}
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in self._own.items()
        }
        self.network.requires_grad_(False).eval()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every:
            return
        current = dict(self._student.named_parameters())
        for name, average in self._average.items():
            average.lerp_(current[name].to(average.dtype), 1.0 - self.decay)
        self._apply()

    def _apply(self) -> None:
        for name, average in self._average.items():
            if self._own[name].dtype != average.dtype:
                self._own[name].copy_(average)

    def save(self, folder: Path) -> None:
        """Writes the averages as ``target.safetensors`` into ``folder``."""
        _write(folder / TARGET, self._average)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes back what :meth:`save` wrote.

        Raises:
            UserError: there is none in ``folder``, or one of other parameters.
        """
        saved = _read(folder / TARGET, self._average, "target_network")
        for name, average in self._average.items():
            average.copy_(saved[name])
        self._apply()


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    os.replace(aside, path)


def _read(path: Path, like: dict[str, Tensor], option: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{option}: expected {path.name} in {path.parent}, got none: that was saved without it"
        )
    saved = load_file(path)
    if {n: x.shape for n, x in saved.items()} != {n: x.shape for n, x in like.items()}:
        raise UserError(f"{option}: expected this student's parameters in {path}, got other ones")
    return saved
