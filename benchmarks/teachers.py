"""What docs/teachers.md says of a cache: making it, its size, reading it, memory, the gradient.

    make demo                          # makes the models and the data
    python benchmarks/teachers.py [--models runs/demo] [--examples 128] [--rounds 3]

benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import disable_progress_bars
from step import DEMO, facts, with_versions
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tdkd import records
from tdkd.benchmark.measure import quartiles
from tdkd.benchmark.report import aligned, environment
from tdkd.cache import Cache, Collator
from tdkd.cli.cache import run as keep_sets
from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer
from tdkd.trainer import TDConfig, TDTrainer

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
BATCH = 8
"""answers of a step, as in the demo."""
STEPS = 4
"""of the runs whose memory is taken."""
READS = 50
"""times that batches are read."""
CHILD = """
import atexit, sys
from pathlib import Path
from tdkd.cli import main

def tell():
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM:")).split()[1], flush=True)

atexit.register(tell)
main()
"""
"""The command, which says its peak of resident KB last. What wait4 says of a child counts the
memory of the process that it was forked from, too."""


class Setting(NamedTuple):
    """What a cache keeps of each state."""

    name: str
    top_p: float
    log_probs: str = "float16"


SETTINGS = [Setting("p = 0.8", 0.8), Setting("64 members", 1.0)]


class Setup(NamedTuple):
    models: Path
    student: str
    """directory within ``models``."""
    data: Path
    """the examples that are cached."""
    scratch: Path

    @property
    def options(self) -> dict[str, Any]:
        """The demo's settings."""
        return yaml.safe_load(DEMO.read_text())

    def cache(self, setting: Setting, name: str) -> tuple[Cache, float]:
        """A cache, and the seconds that the teacher took."""
        folder = self.scratch / name
        seconds = keep_sets(
            model=str(self.models / "teacher"), data=str(self.data), served=None, tokenizer=None,
            output=str(folder), action_top_k=self.options["action_top_k"],
            action_top_p=setting.top_p, teacher_temperature=1.0,
            max_length=self.options["max_length"], tail=True, log_probs=setting.log_probs,
            model_dtype="float32", vocab_size=None, assistant_only_loss=False, batch_size=16,
            shard_examples=1024, device="cpu",
        )  # fmt: skip
        return Cache(folder), seconds


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/demo"), help="what the demo made")
    parser.add_argument("--examples", type=int, default=128, help="that are cached")
    parser.add_argument("--rounds", type=int, default=3, help="times that each cache is made")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/teachers.json")
    options = parser.parse_args(arguments)
    records.check_at_least(BATCH, examples=options.examples)
    records.check_at_least(1, rounds=options.rounds)
    records.check_directory(options.output.parent, "output")
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        setup = prepared(options.models, options.examples, Path(scratch))
        made, caches = making(setup, options.rounds)
        teacher, student = (load_model(setup.models / name) for name in ("teacher", setup.student))
        run = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "threads": torch.get_num_threads(),
            **with_versions(environment(), "transformers", "trl", "accelerate"),
            "teacher": facts(teacher, "teacher"),
            "student": facts(student, setup.student),
            "settings": setup.options,
            "examples": options.examples,
            "making": made,
            "reading": [reading(setup, caches[setting.name], setting) for setting in SETTINGS],
            "gradient": list(gradients(setup, teacher, student)),
            "memory": memory(setup, caches[SETTINGS[0].name]),
        }
    print(table(run))
    records.write_whole(options.output, run)
    return run


def prepared(models: Path, examples: int, scratch: Path) -> Setup:
    """The demo's models, and the first so many of its examples."""
    students = [name for name in ("warm/final", "student-init") if (models / name).is_dir()]
    data = models / "train.jsonl"
    if not students or not (models / "teacher").is_dir() or not data.is_file():
        raise UserError(
            f"models: expected teacher, warm/final or student-init, and train.jsonl in {models}; "
            "`make demo` makes them in runs/demo"
        )
    some = scratch / "train.jsonl"
    records.append(some, records.read(data)[:examples])
    return Setup(models, students[0], some, scratch)


def making(setup: Setup, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Cache]]:
    """Each cache several times, in turns; one of each is kept."""
    seconds: dict[str, list[float]] = {setting.name: [] for setting in SETTINGS}
    caches = {}
    for turn in range(rounds):
        for setting in SETTINGS:
            caches[setting.name], took = setup.cache(setting, f"{setting.name} {turn}")
            seconds[setting.name].append(took)
    told = []
    for setting in SETTINGS:
        times, what = seconds[setting.name], caches[setting.name].manifest
        median = statistics.median(times)
        told.append(
            {
                **setting._asdict(),
                "states": what.states,
                "tokens": what.tokens,
                "members_a_set": what.members / what.states,
                "bytes_a_state": what.bytes_a_state,
                "times_s": times,
                "states_per_s": what.states / median,
                "tokens_per_s": what.tokens / median,
            }
        )
    return told, caches


def collators(setup: Setup, cache: Cache) -> tuple[Callable[[Any], Any], Collator]:
    pad = load_tokenizer(setup.models / "teacher").pad_token_id
    inner = DataCollatorForLanguageModeling(pad_token_id=pad)
    return inner, Collator(inner, cache)


