"""Bias and spread of log Z from a batch vocabulary, and of the gradient, against the exact ones.

    python benchmarks/normaliser.py --teacher runs/demo/teacher --data runs/demo/heldout.jsonl \
        --student before=runs/demo/student-init --student warm=runs/demo/warm/final \
        --student after=runs/demo/td/final --json benchmarks/results/normaliser.json

Models and data are those of `make demo`. A batch is as many answers as a training step holds.
Each m is drawn many times for every batch, uniformly and by the law of ``law="student"``: its mean
probabilities over 64 rows of the batch, a tenth of them spread evenly; and beside the union of the
sets (``normaliser="batch"``) or without it (``"sampled"``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tdkd import ops, records
from tdkd.benchmark.report import environment
from tdkd.cli.evaluate import collate
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer
from tdkd.objectives import ForwardKL

EXTRA = (256, 1024, 4096)
CASES: list[tuple[int, str, ops.Normaliser]] = [
    (0, "none", "batch"),
    *((m, law, "batch") for law in ("uniform", "student") for m in EXTRA),
    *((m, "student", "sampled") for m in (1024, 2048, 4096)),
    (4096, "uniform", "sampled"),
]


class Batch(NamedTuple):
    """What the heads see of one batch's response positions."""

    hidden: Tensor
    """the student's, ``[N, H]``."""
    weight: Tensor
    tokens: Tensor
    actions: ops.ActionSet


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--student", required=True, action="append", metavar="NAME=DIR")
    parser.add_argument("--answers", type=int, default=8, help="a batch")
    parser.add_argument("--draws", type=int, default=8, help="vocabularies of each m and batch")
    parser.add_argument("--top-p", type=float, default=0.8, help="of the sets")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)

    tokenizer = load_tokenizer(options.teacher, chat=True)
    teacher = load_model(options.teacher)
    chat = records.Chat(tokenizer)
    encoded = [chat.encode(r, max_length=128) for r in records.read(options.data)]
    students = {}
    print("| student | normaliser | m | law | columns | bias | spread | gradient, error | cosine |")
    print("|---|---|---|---|---|---|---|---|---|")
    for given in options.student:
        name, _, path = given.rpartition("=")
        student = load_model(path)
        batches = [
            read(
                teacher,
                student,
                tokenizer.pad_token_id,
                encoded[start:][: options.answers],
                options.top_p,
            )
            for start in range(0, len(encoded), options.answers)
        ]
        students[name] = [measure(batches, *case, options.draws) for case in CASES]
        for row in students[name]:
            print(
                f"| {name} | {row['normaliser']} | {row['extra']} | {row['law']} | "
                f"{row['columns']:,.0f} | "
                f"{row['bias']:+.4f} | {row['spread']:.4f} | {row['gradient_error']:.3f} | "
                f"{row['gradient_cosine']:.4f} |"
            )
    if options.json:
        drawn = {"answers": options.answers, "draws": options.draws, "top_p": options.top_p}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        records.write_whole(
            options.json, {"date": date, **environment(), **drawn, "students": students}
        )


def measure(
    batches: list[Batch], extra: int, law: str, normaliser: ops.Normaliser, draws: int
) -> dict[str, object]:
    """Means over batches and draws of what :func:`compare` finds."""
    found: list[tuple[float, ...]] = []
    columns: list[int] = []
    for batch in batches:
        chances = ops.student_law(batch.hidden, batch.weight) if law == "student" else None
        rows, widths = compare(batch, extra, chances, normaliser, draws if extra else 1)
        found += rows
        columns += widths
    means = dict(zip(NAMES, torch.tensor(found).mean(0).tolist(), strict=True))
    drawn = {"normaliser": normaliser, "extra": extra, "law": law}
    return {**drawn, "columns": sum(columns) / len(columns), **means}


NAMES = ("bias", "spread", "gradient_error", "gradient_cosine")


def read(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    pad: int,
    encoded: list[records.Encoded],
    top_p: float,
) -> Batch:
    """Both models' bodies, and the teacher's sets."""
    ids, mask, states, tokens = collate(encoded, pad, torch.device("cpu"))
    heads = [lm_head(model) for model in (teacher, student)]
    with torch.no_grad():
        hidden = [
            last_hidden_state(model, input_ids=ids, attention_mask=mask)[states]
            for model in (teacher, student)
        ]
    actions = ops.linear_select_actions(hidden[0], heads[0].weight, 64, top_p, include=tokens)
    return Batch(hidden[1].requires_grad_(), heads[1].weight.detach(), tokens, actions)


def compare(
    batch: Batch, extra: int, law: Tensor | None, normaliser: ops.Normaliser, draws: int
) -> tuple[list[tuple[float, ...]], list[int]]:
    """For each draw: mean and spread over positions of log Z - its exact value, nats; and of the
    gradient of the mean tail-bucket KL with respect to hidden states, the relative error and the
    cosine."""
    leaf, weight, tokens, actions = batch

    def gradient(**normaliser: object) -> Tensor:
        loss = ops.linear_td_loss(
            leaf, weight, tokens, actions=actions, objective=ForwardKL(tail=True), **normaliser
        ).loss
        return torch.autograd.grad(loss, leaf)[0].flatten()

    exact = gradient(normaliser="exact")
    with torch.no_grad():
        log_p = ops.linear_log_probs(leaf, weight, actions.ids[:, :1]).log_probs
    rows, widths = [], []
    for seed in range(draws):
        drawn = {"law": law, "generator": torch.Generator().manual_seed(seed)}
        if normaliser == "batch":
            vocabulary = ops.batch_vocabulary(actions, weight.shape[0], extra=extra, **drawn)
        else:
            vocabulary = ops.sampled_vocabulary(weight.shape[0], extra, **drawn)
        with torch.no_grad():
            estimated = ops.linear_log_probs(
                leaf,
                weight,
                actions.ids,
                vocabulary=vocabulary,
                gathered=normaliser == "sampled",
            )
            # the same logit less another log Z
            off = (log_p - estimated.log_probs[:, :1]).squeeze(-1)
        estimate = gradient(normaliser=normaliser, vocabulary=vocabulary)
        error = (estimate - exact).norm() / exact.norm()
        cosine = torch.nn.functional.cosine_similarity(estimate, exact, dim=0)
        rows.append((off.mean().item(), off.std().item(), error.item(), cosine.item()))
        widths.append(int((vocabulary.ids >= 0).sum()))
    return rows, widths


if __name__ == "__main__":
    main()
