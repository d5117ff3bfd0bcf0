"""benchmarks/gpu.sh and benchmarks/tune.py, as far as they go without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdkd import ops
from tdkd.errors import UserError
from tdkd.kernels import tuning
from tdkd.kernels.tuning import Config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.fixture(scope="module")
def tune():
    """The module benchmarks/tune.py."""
    spec = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_a_stage_that_fails_does_not_lose_the_others(tmp_path):
    """Rehearsed without a benchmark, of which the last stage has then nothing to show."""
    given = {
        "REHEARSE": "1",
        "STAGES": "environment sanitizer table",
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        [SCRIPT], env={**os.environ, **given}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "gpu-summary.txt").read_text()
    stages = [line.split()[:2] for line in summary.splitlines()]
    assert stages == [["environment", "passed"], ["sanitizer", "passed"], ["table", "failed"]]
    assert done.stdout.endswith(summary)
    found = json.loads((tmp_path / "gpu-environment.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    log = (tmp_path / "gpu.log").read_text()
    assert "===== sanitizer: passed" in log
    assert "gpu.json" in log  # what the last stage missed


KEPT = (
    "gpu.json",
    "gpu.png",
    "gpu-environment.json",
    "gpu-tuned.json",
    "gpu-breakdown.json",
    "gpu-routes.json",
)
"""Results of the stages, by name."""


def script(directory, *, path=None, **given):
    """A run of gpu.sh into a directory that holds earlier results."""
    directory.mkdir()
    for name in (*KEPT, "gpu-later.json", "gpu.log", "gpu-summary.txt"):
        (directory / name).write_text("earlier")
    given = {"OUT": str(directory), "PYTHON": sys.executable, **given}
    environment = {name: value for name, value in os.environ.items() if name != "REHEARSE"}
    if path is not None:
        given["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [SCRIPT], env={**environment, **given}, capture_output=True, text=True, timeout=120
    )


def earlier(directory):
    return {path.name for path in directory.iterdir() if path.read_text() == "earlier"}


def test_without_a_gpu_nothing_is_removed(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    done = script(tmp_path / "out", path=tmp_path / "bin")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.sh: expected a GPU")
    assert earlier(tmp_path / "out") == {*KEPT, "gpu-later.json", "gpu.log", "gpu-summary.txt"}


@pytest.mark.parametrize(
    "stages,rewritten",
    [
        ("environment", {"gpu-environment.json"}),
        ("tune", {"gpu-tuned.json"}),
        ("bench", {"gpu.json", "gpu.png"}),
        ("breakdown", {"gpu-breakdown.json"}),
        ("routes", {"gpu-routes.json"}),
        ("table", set()),
        ("environment breakdown", {"gpu-environment.json", "gpu-breakdown.json"}),
    ],
)
def test_only_what_the_stages_rewrite_is_removed(tmp_path, stages, rewritten):
    """With no time for any stage, so that what is gone was removed, not written anew."""
    script(tmp_path / "out", REHEARSE="1", STAGES=stages, LIMIT="0")
    assert earlier(tmp_path / "out") == {*KEPT, "gpu-later.json"} - rewritten


def test_a_failure_is_told_when_it_happens(tmp_path):
    """Not at the end, which a stage that is out of time does not reach."""
    lines = (
        "def test_first():",
        "    assert 1 == 2",
        "def test_second():",
        "    __import__('os')._exit(3)",
    )
    (tmp_path / "test_two.py").write_text("\n".join(lines))
    given = {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "told",
        "-p",
        "no:cacheprovider",
        tmp_path,
    ]
    done = subprocess.run(
        command, env={**os.environ, **given}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert "FAILED" in done.stdout
    assert "assert 1 == 2" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_breakdown_needs_a_gpu():
    command = [sys.executable, ROOT / "benchmarks" / "breakdown.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "breakdown: expected a GPU, for torch sees none here\n"


def test_tuning_is_rehearsed(monkeypatch, tmp_path, capsys, tune):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    good, bad = Config(256, 1), Config(192, 1)  # a block must be a power of two
    monkeypatch.setattr(tuning, "CHOICES", {kernel: (good, bad) for kernel in tuning.CHOICES})
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"sm_90": {"student_grad": {"block": 1, "num_warps": 2}}}))
    args = ["--device", "cpu", "--rows", "1", "--vocab", "320", "--k", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["tune.py", *args, "--output", str(path)])
    assert tune.main() == 0
    said = capsys.readouterr().out
    assert said.count("wins") == 3
    assert said.count("block 192, 1 warps, 1 stages is passed over") >= 3
    table = json.loads(path.read_text())
    assert table["sm_90"] == {"student_grad": {"block": 1, "num_warps": 2}}
    assert table["cpu"] == {kernel: good._asdict() for kernel in tuning.CHOICES}
    # the C++ kernels are back
    ops.select_actions(torch.randn(2, 30), 4)


def test_a_rehearsal_of_tuning_is_no_part_of_the_package(monkeypatch, tune):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="expected cuda, or TRITON_INTERPRET=1"), tune.interpreted():
        pass
    assert tune.winner([]) is None


def test_the_winner_is_best_over_all_shapes(tune):
    a, b, c = (Config(block, 1) for block in (256, 512, 1024))
    timed = [
        tune.Timed("x", None, {a: 1.0, b: 2.0, c: 0.1}),
        tune.Timed("x", None, {a: 9.0, b: 2.0}),  # c failed here
    ]
    assert tune.winner(timed) == b
