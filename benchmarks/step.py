"""A whole training step of the demo, and the same step with dense logits or by TRL's trainers.

    make demo                          # makes the models and the data
    python benchmarks/step.py [--models runs/demo] [--steps 10] [--device cpu]

benchmarks/README.md says what is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tdkd import ops, records
from tdkd.benchmark.cases import Inputs
from tdkd.benchmark.measure import order, peak_extra_bytes, quartiles, reason
from tdkd.benchmark.report import aligned, environment
from tdkd.benchmark.rivals import Impl, Skip
from tdkd.cli.cache import run as keep_sets
from tdkd.errors import UserError
from tdkd.models import Head, last_hidden_state, load_model, load_tokenizer
from tdkd.trainer import TDConfig, TDTrainer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo" / "td.yaml"
SCHEMA = 2
AGAINST, SHARED = "tdkd batch", "bodies alone"
Batch = dict[str, Tensor]


class Setup(NamedTuple):
    """What all rivals share."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    device: str
    scratch: str
    """a directory that no trainer writes to, but that each must be given."""
    sets: str
    """the teacher's cache of the data."""

    def config(self, kind: type, **options: Any) -> Any:
        """The demo's settings, as far as trainers of this kind know them, and ``options``."""
        given = {
            **yaml.safe_load(DEMO.read_text()),
            # the same work, and the weights stay: every rival's every step is of one model
            "learning_rate": 0.0,
            "bf16": False,
            "use_cpu": self.device == "cpu",
            "output_dir": self.scratch,
            "disable_tqdm": True,
        }
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in given.items() if name in known} | options)

    def trainer(self, kind: type[Trainer], config: Any) -> Trainer:
        return kind(
            self.student,
            self.teacher,
            config,
            train_dataset=self.data,
            processing_class=self.tokenizer,
        )


class Bodies(TDTrainer):
    """The step without heads: the gradient of the hidden states costs next to nothing."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        forwarded = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            last_hidden_state(self.teacher, **forwarded)
        return last_hidden_state(model, **forwarded).mean()


class Dense(TDTrainer):
    """The demo's loss from the logits of all response rows."""

    impl: Impl = "auto"

    def _td_loss(
        self,
        hidden: Tensor,
        head: Head,
        teacher: dict[str, Any],
        tokens: Tensor,
        successor: Tensor,
        **extras: Any,
    ) -> ops.TDOutput:
        parts = [teacher.pop(f"teacher_{name}") for name in ("hidden", "weight", "bias")]
        return ops.td_loss(
            F.linear(hidden, head.weight, head.bias),
            F.linear(*parts),
            tokens,
            successor=successor,
            **teacher,
            **self._td_options(head),
            **extras,
            impl=self.impl,
        )


class DenseReference(Dense):
    impl = "reference"


