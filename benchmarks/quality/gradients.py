"""Where the objectives push a student: their gradients beside those of the KL.

    python benchmarks/quality/gradients.py --data DATA --models runs/demo --work runs/quality

It reads the folder of run.py and takes one batch. Of every method's gradient, over all parameters
of a cold and of a warm student: its length, and the cosine of a step against it with the step that

* lowers KL(teacher || student) over the whole vocabulary (and, for scale, the same on other data),
* lowers the cross-entropy of the teacher's tokens,
* raises the student's mass on the teacher's set,
* raises the entropy of the student's policy there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import Batch, order
from learn import forward
from methods import FAMILY, METHODS, SET, Method, with_extras
from run import Bench, options_of
from torch import Tensor

from tdkd import records
from tdkd.benchmark.report import environment
from tdkd.models import lm_head
from tdkd.ops import ActionSet, linear_select_actions

SHOWN = ("kl-tail", "soft-td", "published", "published-identity", *FAMILY)


def gradient(student: Any, loss: Tensor) -> Tensor:
    """``[parameters]``, float32."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    given = zip(grads, parameters, strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in given])


def on_set(quantity: Callable[[Tensor], Tensor], actions: ActionSet) -> Method:
    """Minus the mean of a quantity of the student's log-probabilities on the set ``[N, k]``."""
    columns, outside = actions.ids.long().clamp(min=0), actions.ids < 0

    def loss(student: Tensor, teacher: Tensor, tokens: Tensor, successor: Tensor) -> Tensor:
        log_q = student.log_softmax(-1).gather(-1, columns)
        return -quantity(log_q.masked_fill(outside, -torch.inf)).mean()

    return Method("", dense=loss)


def mass(log_q: Tensor) -> Tensor:
    return log_q.exp().sum(-1)


def entropy(log_q: Tensor) -> Tensor:
    policy = log_q.log_softmax(-1)
    return -(policy.exp() * policy.clamp(min=-1e4)).sum(-1)


def measure(bench: Bench, start: str, names: list[str], size: int) -> list[dict[str, Any]]:
    """One row per method."""
    student = bench.student(start)
    heads = lm_head(student), lm_head(bench.teacher)
    batch, other = (bench.train.batch(chosen) for chosen in order(len(bench.train), size, 2, 0))

    def of(method: Method, batch: Batch = batch) -> Tensor:
        return gradient(student, forward(student, *heads, batch, method)[0])

    given = batch.teacher_hidden, heads[1].weight
    actions = linear_select_actions(*given, **SET, include=batch.tokens)
    references = {
        "kl": of(METHODS["kl-full"]),
        "cross_entropy": of(METHODS["sft"]),
        "mass": of(on_set(mass, actions)),
        "entropy": of(on_set(entropy, actions)),
    }
    scale = length(references["kl"])

    def row(name: str, found: Tensor) -> dict[str, Any]:
        own = length(found)
        cosines = {
            key: dot(found, wanted) / (own * length(wanted)) for key, wanted in references.items()
        }
        made = {"method": name, "start": start, "length": own / scale, **cosines}
        print(line(made), flush=True)
        return made

    rows = [row(f"{name} (reference)", reference) for name, reference in references.items()]
    rows.append(row("kl on other data", of(METHODS["kl-full"], other)))
    return rows + [row(name, of(with_extras(name))) for name in names]


def dot(a: Tensor, b: Tensor) -> float:
    """In float64: a float32 sum of so many products is off by a hundredth."""
    parts = zip(a.split(1 << 20), b.split(1 << 20), strict=True)
    return sum((x.double() @ y.double()).item() for x, y in parts)


def length(a: Tensor) -> float:
    return dot(a, a) ** 0.5


def line(row: dict[str, Any]) -> str:
    numbers = [f"{value:.3g}" for value in row.values() if isinstance(value, float)]
    return "| " + " | ".join([row["start"], row["method"], *numbers]) + " |"


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__)
    options.set_defaults(methods=list(SHOWN), starts=["cold", "warm"])
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    print("| start | method | length | KL | cross-entropy | mass on the set | entropy there |")
    print("|" + "---|" * 7)
    rows = [row for start in args.starts for row in measure(bench, start, args.methods, args.batch)]
    output: Path = args.output.with_name("gradients.json")
    records.write_whole(output, {**environment(), "batch": args.batch, "rows": rows})


if __name__ == "__main__":
    main()
