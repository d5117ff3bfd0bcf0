"""benchmarks/step.py on tiny models."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tdkd import records
from tdkd.errors import UserError
from tdkd.trainer import TDTrainer

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["one two", "red", "a b c d e", "why?", "north by east", "0123", "tick tock", "zig"]


@pytest.fixture(scope="module")
def script():
    """The module benchmarks/step.py."""
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(script, tmp_path_factory, tiny_teacher, tiny_student):
    """The JSON of two steps, as it was written."""
    models = tmp_path_factory.mktemp("demo")
    (models / "teacher").symlink_to(tiny_teacher)
    (models / "student-init").symlink_to(tiny_student)
    records.append(
        models / "train.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": WORDS[i % 8]}],
                "completion": [{"role": "assistant", "content": WORDS[(3 * i + 1) % 8]}],
                "truncated": i % 3 == 0,
            }
            for i in range(16)
        ],
    )
    output = models / "results" / "step.json"
    script.main(["--models", str(models), "--steps", "2", "--output", str(output)])
    return json.loads(output.read_text())


def losses(run):
    return {r["rival"]: r["losses"] for r in run["rivals"] if r["skipped"] is None}


def test_says_what_was_run(run):
    assert run["steps"] == 2
    assert run["date"]
    assert {"torch", "tdkd", "transformers", "trl"} <= set(run["versions"])
    assert run["machine"]["cpu"]
    assert "git" in run
    assert [run[model]["layers"] for model in ("teacher", "student")] == [4, 2]
    assert [batch["answers"] for batch in run["batches"]] == [8, 8]
    for batch in run["batches"]:
        assert 0 < batch["response_tokens"] < batch["tokens"] <= 8 * batch["length"]


def test_every_rival_is_timed_or_says_why_not(script, run):
    assert [r["rival"] for r in run["rivals"]] == [rival.name for rival in script.RIVALS]
    assert [r["rival"] for r in run["rivals"] if r["skipped"]] == ["TRL GKD, Liger"]
    for r in run["rivals"]:
        if r["skipped"]:
            assert r["median_s"] is None
            continue
        assert len(r["times_s"]) == len(r["losses"]) == 2
        assert r["quartiles_s"][0] <= r["median_s"] <= r["quartiles_s"][1]
        assert 0 < r["response_tokens_per_s"] < r["tokens_per_s"]
        assert r["peak_extra_bytes"] is None or r["peak_extra_bytes"] >= 0
        assert all(math.isfinite(loss) for loss in r["losses"])
    assert {r["rival"]: r["ratio"] for r in run["rivals"]}["tdkd batch"] == 1.0


def test_losses_agree_where_they_are_the_same(script, run):
    assert hasattr(TDTrainer, "_td_loss")  # what the dense rivals override
    found = losses(run)
    for name in ("dense, reference", "dense, kernels"):
        assert found[name] == pytest.approx(found["tdkd exact"], rel=1e-4)
    assert found["tdkd cache"] == pytest.approx(found["tdkd batch"], rel=1e-3)
    # the same tokens, though they are padded elsewhere
    assert found["TRL Distillation, KL"] == pytest.approx(found["TRL GKD, KL"], rel=1e-4)
    assert found["tdkd gather"] != pytest.approx(found["tdkd exact"], rel=1e-2)


def test_says_which_command_makes_the_models(script, tmp_path):
    with pytest.raises(UserError, match="make demo"):
        script.main(["--models", str(tmp_path), "--output", str(tmp_path / "step.json")])