class Cached(TDTrainer):
    """The demo's loss with sets from disk; a batch is read and collated within its step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.numbered = {tuple(x["input_ids"]): x["labels"] for x in self._cache.dataset()}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        sizes = inputs["attention_mask"].sum(-1).tolist()
        ids = [row[:size] for row, size in zip(inputs["input_ids"].tolist(), sizes, strict=True)]
        examples = [{"input_ids": x, "labels": self.numbered[tuple(x)]} for x in ids]
        return super().training_step(model, self.data_collator(examples), *args)


class Given(DistillationTrainer):
    """TRL's trainer, which only knows answers that the student samples: here they are given.

    A prompt is a pair of token lists; all else is as shipped.
    """

    def _generate(self, prompts: list[tuple[list[int], list[int]]]) -> tuple[Any, ...]:
        asked, answered = zip(*prompts, strict=True)
        return list(asked), list(answered), None, None, []


def as_collated(batch: Batch) -> Any:
    return dict(batch)


def as_prompts(batch: Batch) -> Any:
    """The batch as ``Given`` takes it: no padding, and each answer apart from its prompt."""
    found = []
    columns = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*columns, strict=True):
        answer = labels != -100
        found.append({"prompt": (ids[mask.bool() & ~answer].tolist(), ids[answer].tolist())})
    return found


class Rival(NamedTuple):
    """One way to take the step."""

    name: str
    what: str
    make: Callable[[Setup], Trainer]
    inputs: Callable[[Batch], Any] = as_collated


def ours(kind: type[TDTrainer] = TDTrainer, **options: Any) -> Callable[[Setup], Trainer]:
    return lambda setup: setup.trainer(kind, setup.config(TDConfig, **options))


SAMPLED = {"normaliser": "sampled", "batch_vocabulary_extra": 2048}


def cached(**options: Any) -> Callable[[Setup], Trainer]:
    def make(setup: Setup) -> Trainer:
        config = setup.config(TDConfig, teacher="cache", teacher_cache=setup.sets, **options)
        return Cached(setup.student, args=config, processing_class=setup.tokenizer)

    return make


def gkd(beta: float) -> Callable[[Setup], Trainer]:
    return lambda setup: setup.trainer(
        GKDTrainer, setup.config(GKDConfig, beta=beta, lmbda=0.0, seq_kd=False)
    )


def distillation(beta: float) -> Callable[[Setup], Trainer]:
    return lambda setup: setup.trainer(Given, setup.config(DistillationConfig, beta=beta))


def liger(setup: Setup) -> Trainer:
    raise Skip(
        "use_liger_kernel leaves this loss as it is; it replaces layers of the student, and parts "
        "of transformers for the whole process, by Triton kernels, which do not run on a CPU"
    )


RIVALS = [
    Rival(SHARED, "no heads; the loss is the mean of hidden states", ours(Bodies)),
    Rival(AGAINST, "the demo: log Z over the batch vocabulary", ours(normaliser="batch")),
    Rival(
        "tdkd sampled",
        "log Z from each row's own set and 2,048 sampled columns",
        ours(**SAMPLED),
    ),
    Rival("tdkd cache", "the demo with the teacher's sets from disk: no teacher", cached()),
    Rival("tdkd cache, sampled", "the two together", cached(**SAMPLED)),
    Rival("tdkd exact", "log Z over all columns", ours(normaliser="exact")),
    Rival(
        "tdkd gather",
        "no log Z: Q is the logit, and no bucket for the tail",
        ours(q_level="logit", imitation="forward_kl", imitation_tail=False),
    ),
    Rival(
        "dense, reference", "loss of tdkd exact, dense logits, impl=reference", ours(DenseReference)
    ),
    Rival("dense, kernels", "loss of tdkd exact, dense logits, impl=auto", ours(Dense)),
    Rival("TRL GKD", "GKDTrainer, beta=0.5 (its default), lmbda=0", gkd(0.5)),
    Rival("TRL GKD, KL", "GKDTrainer, beta=0 (forward KL), lmbda=0", gkd(0.0)),
    Rival("TRL GKD, Liger", "GKDTrainer, use_liger_kernel", liger),
    Rival(
        "TRL Distillation, KL",
        "DistillationTrainer, beta=0 (forward KL), answers given in place of sampled",
        distillation(0.0),
        as_prompts,
    ),
]


class Result(NamedTuple):
    """One rival; where it was skipped, everything after the reason is empty."""

    rival: str
    what: str
    skipped: str | None = None
    first_step_s: float | None = None
    times_s: tuple[float, ...] = ()
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    against: str = AGAINST
    ratio: float | None = None
    """median over that of ``against``: above 1 is slower."""
    beyond_bodies_s: float | None = None
    """heads and loss: median over the rounds of the step less that round's of the bodies alone."""
    beyond_bodies_quartiles_s: tuple[float, float] | None = None
    response_tokens_per_s: float | None = None
    """median of the steps', as of ``tokens_per_s``, which counts no padding."""
    tokens_per_s: float | None = None
    peak_extra_bytes: int | None = None
    """growth of memory within one step on the longest batch, the student's gradients included."""
    losses: tuple[float, ...] = ()


