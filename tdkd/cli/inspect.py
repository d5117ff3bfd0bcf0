"""tdkd inspect: how a teacher spreads its probability, and which sets that asks for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdkd import ops, records
from tdkd.cli.console import console, progress_bar
from tdkd.cli.evaluate import collate
from tdkd.cli.generate import sample
from tdkd.errors import UserError
from tdkd.kernels.select_actions.reference import REACHED
from tdkd.models import check_positions, last_hidden_state, lm_head, load_model, load_tokenizer

PS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ROUNDING = 1e-6
"""Of the logarithm of a mass of 1, nats."""
QUANTILES = {"median": 0.5, "p95": 0.95}


def inspect(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[records.Record],
    *,
    mass: float = 0.95,
    gamma: float = 0.99,
    max_k: int = 1024,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Mass, set sizes and cuts over every response position of the records.

    Args:
        teacher: in eval mode.
        tokenizer: its own.
        data: records; where one has no completion, the teacher answers (temperature 1, top 50).
        mass: mean probability that the recommended k holds, in (0, 1].
        gamma: discount, of kappa.
        max_k: tokens of a position that are looked at; a larger nucleus counts as one more.
        teacher_temperature: divides its logits, > 0.
        vocab_size: columns at and above it are padding.
        max_length: tokens of prompt and completion that count.
        batch_size: sequences a forward.
        max_new_tokens: length of an answer.
        seed: of the answers.
    Returns:
        ``positions``; ``looked_at``: ``max_k``, or the vocabulary where that is smaller; ``mass``:
        mean probability of the k likeliest tokens, by k; ``kappa``: ``-gamma / (1 - gamma)`` times
        the mean of its logarithm, nats, by k; ``sets``: by p the mean, median and 95 % size of the
        nucleus (``looked_at`` + 1 where it is larger), ``beyond``: the share of positions where it
        is, the bound ``kappa = -gamma / (1 - gamma) log p`` of what no k cuts, and by k ``cut``:
        the share of positions whose nucleus is larger, and ``kappa_cut``: kappa of what k leaves.
        ``recommended``: ``action_top_k``, the least power of two that holds ``mass`` (None
        where none does), and ``action_top_p`` 1. Kappas are None where gamma = 1 leaves no bound.
    Raises:
        UserError: no record has a response within ``max_length``, or the teacher has fewer columns
            than ``vocab_size``.
    """
    head = lm_head(teacher)
    columns = head.weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= columns <= head.weight.shape[0]:
        raise UserError(
            f"vocab-size: expected 1 to {head.weight.shape[0]}, the columns of the teacher, got "
            f"{vocab_size}"
        )
    encoded = _encoded(teacher, tokenizer, data, max_length, batch_size, max_new_tokens, seed)
    most = min(max_k, columns)
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    at = torch.tensor(ks) - 1
    held = torch.zeros(len(ks), dtype=torch.float64)
    # of the mass, its logarithm, in place of kappa
    lost = torch.zeros(len(ks), dtype=torch.float64)
    lost_by_p = {p: torch.zeros(len(ks), dtype=torch.float64) for p in PS}
    sizes: dict[float, list[Tensor]] = {p: [] for p in PS}
    with progress_bar() as progress, torch.inference_mode():
        task = progress.add_task("teacher", total=len(encoded))
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            ids, mask, states, _ = collate(batch, tokenizer.pad_token_id, teacher.device)
            hidden = last_hidden_state(teacher, input_ids=ids, attention_mask=mask)[states]
            actions = ops.linear_select_actions(
                hidden,
                head.weight,
                most,
                bias=head.bias,
                temperature=teacher_temperature,
                vocab_size=vocab_size,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            # rounding must not make more than 1 of it
            reached = actions.log_probs.double().exp().cumsum(-1).clamp(max=1.0).cpu()
            held += reached[:, at].sum(0)
            lost -= reached[:, at].log().sum(0)
            for p, found in sizes.items():
                size = (reached < p * REACHED).sum(-1) + 1
                found.append(size)
                within = torch.minimum(size.unsqueeze(-1) - 1, at)
                lost_by_p[p] -= reached.gather(-1, within).log().sum(0)
            progress.update(task, advance=len(batch))
    size_of = {p: torch.cat(found) for p, found in sizes.items()}
    positions = size_of[PS[0]].numel()

    def by_k(numbers: Sequence[Any]) -> dict[str, Any]:
        return {str(k): number for k, number in zip(ks, numbers, strict=True)}

    def kappas(total: Tensor) -> dict[str, float | None]:
        return by_k([_kappa(gamma, loss) for loss in (total / positions).tolist()])

    shares = by_k((held / positions).tolist())
    return {
        "positions": positions,
        "looked_at": most,
        "mass": shares,
        "kappa": kappas(lost),
        "sets": {
            f"{p:g}": {
                "mean": float(of_p.double().mean()),
                **{
                    name: float(of_p.double().quantile(q, interpolation="higher"))
                    for name, q in QUANTILES.items()
                },
                "beyond": float((of_p > most).double().mean()),
                "kappa": _kappa(gamma, -math.log(p)),
                "cut": by_k([float((of_p > k).double().mean()) for k in ks]),
                "kappa_cut": kappas(lost_by_p[p]),
            }
            for p, of_p in size_of.items()
        },
        "recommended": {
            "action_top_k": next((k for k in ks if shares[str(k)] >= mass * REACHED), None),
            "action_top_p": 1.0,
        },
    }


def _kappa(gamma: float, loss: float) -> float | None:
    """Nats that a discounted sum of ``loss`` a step can come to; None: without a bound."""
    if loss < ROUNDING:
        return 0.0
    return gamma / (1 - gamma) * loss if gamma < 1 else None


def _encoded(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[records.Record],
    max_length: int,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
) -> list[records.Encoded]:
    """Tokens of every record, the shortest first; answered by the teacher where need be."""
    chat = records.Chat(tokenizer)
    encoded = []
    asked = []
    for record in data:
        if record.get("completion") is None:
            asked.append(chat.prompt(record))
        else:
            encoded.append(chat.encode(record, max_length))
    # others leave no room for an answer
    asked = sorted((prompt for prompt in asked if len(prompt) < max_length), key=len)
    if asked:
        check_positions(len(asked[-1]) + max_new_tokens, "max-new-tokens", teacher)
    with progress_bar() as progress:
        task = progress.add_task("answers", total=len(asked), visible=bool(asked))
        for start in range(0, len(asked), batch_size):
            prompts = asked[start : start + batch_size]
            drawn = sample(
                teacher, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed + start
            )
            for prompt, (tokens, truncated) in zip(prompts, drawn, strict=True):
                whole = tokens if truncated else [*tokens, chat.end]
                encoded.append(records.Encoded(prompt, whole[: max_length - len(prompt)]))
            progress.update(task, advance=len(prompts))
    encoded = [e for e in encoded if e.completion]
    if not encoded:
        raise UserError(f"data: expected responses within max-length {max_length}, got none")
    encoded.sort(key=lambda e: len(e.prompt) + len(e.completion))
    check_positions(len(encoded[-1].prompt) + len(encoded[-1].completion), "max-length", teacher)
    return encoded


def run(
    *,
    model: str,
    data: str,
    output: str | None,
    max_examples: int | None,
    mass: float,
    gamma: float,
    max_k: int,
    teacher_temperature: float,
    vocab_size: int | None,
    max_length: int,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    device: str,
) -> None:
    """The command; every argument is an option of ``tdkd inspect``."""
    records.check_at_least(
        1,
        max_examples=max_examples,
        max_k=max_k,
        max_length=max_length,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    for name, value, fits, expected in (
        ("mass", mass, 0 < mass <= 1, "in (0, 1]"),
        ("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]"),
        ("teacher-temperature", teacher_temperature, 0 < teacher_temperature < math.inf, "> 0"),
    ):
        if not fits:
            raise UserError(f"{name}: expected a number {expected}, got {value}")
    if output is not None:
        if Path(output).suffix == ".png":
            raise UserError(
                f"output: expected a file of JSON, whose picture is put beside it, got {output}"
            )
        records.check_output(Path(output))
    loaded = records.read(data)[:max_examples]
    result = inspect(
        load_model(model, device=device),
        load_tokenizer(model, chat=True),
        loaded,
        mass=mass,
        gamma=gamma,
        max_k=max_k,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        max_length=max_length,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    _show(result, mass)
    if output is not None:
        given = {
            "model": model,
            "data": data,
            "gamma": gamma,
            "teacher_temperature": teacher_temperature,
            "examples": len(loaded),
        }
        records.write_whole(Path(output), {**given, **result})
        console.print(f"written to {output}", markup=False)
        if importlib.util.find_spec("matplotlib") is None:
            console.print('no picture: pip install "tdkd[train]"', markup=False)
        else:
            picture = Path(output).with_suffix(".png")
            _draw(result, picture)
            console.print(f"picture in {picture}", markup=False)


def _show(result: dict[str, Any], mass: float) -> None:
    most, k = result["looked_at"], result["recommended"]["action_top_k"]
    # where none holds enough, the largest of those that were tried
    cap = list(result["mass"])[-1] if k is None else str(k)
    likeliest = _table("the k likeliest tokens", "k", "mass", "kappa, nats")
    for size, share in result["mass"].items():
        likeliest.add_row(f"{int(size):,}", f"{share:.4f}", _nats(result["kappa"][size]))
    nucleus = _table(
        "the nucleus, kappa in nats",
        *("top_p", "mean size", "median", "95 %", "kappa", f"cut at {int(cap):,}", "kappa then"),
    )
    for p, of_p in result["sets"].items():
        # a mean over sets that were not seen to their end is too small
        mean = (">" if of_p["beyond"] else "") + _size(of_p["mean"])
        quantiles = [
            f">{_size(most)}" if of_p[name] > most else _size(of_p[name]) for name in QUANTILES
        ]
        cut = f"{of_p['cut'][cap]:.1%}"
        nucleus.add_row(
            p, mean, *quantiles, _nats(of_p["kappa"]), cut, _nats(of_p["kappa_cut"][cap])
        )
    stdout = Console()
    stdout.print(f"{result['positions']:,} positions")
    stdout.print(likeliest)
    stdout.print(nucleus)
    if k is None:
        stdout.print(f"the {int(cap):,} likeliest tokens hold less than {mass:g}")
    else:
        stdout.print(f"action_top_k: {k}\naction_top_p: 1.0")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _size(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _nats(kappa: float | None) -> str:
    return "no bound" if kappa is None else f"{kappa:.3g}" if kappa < 1000 else f"{kappa:,.0f}"


def _draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    mass, cut, size, kappa = figure.subplots(2, 2).flatten()
    ks = [int(k) for k in result["mass"]]
    sets = result["sets"]
    ps = [float(p) for p in sets]
    mass.plot(ks, [1 - m for m in result["mass"].values()], marker="o")
    mass.set(xscale="log", yscale="log", xlabel="k", ylabel="1 - mass of the k likeliest tokens")
    for p, of_p in sets.items():
        cut.plot(ks, list(of_p["cut"].values()), marker=".", label=f"top_p {p}")
    cut.set(xscale="log", xlabel="k", ylabel="share of positions that k cuts")
    for name in ("mean", *QUANTILES):
        size.plot(ps, [of_p[name] for of_p in sets.values()], marker="o", label=name)
    size.set(yscale="log", xlabel="top_p", ylabel=f"size, seen up to {result['looked_at']:,}")
    for axis in (mass, cut, size, kappa):
        axis.grid(alpha=0.3)
    for axis in (cut, size):
        axis.legend()
    if any(result["kappa"].values()):
        for p, of_p in sets.items():
            kappa.plot(ks, list(of_p["kappa_cut"].values()), marker=".", label=f"top_p {p}")
        kappa.plot(ks, list(result["kappa"].values()), marker=".", label="top_p 1")
        kappa.set(xscale="log", yscale="log", xlabel="k", ylabel="kappa of sets cut at k, nats")
        kappa.legend()
    else:  # gamma is 1, or 0
        kappa.set_axis_off()
    records.write_figure(path, figure)
