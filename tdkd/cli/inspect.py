"""tdkd inspect: how a teacher spreads its probability, and which sets that asks for."""

from __future__ import annotations

import importlib.util
import math
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
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer

PS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
REACHED = 1 - 1e-5
"""Share of top_p at which a set counts as having reached it, as in ``select_actions``."""
QUANTILES = {"median": 0.5, "p95": 0.95}


def inspect(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[records.Record],
    *,
    top_p: float = 0.8,
    cut: float = 0.05,
    gamma: float = 0.99,
    max_k: int = 1024,
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
        top_p: of the recommendation, in (0, 1].
        cut: share of positions at which the recommended k may cut the nucleus.
        gamma: discount, of the bound ``kappa(p) = -gamma / (1 - gamma) log p``.
        max_k: tokens of a position that are looked at; a larger nucleus counts as one more.
        max_length: tokens of prompt and completion that count.
        batch_size: sequences a forward.
        max_new_tokens: length of an answer.
        seed: of the answers.
    Returns:
        ``positions``; ``mass``: mean probability of the k likeliest tokens, by k; ``sets``: by p
        their mean, median and 95 % size, ``kappa`` in nats and ``cut``: share of positions whose
        nucleus is larger than k, by k; ``recommended``: ``action_top_k`` (a power of two, None
        where ``max_k`` is too small), ``action_top_p``.
    Raises:
        UserError: no record has a response within ``max_length``.
    """
    encoded = _encoded(teacher, tokenizer, data, max_length, batch_size, max_new_tokens, seed)
    head = lm_head(teacher)
    most = min(max_k, head.weight.shape[0])
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    mass = torch.zeros(len(ks), dtype=torch.float64)
    sizes: dict[float, list[Tensor]] = {p: [] for p in sorted({*PS, top_p})}
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
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            reached = actions.log_probs.double().exp().cumsum(-1).cpu()
            mass += reached[:, [k - 1 for k in ks]].sum(0)
            for p, found in sizes.items():
                found.append((reached < p * REACHED).sum(-1) + 1)
            progress.update(task, advance=len(batch))
    size = {p: torch.cat(found) for p, found in sizes.items()}
    positions = size[top_p].numel()
    sets: dict[str, dict[str, Any]] = {
        f"{p:g}": {
            "mean": float(of_p.double().mean()),
            **{name: float(of_p.double().quantile(q)) for name, q in QUANTILES.items()},
            "kappa": -gamma / (1 - gamma) * math.log(p) if gamma < 1 else math.inf,
            "cut": {str(k): float((of_p > k).double().mean()) for k in ks},
        }
        for p, of_p in size.items()
    }
    enough = (k for k in ks if sets[f"{top_p:g}"]["cut"][str(k)] <= cut)
    return {
        "positions": positions,
        "mass": {str(k): m / positions for k, m in zip(ks, mass.tolist(), strict=True)},
        "sets": sets,
        "recommended": {"action_top_k": next(enough, None), "action_top_p": top_p},
    }


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
    encoded = []
    asked = []
    for record in data:
        if record.get("completion") is None:
            asked.append(records.prompt_ids(record["prompt"], tokenizer)[:max_length])
        else:
            encoded.append(records.encode(record, tokenizer, max_length))
    asked.sort(key=len)
    with progress_bar() as progress:
        task = progress.add_task("answers", total=len(asked), visible=bool(asked))
        for start in range(0, len(asked), batch_size):
            prompts = asked[start : start + batch_size]
            drawn = sample(
                teacher, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed + start
            )
            for prompt, (tokens, truncated) in zip(prompts, drawn, strict=True):
                whole = tokens if truncated else [*tokens, tokenizer.eos_token_id]
                encoded.append(records.Encoded(prompt, whole[: max_length - len(prompt)]))
            progress.update(task, advance=len(prompts))
    encoded = [e for e in encoded if e.completion]
    if not encoded:
        raise UserError(f"data: expected responses within max-length {max_length}, got none")
    return sorted(encoded, key=lambda e: len(e.prompt) + len(e.completion))


def run(
    *,
    model: str,
    data: str,
    output: str | None,
    max_examples: int | None,
    top_p: float,
    cut: float,
    gamma: float,
    max_k: int,
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
        ("top-p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("cut", cut, 0 <= cut < 1, "in [0, 1)"),
        ("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]"),
    ):
        if not fits:
            raise UserError(f"{name}: expected a number {expected}, got {value}")
    if output is not None:
        records.check_output(Path(output))
    loaded = records.read(data)[:max_examples]
    result = inspect(
        load_model(model, device=device),
        load_tokenizer(model, chat=True),
        loaded,
        top_p=top_p,
        cut=cut,
        gamma=gamma,
        max_k=max_k,
        max_length=max_length,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    _show(result, cut)
    if output is not None:
        given = {"model": model, "data": data, "gamma": gamma, "examples": len(loaded)}
        records.write_whole(Path(output), {**given, **result})
        console.print(f"written to {output}")
        if importlib.util.find_spec("matplotlib") is None:
            console.print('no picture: pip install "tdkd[train]"', markup=False)
        else:
            picture = Path(output).with_suffix(".png")
            _draw(result, picture)
            console.print(f"picture in {picture}")


def _show(result: dict[str, Any], cut: float) -> None:
    ks = [k for k in result["mass"] if int(k) in (8, 16, 32, 64, 128, 256, 1024)]
    table = Table(title=f"{result['positions']} positions")
    for column in ("top_p", "mean size", "median", "95 %", "kappa, nats"):
        table.add_column(column, justify="right")
    for k in ks:
        table.add_column(f"cut at {k}", justify="right")
    for p, of_p in result["sets"].items():
        shares = [f"{of_p['cut'][k]:.1%}" for k in ks]
        sizes = [f"{of_p[name]:.3g}" for name in ("mean", *QUANTILES)]
        table.add_row(p, *sizes, f"{of_p['kappa']:.3g}", *shares)
    stdout = Console()
    stdout.print(table)
    mass = ", ".join(f"{k}: {result['mass'][k]:.3f}" for k in result["mass"])
    stdout.print(f"mass of the k likeliest: {mass}", soft_wrap=True)
    k, p = (result["recommended"][name] for name in ("action_top_k", "action_top_p"))
    if k is None:
        stdout.print(f"top_p {p:g} is cut at more than {cut:.0%} of positions by every k here")
    else:
        stdout.print(f"action_top_k: {k}\naction_top_p: {p:g}")


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ks = [int(k) for k in result["mass"]]
    left.plot(ks, [1 - m for m in result["mass"].values()], marker="o")
    left.set(xscale="log", yscale="log", xlabel="k", ylabel="1 - mass of the k likeliest tokens")
    for p, of_p in result["sets"].items():
        right.plot(ks, list(of_p["cut"].values()), marker=".", label=f"top_p {p}")
    right.set(xscale="log", xlabel="k", ylabel="share of positions that k cuts")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    records.write_figure(path, figure)
    plt.close(figure)
