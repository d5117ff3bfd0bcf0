"""The Triton kernels compiled for GPUs that are not here: registers, spills, instructions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compiled.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every kernel takes on every target, and what the script printed."""
    output = tmp_path_factory.mktemp("compiled") / "compiled.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parent.parent), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, "--workers", "1", "--json", output],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.exists(), done.stderr
    return json.loads(output.read_text())["kernels"], done


def test_every_kernel_keeps_its_budget(compiled):
    kernels, done = compiled
    assert done.returncode == 0, done.stdout
    assert {k["target"] for k in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_main_loops_load_sixteen_bytes_at_once(compiled):
    kernels, _ = compiled
    streams = [k for k in kernels if k["instructions_a_logit"] is not None]
    assert {k["kernel"] for k in streams} == {"select_stream", "student_stream", "student_grad"}
    assert all(k["wide_loads"] > 0 for k in streams)
    # the loop was found: it cannot be shorter than a load, a subtraction, an exponential and a sum
    assert all(k["instructions_a_logit"] > 4 for k in streams)


def test_a_broken_budget_is_told(monkeypatch):
    specification = importlib.util.spec_from_file_location("compiled", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    specification.loader.exec_module(module)
    good = module.Report("select_stream", "bfloat16", "sm_90", 64, "", 8, 80, 0, 256, 4, 8.6)
    assert module.broken(good) == []
    bad = good._replace(spilled_bytes=8, registers=200, wide_loads=0, instructions_a_logit=30.0)
    assert len(module.broken(bad)) == 4
