"""Kills the commands at random moments, and holds what follows to a quiet run.

For each command: a run that nobody disturbs, then rounds. A round starts from nothing, sends
SIGKILL to the process group at a moment drawn from a seed (one moment from each equal part of the
time from the first output to the end), and gives the same command again until it ends. What it
leaves must be what the quiet run left: the same files, no other one, the same records, metrics,
losses and weights. Of the rounds of distill, half are killed while a checkpoint is being written.
Of two processes of one run, one is killed up to half a second before the other.

    python tests/faults/kill.py [--rounds 20] [--only distill] [--seed 0] [--fork]

``--fork`` runs the command in children of one process that has imported everything: faster.
Exit code 1 where a round was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",  # sums in one order in every run
}
COMMAND = "import sys; from tdkd.cli import main; main()"
STEPS = 12
# entries of the log that count seconds, or this process alone, and not the run
OF_THE_CLOCK = "runtime", "per_second", "train_loss", "time/"
NAMES = "generate", "distill", "distill-cache", "distill-online", "evaluate", "cache", "cache-2"


class Job(NamedTuple):
    """A command, and what of its output must be the same."""

    name: str
    args: Callable[[Path], list[str]]
    """Of the folder to write to."""
    results: Callable[[Path], Any]
    processes: int = 1
    """As ``torchrun`` would start them."""


class Run:
    """The command, each of its processes in a group of its own."""

    def __init__(self, job: Job, out: Path, log: Path, fork: bool) -> None:
        self.codes: list[int] = []
        """Exit codes, in the order of the ends."""
        args = job.args(out)
        start = _forked if fork else _started
        self.running = [start(args, log, place) for place in _places(job.processes)]

    def ended(self) -> bool:
        """Whether all are gone; as a launcher would, it stops all when one has failed."""
        for pid in list(self.running):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                self.running.remove(pid)
                self.codes.append(os.waitstatus_to_exitcode(status))
        if any(self.codes):
            self._stop()
        return not self.running

    def wait(self) -> int:
        """The exit code of the first that failed, or 0."""
        while not self.ended():
            time.sleep(0.002)
        return next((code for code in self.codes if code), 0)

    def kill(self, first: int = 0, lag: float = 0.0) -> bool:
        """SIGKILL to one, and after ``lag`` seconds to the others; False where none was left."""
        if self.ended():
            return False
        os.killpg(self.running[first % len(self.running)], signal.SIGKILL)
        if len(self.running) > 1:
            time.sleep(lag)
        self._stop()
        self.wait()
        return -signal.SIGKILL in self.codes

    def _stop(self) -> None:
        for pid in self.running:
            os.killpg(pid, signal.SIGKILL)


def _places(processes: int) -> list[dict[str, str]]:
    """What each process is told of its place among the others."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **meeting}
        for rank in range(processes)
    ]


def _started(args: list[str], log: Path, place: dict[str, str]) -> int:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *args],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": str(ROOT), **place},
            start_new_session=True,
        ).pid