def reading(setup: Setup, cache: Cache, setting: Setting) -> dict[str, Any]:
    """Seconds to collate a batch, with its sets and without them."""
    inner, ours = collators(setup, cache)
    examples = cache.dataset()
    taken: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(READS):
        first = turn * BATCH % (len(examples) - BATCH + 1)
        batch = [examples[i] for i in range(first, first + BATCH)]
        for name, collate in (("without", inner), ("with", ours)):
            began = time.perf_counter()
            collate(batch)
            taken[name].append(time.perf_counter() - began)
    sets = [a - b for a, b in zip(taken["with"], taken["without"], strict=True)]
    return {
        **setting._asdict(),
        "answers": BATCH,
        "collator_s": statistics.median(taken["without"]),
        "with_sets_s": statistics.median(taken["with"]),
        "sets_s": statistics.median(sets),
        "sets_quartiles_s": quartiles(sets),
    }


def gradients(
    setup: Setup, teacher: PreTrainedModel, student: PreTrainedModel
) -> Iterator[dict[str, Any]]:
    """The student's gradient of one batch from each cache, against that of the live teacher."""

    def trainer(**options: Any) -> TDTrainer:
        known = {**setup.options, "learning_rate": 0.0, "normaliser": "exact", **options}
        config = TDConfig(
            output_dir=str(setup.scratch / "out"), bf16=False, use_cpu=True, disable_tqdm=True,
            **known,
        )  # fmt: skip
        live = "teacher_cache" not in options
        return TDTrainer(
            student, teacher if live else None, config,
            train_dataset=examples if live else None, processing_class=tokenizer,
        )  # fmt: skip

    def gradient(of: TDTrainer, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
        student.zero_grad()
        loss = of.compute_loss(of.model, dict(batch))
        loss.backward()
        found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        student.zero_grad()
        return loss.item(), found

    tokenizer = load_tokenizer(setup.models / "teacher")
    few = setup._replace(data=setup.scratch / "few.jsonl")
    records.append(few.data, records.read(setup.data)[:BATCH])
    for top_p in (setting.top_p for setting in SETTINGS):
        live: tuple[float, list[Tensor]] | None = None
        for log_probs in ("float16", "bfloat16"):
            cache, _ = few.cache(Setting("", top_p, log_probs), f"few {top_p} {log_probs}")
            _, collate = collators(setup, cache)
            examples = cache.dataset()
            batch = collate(list(examples))
            if live is None:
                live = gradient(
                    trainer(action_top_p=top_p),
                    {n: x for n, x in batch.items() if not n.startswith("action_")},
                )
            kept = gradient(
                trainer(action_top_p=top_p, teacher="cache", teacher_cache=str(cache.path)), batch
            )
            pairs = list(zip(kept[1], live[1], strict=True))
            off, size = (
                sum(x.double().square().sum().item() for x in xs) ** 0.5
                for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
            )
            yield {
                "top_p": top_p,
                "log_probs": log_probs,
                "normaliser": "exact",
                "loss_live": live[0],
                "loss_cached": kept[0],
                "relative_l2": off / size,
            }


def memory(setup: Setup, cache: Cache) -> dict[str, Any]:
    """Peak resident bytes of ``tdkd distill``, from a cache and beside the live teacher."""
    sources = {
        "cache": ["--teacher", "cache", "--teacher_cache", str(cache.path)],
        "live": ["--teacher_model_name_or_path", str(setup.models / "teacher")],
    }
    told: dict[str, Any] = {"steps": STEPS, "answers": BATCH}
    for name, source in sources.items():
        arguments = [
            "distill", str(DEMO), "--model_name_or_path", str(setup.models / setup.student),
            "--train_file", str(setup.data), "--output_dir", str(setup.scratch / f"out-{name}"),
            "--max_steps", str(STEPS), "--use_cpu", "true", "--bf16", "false", *source,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(
                f"memory: expected tdkd distill to train ({name}), got {done.stderr[-2000:]}"
            )
        told[f"{name}_peak_bytes"] = int(done.stdout.split()[-1]) * 1024
    return told


def table(run: dict[str, Any]) -> str:
    rows = [("cache", "states/s", "tokens/s", "bytes a state", "members", "reading ms")]
    for made, read in zip(run["making"], run["reading"], strict=True):
        rows.append(
            (
                made["name"],
                f"{made['states_per_s']:.0f}",
                f"{made['tokens_per_s']:.0f}",
                f"{made['bytes_a_state']:.1f}",
                f"{made['members_a_set']:.1f}",
                f"{read['sets_s'] * 1e3:.2f}",
            )
        )
    errors = [("gradient", "log-probs", "relative L2", "loss live", "loss cached")]
    for found in run["gradient"]:
        errors.append(
            (
                f"p = {found['top_p']}",
                found["log_probs"],
                f"{found['relative_l2']:.1e}",
                f"{found['loss_live']:.6f}",
                f"{found['loss_cached']:.6f}",
            )
        )
    peaks = [f"peak of {name}: {run['memory'][f'{name}_peak_bytes'] / 1e6:.0f} MB" for name in
             ("cache", "live")]  # fmt: skip
    return "\n".join([*aligned(rows), "", *aligned(errors), "", *peaks])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
