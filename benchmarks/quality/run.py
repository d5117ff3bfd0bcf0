"""What each method teaches: the same student, data, order, steps and optimiser.

    python benchmarks/quality/run.py --data DATA --models runs/demo --work runs/quality

``--data`` is a folder with train.jsonl, dev.jsonl and eval_{dolly,selfinst,vicuna}.jsonl;
``--models`` one with ``teacher`` and ``student-init`` (`make demo` makes both). What is done is not
done again, and a killed run goes on where it was. ``--report`` writes the table and the picture
from what there is, with ``--merge FILE`` beside what an earlier folder's results were.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import report
import torch
from data import EVAL_SETS, Examples, answers
from judge import on_its_own, on_teacher
from learn import seconds_a_step, train
from methods import METHODS, with_extras
from safetensors.torch import load_file

from tdkd import records
from tdkd.benchmark.report import environment
from tdkd.models import lm_head, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WARM = "warm"
SHARED = (
    "examples",
    "dev",
    "prompts",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "warm_rate",
    "warm_steps",
)
"""Options that the results of one folder have in common; the others are in the names of runs."""


class Bench:
    """Models and data, read once; runs by name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self._same_settings()
        self.teacher = load_model(str(args.models / "teacher"), argument="models")
        self.tokenizer = load_tokenizer(str(args.models / "teacher"), chat=True)
        self.train, self.dev = (
            Examples(
                answers(
                    args.models / "teacher",
                    args.data / f"{split}.jsonl",
                    self.work / f"{split}.jsonl",
                    examples=count,
                    prompt_tokens=args.prompt_tokens,
                    new_tokens=args.new_tokens,
                ),
                self.teacher,
                self.tokenizer,
                self.work / f"{split}-hidden.npy",
                args.new_tokens,
            )
            for split, count in (("train", args.examples), ("dev", args.dev))
        )
        self.sets = {
            name: [
                record
                for record in records.read(args.data / f"eval_{name}.jsonl")
                if len(str(record["prompt"])) <= 4 * args.prompt_tokens
            ][: args.prompts]
            for name in EVAL_SETS
        }

    def _same_settings(self) -> None:
        """What all runs of a folder share must not change under them."""
        given = {name: getattr(self.args, name) for name in SHARED}
        kept = self.work / "settings.json"
        if not kept.exists():
            records.write_whole(kept, given)
        before = records.read_json(kept)
        for name, value in given.items():
            wanted = before.get(name)
            if wanted != value:
                raise SystemExit(
                    f"{name}: expected {wanted} as in {kept}, got {value}; choose another --work"
                )

    def run(self, name: str, rate: float, seed: int, start: str) -> None:
        """One training and its scores, unless they are there."""
        method = with_extras("sft" if name == WARM else name)
        steps = self.steps(name)
        title = self.title(name, rate, seed, start)
        folder = self.work / "runs" / title
        result = folder / "result.json"
        if result.exists():
            return
        print(f"== {title}: {method.words}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        student = self.student(start)
        if (folder / "log.json").exists():
            _load(student, folder / "model")
            log = json.loads((folder / "log.json").read_text())
        else:
            log = train(
                student, self.teacher, self.train, method, folder,
                steps=steps, size=self.args.batch, rate=rate, seed=seed, look=self.look,
                looks=self.args.looks,
            )  # fmt: skip
        diverged = len(log) < steps
        scores = None if diverged else self.judge(student)
        print(f"   {report.one_line(scores) if scores else 'diverged'}", flush=True)
        settings = {
            "method": name, "words": method.words, "rate": rate, "seed": seed, "start": start,
            "steps": steps, "batch": self.args.batch, "tokens": sum(x["tokens"] for x in log),
            "minutes": self.args.minutes, "teacher": self.way(name), "git": environment()["git"],
        }  # fmt: skip
        losses = [x["loss"] for x in log]
        made = {**settings, "scores": scores, "losses": losses, "curve": curve(log)}
        records.write_whole(result, made)
        if name != WARM:
            shutil.rmtree(folder / "model", ignore_errors=diverged)

    def title(self, name: str, rate: float, seed: int, start: str) -> str:
        plain = re.sub(r"[^\w.+-]+", "_", name)  # of the text of an objective
        return f"{plain}-{self.way(name)}-{rate:g}-{seed}-{start}-{self.steps(name)}"

    def way(self, name: str) -> str:
        """How a method comes by its teacher: none, live, or cache where it can."""
        method = with_extras("sft" if name == WARM else name)
        if not method.needs_teacher:
            return "none"
        return "live" if method.needs_live_teacher else self.args.teacher

    def steps(self, name: str) -> int:
        """``--steps``, or what the method gets done in ``--minutes``."""
        if name == WARM:
            return self.args.warm_steps
        if self.args.minutes is None:
            return self.args.steps
        seconds = records.read_json(self.work / "times.json")["seconds"]
        if name not in seconds:
            raise SystemExit(f"minutes: expected the time of a step of {name}; run --time first")
        way = "cache" if self.way(name) == "cache" else "live"
        return round(60 * self.args.minutes / seconds[name][way])

    def time(self, names: list[str]) -> None:
        """Seconds a step of every method, measured in one run on an idle machine."""
        methods = {name: with_extras(name) for name in names}
        seconds = seconds_a_step(
            self.student(WARM), self.teacher, self.train, methods, size=self.args.batch
        )
        given = {"threads": self.args.threads, "batch": self.args.batch, "seconds": seconds}
        records.write_whole(self.work / "times.json", given)

    def student(self, start: str) -> Any:
        student = load_model(str(self.args.models / "student-init"), argument="models")
        if start == WARM:
            title = self.title(WARM, self.args.warm_rate, 0, "cold")
            _load(student, self.work / "runs" / title / "model")
        return student

    def look(self, student: Any) -> dict[str, float]:
        return on_teacher(student, lm_head(self.teacher), self.dev)

    def judge(self, student: Any) -> dict[str, Any]:
        student.eval()
        return {
            **self.look(student),
            **on_its_own(
                student, self.teacher, self.tokenizer, self.sets, new_tokens=self.args.new_tokens
            ),
        }

    def start_scores(self) -> None:
        """The scores of the students that methods start from, and the teacher's Rouge-L."""
        for start, name in (("cold", "untrained"), ("teacher", "teacher")):
            result = self.work / "runs" / name / "result.json"
            if not result.exists():
                model = self.teacher if start == "teacher" else self.student("cold")
                scores = self.judge(model)
                print(f"== {name}\n   {report.one_line(scores)}", flush=True)
                records.write_whole(
                    result,
                    {"method": name, "words": name, "rate": 0.0, "seed": 0, "start": start,
                     "steps": 0, "batch": 0, "tokens": 0, "minutes": None, "teacher": "none",
                     "scores": scores, "losses": [], "curve": []},
                )  # fmt: skip


def curve(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Scores on the way, by steps and tokens."""
    tokens = list(accumulate(x["tokens"] for x in log))
    return [
        {"step": step + 1, "tokens": tokens[step], **entry["scores"]}
        for step, entry in enumerate(log)
        if "scores" in entry
    ]


def _load(student: Any, folder: Path) -> None:
    missing, unexpected = student.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    # a tied head is saved once
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise SystemExit(f"{folder}: another model, without {missing} and with {unexpected}")


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The options of every script of this folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="names of methods.py, or texts of objectives; +value adds a value head, +ema a target "
        "network, +lm the LM loss",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--starts", nargs="+", choices=["cold", WARM], default=[WARM])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--minutes", type=float, help="of training, in place of --steps: by the times of --time"
    )
    parser.add_argument(
        "--looks", type=int, default=5, help="times that a run is judged on its way"
    )
    parser.add_argument("--teacher", choices=["cache", "live"], default="cache")
    parser.add_argument("--warm-steps", type=int, default=80)
    parser.add_argument("--warm-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--dev", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32, help="of each evaluation set")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/quality")
    parser.add_argument("--time", action="store_true", help="only measure seconds a step")
    parser.add_argument("--report", action="store_true", help="only write table and picture")
    parser.add_argument(
        "--merge",
        type=Path,
        help="a JSON file of this script, whose runs stand beside those of --work",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = options_of(__doc__).parse_args(arguments)
    torch.set_num_threads(args.threads)
    if not args.report:
        bench = Bench(args)
        bench.run(WARM, args.warm_rate, 0, "cold")
        if args.time:
            bench.time(args.methods)
        for seed in [] if args.time else args.seeds:
            for rate in args.rates:
                for start in args.starts:
                    for name in args.methods:
                        bench.run(name, rate, seed, start)
        bench.start_scores()
    report.write(args.work, args.output, args.merge)


if __name__ == "__main__":
    main()
