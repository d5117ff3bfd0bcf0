"""benchmarks/step.py and benchmarks/default_sets.py on tiny models."""

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


def module(name):
    """A script, which finds what lies beside it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def script():
    """The module benchmarks/step.py."""
    return module("step")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_teacher, tiny_student):
    """A directory as `make demo` leaves it."""
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
    (models / "heldout.jsonl").symlink_to(models / "train.jsonl")
    return models


@pytest.fixture(scope="module")
def run(script, models):
    """The JSON of two steps, as it was written."""
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


def test_what_is_beyond_the_bodies_is_paired_by_round(script, run, tmp_path, capsys):
    """A slow round is slow for both: the difference of the medians would be 0.4 here."""
    assert script.beyond_bodies([1.5, 2.4, 9.5], [1.0, 2.0, 9.0]) == pytest.approx([0.45, 0.5, 0.5])
    by_name = {r["rival"]: r for r in run["rivals"]}
    bodies = by_name["bodies alone"]
    assert bodies["beyond_bodies_s"] == 0.0
    for r in run["rivals"]:
        if r["skipped"] is None:
            first, second = (a - b for a, b in zip(r["times_s"], bodies["times_s"], strict=True))
            assert r["beyond_bodies_s"] == pytest.approx((first + second) / 2)
            low, high = r["beyond_bodies_quartiles_s"]
            assert low <= r["beyond_bodies_s"] <= high
    path = tmp_path / "step.json"
    path.write_text(json.dumps(run))
    capsys.readouterr()
    assert script.main(["--show", str(path)]) == run
    assert "tdkd batch" in capsys.readouterr().out


def test_losses_agree_where_they_are_the_same(script, run):
    assert hasattr(TDTrainer, "_td_loss")  # what the dense rivals override
    found = losses(run)
    for name in ("dense, reference", "dense, kernels"):
        assert found[name] == pytest.approx(found["tdkd exact"], rel=1e-4)
    assert found["tdkd cache"] == pytest.approx(found["tdkd batch"], rel=1e-3)
    # the same tokens, though they are padded elsewhere
    assert found["TRL Distillation, KL"] == pytest.approx(found["TRL GKD, KL"], rel=1e-4)
    assert found["tdkd gather"] != pytest.approx(found["tdkd exact"], rel=1e-2)


def test_sets_as_the_trainer_takes_them_are_timed(tmp_path, models):
    output = tmp_path / "default_sets.json"
    given = ["--models", models, "--rows", "8", "--rounds", "1", "--output", output]
    written = module("default_sets").main(list(map(str, given)))
    assert json.loads(output.read_text()) == json.loads(json.dumps(written))
    assert all(r["skipped"] is None and r["median_s"] > 0 for r in written["rivals"])
    assert [(s["top_p"], s["rows"]) for s in written["sets"]] == [
        (top_p, rows) for top_p in (0.8, 1.0) for rows in (8, 16, 32)
    ]
    narrow, wide = written["sets"][0], written["sets"][3]
    assert narrow["mean_members"] <= wide["mean_members"] == 64
    assert str(models) not in output.read_text()


def test_says_which_command_makes_the_models(script, tmp_path):
    with pytest.raises(UserError, match="make demo"):
        script.main(["--models", str(tmp_path), "--output", str(tmp_path / "step.json")])