def _forked(args: list[str], log: Path, place: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.update(place)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["tdkd", *args]
        from tdkd.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(work: Path) -> list[Job]:
    """Models, data and settings; the commands."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tokenizer = tiny.save_tokenizer(work / "tokenizer")
    writer = tiny.save_writer(work / "writer", tokenizer)
    teacher = tiny.save_llama(work / "teacher", tokenizer, layers=4, seed=0)
    student = tiny.save_llama(work / "student", tokenizer, layers=2, seed=1)
    data = work / "data.jsonl"
    with data.open("w") as file:
        for i in range(30):
            prompt = [{"role": "user", "content": f"say {i}"}]
            answer = [{"role": "assistant", "content": "yes " * (i % 5 + 1)}]
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    config = {
        "model_name_or_path": str(student),
        "teacher_model_name_or_path": str(teacher),
        "train_file": str(data),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    alone = {name: x for name, x in config.items() if name != "teacher_model_name_or_path"}
    configs = {
        "distill": config,
        "distill-cache": {
            **alone, "teacher": "cache", "teacher_cache": str(work / "sets"), "action_top_k": 8
        },
        "distill-online": {
            **config,
            "lmbda": 0.7,
            "max_completion_length": 8,
            "replay_size": 24,
            "replay_ratio": 0.5,
            "objective": "ForwardKL(tail=True) + 0.05 * IQLearn(alpha=2.0, value='mixed')",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    }  # fmt: skip
    for name, content in configs.items():
        (work / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML

    def distill(name: str) -> Job:
        args = ["distill", str(work / f"{name}.yaml"), "--output_dir"]
        return Job(name, lambda out: [*args, str(out)], _distilled)

    def cache(name: str, processes: int) -> Job:
        return Job(
            name,
            lambda out: (
                f"cache --model {teacher} --data {data} --output {out}/sets --shard-examples 2 "
                "--batch-size 1 --action-top-k 8 --device cpu".split()
            ),
            lambda out: {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (out / "sets").iterdir()
            },
            processes,
        )

    quiet(cache("the cache of distill-cache", 1), work, work / "sets.log", fork=False)
    return [
        Job(
            "generate",
            lambda out: (
                f"generate --model {writer} --output {out}/data.jsonl --num-examples 60 "
                "--max-prompt-tokens 40 --max-new-tokens 24 --batch-size 4 --seed 3".split()
            ),
            lambda out: {path.name: path.read_text() for path in out.iterdir()},
        ),
        *map(distill, configs),
        Job(
            "evaluate",
            lambda out: (
                f"evaluate --model {student} --teacher {teacher} --data {data} "
                f"--output {out}/out.json --max-new-tokens 24 --batch-size 2 --samples 5 "
                "--temperature 1".split()
            ),
            lambda out: {path.name: path.read_text() for path in out.iterdir()},
        ),
        cache("cache", 1),
        cache("cache-2", 2),
    ]


def _distilled(out: Path) -> dict[str, Any]:
    """The log without the clock, the bits of all weights, and the names of the files."""
    log = json.loads((out / "log.json").read_text())
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        "log": [
            {name: x for name, x in entry.items() if not any(c in name for c in OF_THE_CLOCK)}
            for entry in log
        ],
        "weights": {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.suffix == ".safetensors"
        },
        "files": [str(path.relative_to(out)) for path in files],
    }


def fresh(out: Path) -> None:
    """An empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def quiet(job: Job, out: Path, log: Path, fork: bool) -> None:
    """A run that nobody disturbs and that must succeed."""
    if Run(job, out, log, fork).wait():
        raise SystemExit(f"{job.name}: the quiet run failed:\n{log.read_text()}")


def undisturbed(job: Job, out: Path, log: Path, fork: bool) -> tuple[float, float, Any]:
    """Seconds until the first output and until the end, and the results.

    The first of two runs fills the caches of libraries; both must give the same.
    """
    fresh(out)
    log.write_text("")
    quiet(job, out, log, fork)
    before = job.results(out)
    fresh(out)
    start, first = time.monotonic(), None
    run = Run(job, out, log, fork)
    while not run.ended():
        if first is None and any(out.iterdir()):
            first = time.monotonic() - start
        time.sleep(0.002)
    end = time.monotonic() - start
    if run.wait():
        raise SystemExit(f"{job.name}: the quiet run failed:\n{log.read_text()}")
    found = difference(job.results(out), before)
    if found:
        raise SystemExit(f"{job.name}: two quiet runs differ at {found}")
    # evaluate writes at its end alone; its work is the last part of the run
    assert first is not None
    return (first if first < 0.9 * end else 0.3 * end), end, before


def being_written(out: Path) -> Path | None:
    """What is there of a checkpoint that is not whole yet."""
    aside = out / ".tdkd-unfinished"
    if aside.is_dir():
        return aside
    for path in out.glob("checkpoint-*"):
        if not (path / "trainer_state.json").is_file():
            return path
    return None


def in_a_checkpoint(run: Run, out: Path, which: int, delay: float) -> str | None:
    """Kills while the ``which``-th checkpoint is written; says where, None where it came late."""
    seen, before = 0, False
    while not run.ended():
        now = being_written(out) is not None
        seen += now and not before
        before = now
        if now and seen >= which:
            time.sleep(delay)
            if not run.kill():
                return None
            left = being_written(out)
            if left is None:
                return "after a checkpoint"
            inside = sum(path.is_file() for path in left.rglob("*"))
            return f"in checkpoint {which}, {inside} files of it written"
        time.sleep(0.0005)
    return None


def at(run: Run, moment: float, first: int, lag: float) -> str | None:
    """Kills so many seconds after now; says where, None where the run ended before."""
    end = time.monotonic() + moment
    while time.monotonic() < end and not run.ended():
        time.sleep(0.002)
    several = f", process {first} {lag:.2f} s before the other" if len(run.running) > 1 else ""
    return f"after {moment:.2f} s{several}" if run.kill(first, lag) else None


def difference(got: Any, expected: Any, where: str = "") -> str | None:
    """The first place where two results differ."""
    if isinstance(got, dict) and isinstance(expected, dict):
        for name in sorted({*got, *expected}):
            found = difference(got.get(name), expected.get(name), f"{where}/{name}")
            if found:
                return found
        return None
    if isinstance(got, list) and isinstance(expected, list):
        if len(got) != len(expected):
            extra = [x for x in [*got, *expected] if (x in got) != (x in expected)]
            return f"{where}: {len(got)} entries for {len(expected)}: {str(extra)[:200]}"
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            found = difference(a, b, f"{where}[{i}]")
            if found:
                return found
        return None
    return None if got == expected else f"{where}: {str(got)[:60]!r} for {str(expected)[:60]!r}"


def play(
    job: Job, out: Path, log: Path, fork: bool, kill: Callable[[Run], str | None]
) -> tuple[str | None, str | None]:
    """One round: where it was killed (None: nowhere), and what went wrong (None: nothing)."""
    fresh(out)
    log.write_text("")
    killed = kill(Run(job, out, log, fork))
    if killed is None:
        return None, None
    code = Run(job, out, log, fork).wait()
    if code:
        lines = log.read_text().strip().splitlines() or [""]
        return killed, f"exit code {code}: {lines[-1]}"
    return killed, None


def rounds_of(job: Job, args: argparse.Namespace, work: Path) -> tuple[int, int]:
    """Plays the rounds of a command; how many survived, and how many fell inside a checkpoint."""
    out, log = work / job.name, work / f"{job.name}.log"
    first, end, expected = undisturbed(job, out, log, args.fork)
    print(f"{job.name}: undisturbed {end:.1f} s, first output after {first:.1f} s", flush=True)
    survived = inside = 0
    for number in range(args.rounds):
        killed = lost = None
        for attempt in range(5):
            draw = random.Random(f"{args.seed} {job.name} {number} {attempt}")
            kill: Callable[[Run], str | None]
            if job.results is _distilled and number % 2 == 0:
                which, delay = draw.randint(1, STEPS), draw.uniform(0, 0.03)
                kill = partial(in_a_checkpoint, out=out, which=which, delay=delay)
            else:
                part = (number + draw.random()) / args.rounds
                who, lag = draw.randrange(job.processes), draw.uniform(0, 0.5)
                moment = first + part * 0.97 * (end - first)
                kill = partial(at, moment=moment, first=who, lag=lag)
            start = time.monotonic()
            killed, lost = play(job, out, log, args.fork, kill)
            if killed is not None:
                break
            # the machine is faster than it was
            end = min(end, time.monotonic() - start)
            first = min(first, end / 2)
        if killed is None:
            raise SystemExit(f"{job.name}: the command always ended before it could be killed")
        if lost is None:
            lost = difference(job.results(out), expected)
        survived += lost is None
        inside += "in checkpoint" in killed
        print(
            f"{job.name} {number + 1:3}/{args.rounds}: killed {killed}: {lost or 'the same'}",
            flush=True,
        )
    return survived, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    os.environ |= ENVIRONMENT
    sys.path.insert(0, str(ROOT))
    lost = 0
    with tempfile.TemporaryDirectory(prefix="tdkd-kill-") as folder:
        work = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
        jobs = [job for job in prepare(work) if args.only in (None, job.name)]
        if args.fork:
            import tdkd.cli.distill
            import tdkd.cli.evaluate  # noqa: F401
        summary = []
        for job in jobs:
            survived, inside = rounds_of(job, args, work)
            lost += args.rounds - survived
            note = f", {inside} of them killed inside a checkpoint" if inside else ""
            summary.append(f"{job.name}: {survived} of {args.rounds} survived{note}")
    print("\n".join(summary))
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