class Step:
    """One rival's step: forward, loss, backward, clipping, AdamW, gradients freed."""

    def __init__(self, rival: Rival, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        self.rival, self.trainer, self.optimizer = rival, trainer, optimizer
        trainer.optimizer = optimizer
        trainer.current_gradient_accumulation_steps = 1  # Trainer.train() would say so

    def __call__(self, batch: Batch) -> Tensor:
        trainer, model = self.trainer, self.trainer.model
        items = (batch["labels"] != -100).sum()
        loss = trainer.training_step(model, self.rival.inputs(batch), items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()
        return loss

    def timed(self, batch: Batch) -> tuple[float, float]:
        """Seconds and loss."""
        synchronize(batch)
        began = time.perf_counter()
        loss = self(batch)
        synchronize(batch)
        return time.perf_counter() - began, loss.item()


def synchronize(batch: Batch) -> None:
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/demo"), help="what the demo made")
    parser.add_argument("--steps", type=int, default=10, help="of each rival")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/step.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--show", type=Path, help="instead: the table of a run's JSON")
    options = parser.parse_args(arguments)
    if options.show is not None:
        shown: dict[str, Any] = json.loads(options.show.read_text())
        print(table(shown))
        return shown
    records.check_at_least(1, steps=options.steps)
    records.check_directory(options.output.parent, "output")
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        setup, named = prepared(options.models, options.device, scratch)
        batches, results = measure(setup, options.steps)
    run = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        **with_versions(environment(options.device), "transformers", "trl", "accelerate"),
        **named,
        "settings": yaml.safe_load(DEMO.read_text()) | {"learning_rate": 0.0},
        "batches": batches,
        "rivals": [result._asdict() for result in results],
    }
    print(table(run))
    records.write_whole(options.output, run)
    return run


def prepared(models: Path, device: str, scratch: str) -> tuple[Setup, dict[str, Any]]:
    """The demo's models and data, and their names within its directory."""
    students = [name for name in ("warm/final", "student-init") if (models / name).is_dir()]
    if not students or not (models / "teacher").is_dir() or not (models / "train.jsonl").is_file():
        raise UserError(
            f"models: expected teacher, warm/final or student-init, and train.jsonl in {models}; "
            "`make demo` makes them in runs/demo"
        )
    tokenizer = load_tokenizer(models / "teacher", chat=True)
    teacher, student = (
        load_model(models / name, device=device) for name in ("teacher", students[0])
    )
    longest = yaml.safe_load(DEMO.read_text())["max_length"]
    chat = records.Chat(tokenizer)
    encoded = [chat.encode(record, longest) for record in records.read(models / "train.jsonl")]
    data = Dataset.from_list(
        [
            {
                "input_ids": [*e.prompt, *e.completion],
                "labels": [-100] * len(e.prompt) + e.completion,
            }
            for e in encoded
        ]
    )
    named = {"data": "train.jsonl", "teacher": facts(teacher, "teacher")}
    named["student"] = facts(student, students[0])
    sets = str(Path(scratch) / "sets")
    demo = yaml.safe_load(DEMO.read_text())
    keep_sets(
        model=str(models / "teacher"), data=str(models / "train.jsonl"), served=None,
        tokenizer=None, output=sets, action_top_k=demo["action_top_k"],
        action_top_p=demo["action_top_p"], teacher_temperature=1.0, max_length=longest,
        tail=True, log_probs="float16", model_dtype="float32",
        vocab_size=None, assistant_only_loss=False, batch_size=16, shard_examples=1024,
        device=device,
    )  # fmt: skip
    return Setup(teacher, student, tokenizer, data, device, scratch, sets), named


def facts(model: PreTrainedModel, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "layers": model.config.num_hidden_layers,
        "vocab": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def with_versions(told: dict[str, Any], *packages: str) -> dict[str, Any]:
    return {**told, "versions": told["versions"] | {name: version(name) for name in packages}}


def measure(setup: Setup, steps: int) -> tuple[list[dict[str, int]], list[Result]]:
    """Times the rivals in turns and then, apart from that, their memory.

    Each takes one step before its times count. In every round all take one step on one batch; the
    order rotates by one a round. They share the models and the optimiser.
    """
    first = ours()(setup)
    optimizer = first.create_optimizer()
    batches: list[Batch] = [dict(batch) for batch in islice(first.get_train_dataloader(), steps)]
    skipped: dict[str, str] = {}
    running: list[Step] = []
    started: dict[str, float] = {}
    times: dict[str, list[float]] = {rival.name: [] for rival in RIVALS}
    losses: dict[str, list[float]] = {rival.name: [] for rival in RIVALS}

    def tell(name: str) -> None:
        print(f"  {name}", file=sys.stderr, flush=True)

    for rival in RIVALS:
        tell(f"{rival.name}, first step")
        try:
            step = Step(rival, rival.make(setup), optimizer)
            started[rival.name], _ = step.timed(batches[0])
        except Exception as error:  # a rival that fails is reported, and the others go on
            skipped[rival.name] = reason(error)
            setup.student.zero_grad()
        else:
            running.append(step)

    gc.disable()
    try:
        for turn in range(steps):
            tell(f"round {turn + 1} of {steps}")
            gc.collect()
            for i in order(turn, len(running)):
                seconds, loss = running[i].timed(batches[turn % len(batches)])
                times[running[i].rival.name].append(seconds)
                losses[running[i].rival.name].append(loss)
    finally:
        gc.enable()

    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    taken: dict[str, int | None] = {}
    for step in running:
        tell(f"{step.rival.name}, memory")
        given = Inputs(main=longest["input_ids"])
        taken[step.rival.name] = peak_extra_bytes(lambda _, step=step: step(longest), given)

    sizes = [size(batch) for batch in batches]
    shared = times[SHARED]
    medians = {name: quartiles(each)[1] for name, each in times.items() if each}

    def results() -> Iterator[Result]:
        for rival in RIVALS:
            name = rival.name
            if name in skipped:
                yield Result(name, rival.what, skipped=skipped[name])
                continue
            low, median, high = quartiles(times[name])
            beyond = beyond_bodies(times[name], shared) if shared else None

            def rate(tokens: str, taken: list[float] = times[name]) -> float:
                return statistics.median(
                    sizes[turn % len(sizes)][tokens] / seconds for turn, seconds in enumerate(taken)
                )

            yield Result(
                name,
                rival.what,
                first_step_s=started[name],
                times_s=tuple(times[name]),
                median_s=median,
                quartiles_s=(low, high),
                ratio=median / medians[AGAINST] if AGAINST in medians else None,
                beyond_bodies_s=beyond[1] if beyond else None,
                beyond_bodies_quartiles_s=(beyond[0], beyond[2]) if beyond else None,
                response_tokens_per_s=rate("response_tokens"),
                tokens_per_s=rate("tokens"),
                peak_extra_bytes=taken[name],
                losses=tuple(losses[name]),
            )

    return sizes, list(results())


def beyond_bodies(times: Sequence[float], bodies: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of what a step takes beyond the bodies alone on the same batch, in the same round:
    a round that the machine was slow in is so for both."""
    return quartiles([taken - shared for taken, shared in zip(times, bodies, strict=True)])


def size(batch: Batch) -> dict[str, int]:
    answers, length = batch["input_ids"].shape
    return {
        "answers": answers,
        "length": length,
        "tokens": int(batch["attention_mask"].sum()),
        "response_tokens": int((batch["labels"] != -100).sum()),
    }


COLUMNS = ("rival", "median s", "quartiles", "ratio", "beyond bodies s", "quartiles",
           "response tok/s", "tok/s", "extra MB")  # fmt: skip


def table(run: dict[str, Any]) -> str:
    """Of a run, or of its JSON; what is beyond the bodies is told from the rounds in it."""
    rows = [COLUMNS]
    shared = next(r["times_s"] for r in run["rivals"] if r["rival"] == SHARED)
    for r in run["rivals"]:
        if r["skipped"] is None:
            low, high = r["quartiles_s"]
            first, beyond, third = beyond_bodies(r["times_s"], shared) if shared else [None] * 3
            extra = r["peak_extra_bytes"]
            rows.append(
                (
                    r["rival"],
                    f"{r['median_s']:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{r['ratio']:.2f}" if r["ratio"] else "",
                    "" if beyond is None else f"{beyond:.3f}",
                    "" if beyond is None else f"{first:.3f}-{third:.3f}",
                    f"{r['response_tokens_per_s']:.0f}",
                    f"{r['tokens_per_s']:.0f}",
                    "" if extra is None else f"{extra / 1e6:.0f}",
                )
            )
    skipped = [f"skipped: {r['rival']}: {r['skipped']}" for r in run["rivals"] if r["skipped"]]
    return "\n".join([*aligned(rows), *skipped])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
