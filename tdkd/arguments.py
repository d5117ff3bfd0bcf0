"""What the ops refuse: each message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdkd.td_rows import TDRows
from tdkd.types import ActionSet, Scale


def one_teacher(hidden: Tensor | None, weight: Tensor | None, actions: ActionSet | None) -> None:
    """Refuses both, neither or half of a live teacher and given sets."""
    if (hidden is None) == (weight is None) != (actions is None):
        return
    named = {"teacher_hidden": hidden, "teacher_weight": weight, "actions": actions}
    given = [name for name, value in named.items() if value is not None]
    raise ValueError(
        "teacher: expected either teacher_hidden and teacher_weight, or actions, got "
        f"{' and '.join(given) or 'none of them'}"
    )


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(f'"{choice}"' for choice in allowed)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def number(name: str, value: float) -> None:
    """Scalars of any kind, symbolic ones of the compiler too."""
    if value is None or isinstance(value, str | Sequence):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(
                f"{name}: expected a number, got a tensor of shape {tuple(value.shape)}"
            )
        if value.requires_grad:  # kernels take it as a constant
            raise TypeError(f"{name}: expected a constant, got a tensor that requires a gradient")


def within(name: str, value: float, low: float, high: float) -> None:
    number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r}")


def positive(name: str, value: float) -> None:
    number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def scale(prefix: str, temperature: float, softcap: float | None, logit_scale: float) -> Scale:
    positive(f"{prefix}temperature", temperature)
    positive(f"{prefix}logit_scale", logit_scale)
    if softcap is not None:
        positive(f"{prefix}softcap", softcap)
    return Scale(temperature, softcap, logit_scale)


def an_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def whole(name: str, value: int, least: int = 1) -> None:
    an_int(name, value)
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")


def selection(k: int, top_p: float) -> None:
    whole("k", k)
    number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")


def floating(name: str, x: Tensor, *, dims: int = 1) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {short(x.dtype)}"
        )
    if x.dim() < dims:
        raise ValueError(f"{name}: expected at least {dims} dimension, got a scalar")


def integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {short(x.dtype)}")


def token_ids(name: str, given: int | Sequence[int] | Tensor) -> Tensor:
    """int ``(n,)``: one id or several."""
    if isinstance(given, Tensor):
        integers(name, given)
        return given.flatten()
    ids = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{name}: expected an integer or several, got {given!r}")
    return torch.tensor(ids, dtype=torch.int64)


def tokens(name: str, tokens: Tensor, lead: torch.Size, like: Tensor) -> None:
    integers(name, tokens)
    if tokens.shape != lead:
        raise ValueError(
            f"{name}: expected one token a position {tuple(lead)}, got {tuple(tokens.shape)}"
        )
    same_device(name, tokens, like)


def ordinary(x: Tensor) -> Tensor:
    """A copy of what was made in inference mode, which autograd refuses to keep; or the tensor."""
    # the compiler cannot ask, and keeps such tensors itself
    return x if torch.compiler.is_compiling() or not x.is_inference() else x.clone()


def set_ids(name: str, ids: Tensor, lead: torch.Size, like: Tensor) -> Tensor:
    integers(name, ids)
    if ids.dim() == 0 or ids.shape[:-1] != lead:
        raise ValueError(f"{name}: expected ({dims(lead)}k) ids, got {tuple(ids.shape)}")
    same_device(name, ids, like)
    return ordinary(ids)


def action_sets(
    actions: ActionSet, lead: torch.Size, like: Tensor, state: Tensor, check: bool
) -> ActionSet:
    if not isinstance(actions, ActionSet):
        raise TypeError(f"actions: expected an ActionSet, got {type(actions).__name__}")
    ids, log_probs, _ = actions
    set_ids("actions", ids, lead, like)
    if not ids.shape[-1]:
        raise ValueError("actions: expected sets with room for at least one id, got none")
    floating("actions.log_probs", log_probs)
    same_shape("actions.log_probs", log_probs, ids.shape, "actions.ids")
    same_device("actions.log_probs", log_probs, like)
    if check:
        above = (ids >= 0) & state.unsqueeze(-1) & ~(log_probs <= 1e-3)  # rounding, or NaN
        if bool(above.any()):
            raise ValueError(
                "actions.log_probs: expected log-probabilities, at most 0, got "
                f"{float(log_probs[above][0]):g}"
            )
    return ActionSet(ordinary(ids), ordinary(log_probs.detach()), actions.count)


def successor(successor: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    integers("successor", successor)
    same_shape("successor", successor, shape, "the rows")
    same_device("successor", successor, like)
    if successor.numel() and looked_at(successor):
        low, high = (int(x) for x in successor.aminmax())
        if low < -2 or high >= successor.numel():
            raise ValueError(
                f"successor: expected rows from 0 to {successor.numel() - 1}, -1 or -2, got "
                f"{low if low < -2 else high}"
            )
    return ordinary(successor)


def same_shape(name: str, x: Tensor, shape: torch.Size, of: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected the shape of {of} {tuple(shape)}, got {tuple(x.shape)}")


def same_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")


def same_vocabulary(name: str, teacher: int, student: int, vocab_size: int | None) -> None:
    if vocab_size is None and teacher != student:
        raise ValueError(
            f"{name}: expected the student's vocabulary of {student}, got {teacher}; where they "
            "differ by padding alone, pass vocab_size"
        )


def columns(name: str, logits: Tensor, vocab_size: int | None) -> Tensor:
    if not leaves_out(vocab_size, logits.shape[-1], f"the columns of {name}"):
        return logits
    return logits[..., :vocab_size]


def leaves_out(vocab_size: int | None, size: int, of: str) -> bool:
    """Whether ``vocab_size`` is less than the ``size`` of what it may cut."""
    if vocab_size is None:
        return False
    an_int("vocab_size", vocab_size)
    if vocab_size != size and not 1 <= vocab_size < size:  # a vocabulary may be empty
        raise ValueError(f"vocab_size: expected 1 to {size}, {of}, got {vocab_size}")
    return vocab_size != size


def head(
    hidden_name: str,
    hidden: Tensor,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    floating(hidden_name, hidden)
    floating(weight_name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name}: expected (V, {hidden.shape[-1]}) to fit {hidden_name}, got "
            f"{tuple(weight.shape)}"
        )
    same_device(weight_name, weight, hidden)
    if bias is not None:
        floating(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{bias_name}: expected ({weight.shape[0]},) to fit {weight_name}, got "
                f"{tuple(bias.shape)}"
            )
        same_device(bias_name, bias, hidden)
    # a slice of everything would cost a second gradient too
    if leaves_out(vocab_size, weight.shape[0], f"the rows of {weight_name}"):
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return weight, bias


def ids_below(
    name: str, ids: Tensor, vocab: int, ignore_index: int | None = None, check: bool = True
) -> None:
    """Refuses ids >= V on a CPU, where a compiled graph does so as it runs, and with ``check``.

    With ``ignore_index`` they are tokens: negative ones are refused too, but for that one.
    """
    if not check and ids.device.type != "cpu":
        return
    wrong = ids >= vocab
    told = f"{name}: expected ids below the vocabulary's size {vocab}"
    if ignore_index is not None:
        wrong = (wrong | (ids < 0)) & (ids != ignore_index)
        told = f"{name}: expected ids from 0 to {vocab - 1}, or {ignore_index}"
    if ids.device.type == "cpu" and torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), told)
    elif bool(wrong.any()):
        raise ValueError(f"{told}, got {int(ids[wrong][0])}")


def distinct(name: str, ids: Tensor) -> None:
    again = repeated(ids)
    if bool(again.any()):
        raise ValueError(f"{name}: expected distinct ids in a set, got {int(ids[again][0])} twice")


def repeated(ids: Tensor) -> Tensor:
    """bool ``(..., k)``: all but one of the slots of each id >= 0 of a row."""
    ordered, slot = ids.sort(dim=-1)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return torch.zeros_like(again).scatter(-1, slot, again)


def taken_held(name: str, rows: TDRows, tokens: Tensor) -> None:
    """Refuses sets without the taken token, whose rows would drop out of the loss; a set that is
    empty is one of which the teacher knows nothing."""
    without = ~rows.state & (rows.ids >= 0).any(-1)
    if bool(without.any()):
        row = int(without.int().argmax())
        raise ValueError(
            f"{name}: expected sets that hold the taken tokens (include=tokens), got one without "
            f"{int(tokens.flatten()[row])} in row {row} of {without.numel()}"
        )


def chances(name: str, law: Tensor) -> None:
    """Refuses what no column can be drawn by; off the CPU asynchronously."""
    if looked_at(law):
        shares(name, law)
        if not bool(law.any()):
            raise ValueError(f"{name}: expected a chance > 0 of some column, got zeros alone")
    else:
        fits = ((law >= 0) & law.isfinite()).all() & law.any()
        torch._assert_async(fits, f"{name}: expected finite numbers >= 0, not all 0, got others")


def generator(given: torch.Generator | None) -> None:
    if given is not None and not isinstance(given, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(given).__name__}")


def shares(name: str, x: Tensor) -> None:
    fits = (x >= 0) & x.isfinite()
    if not bool(fits.all()):
        raise ValueError(f"{name}: expected finite numbers >= 0, got {float(x[~fits][0]):g}")


def usable(name: str, x: Tensor, state: Tensor | None = None) -> None:
    bad = (x.isnan() | (x == torch.inf)).any(-1) | ~(x != -torch.inf).any(-1)
    if state is not None:
        bad &= state
    if bool(bad.any()):
        row = int(bad.flatten().int().argmax())
        raise ValueError(
            f"{name}: expected rows without NaN or +inf and with a finite entry, got row {row} "
            f"of {bad.numel()} without"
        )


def looked_at(x: Tensor, check: bool = False) -> bool:
    """Whether values are looked at: on request, and on a CPU, which need not be waited for."""
    return check or (x.device.type == "cpu" and not torch.compiler.is_compiling())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dims(lead: torch.Size) -> str:
    return "".join(f"{size}, " for size in lead)
