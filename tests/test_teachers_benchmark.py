"""benchmarks/teachers.py on tiny models."""

import json
import sys
from pathlib import Path

import pytest

from tdkd import records
from tdkd.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
WORDS = ["one two", "red", "a b c d e", "why?", "north by east", "0123", "tick tock", "zig"]


@pytest.fixture(scope="module")
def script():
    """The module benchmarks/teachers.py, and its neighbour for as long as it is needed."""
    sys.path.insert(0, str(FOLDER))
    import teachers

    yield teachers
    sys.path.remove(str(FOLDER))
    for name in ("teachers", "step"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(script, tmp_path_factory, tiny_teacher, tiny_student):
    """The JSON, as it was written."""
    models = tmp_path_factory.mktemp("demo")
    (models / "teacher").symlink_to(tiny_teacher)
    (models / "student-init").symlink_to(tiny_student)
    records.append(
        models / "train.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": WORDS[i % 8]}],
                "completion": [{"role": "assistant", "content": WORDS[(3 * i + 1) % 8]}],
            }
            for i in range(12)
        ],
    )
    output = models / "teachers.json"
    script.main(
        ["--models", str(models), "--examples", "10", "--rounds", "2", "--output", str(output)]
    )
    return json.loads(output.read_text())


def test_says_what_was_run(run):
    assert run["date"]
    assert {"torch", "tdkd", "transformers", "trl"} <= set(run["versions"])
    assert [run[model]["layers"] for model in ("teacher", "student")] == [4, 2]
    assert run["examples"] == 10


def test_caches_are_made_and_read(run):
    small, whole = run["making"]
    for made in (small, whole):
        assert len(made["times_s"]) == 2
        assert 0 < made["states_per_s"] < made["tokens_per_s"]
    assert small["members_a_set"] <= whole["members_a_set"] == 64
    assert 0 < small["bytes_a_state"] <= whole["bytes_a_state"]
    for read in run["reading"]:
        assert 0 < read["sets_s"] < read["with_sets_s"]


def test_two_bytes_cost_little_of_the_gradient(run):
    found = {(x["top_p"], x["log_probs"]): x for x in run["gradient"]}
    for top_p in (0.8, 1.0):
        half, brain = (found[top_p, name] for name in ("float16", "bfloat16"))
        # 2^-11 and 2^-8 of a log-probability, which is of size 5 here
        assert 0 < half["relative_l2"] < brain["relative_l2"] < 0.05
        assert half["relative_l2"] < 0.005
        assert half["loss_cached"] == pytest.approx(half["loss_live"], rel=1e-2)


def test_memory_is_that_of_a_process(run):
    memory = run["memory"]
    assert all(memory[f"{name}_peak_bytes"] > 10**8 for name in ("cache", "live"))


def test_says_which_command_makes_the_models(script, tmp_path):
    with pytest.raises(UserError, match="make demo"):
        script.main(["--models", str(tmp_path), "--output", str(tmp_path / "teachers.json")])
