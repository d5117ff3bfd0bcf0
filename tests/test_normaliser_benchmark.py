"""benchmarks/normaliser.py on tiny models."""

import importlib.util
import json
from pathlib import Path

import pytest

from tdkd import records

ROOT = Path(__file__).resolve().parents[1]


def test_says_what_was_run_and_on_what(monkeypatch, tmp_path, tiny_teacher, tiny_student):
    spec = importlib.util.spec_from_file_location("n", ROOT / "benchmarks" / "normaliser.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cases = [
        (0, "none", "batch"), (9, "uniform", "batch"), (9999, "student", "batch"),
        (9, "student", "sampled"), (9999, "student", "sampled"),
    ]  # fmt: skip
    monkeypatch.setattr(script, "CASES", cases)
    told = [{"role": "user", "content": "why?"}], [{"role": "assistant", "content": "so it is"}]
    data, output = tmp_path / "heldout.jsonl", tmp_path / "normaliser.json"
    records.append(data, [dict(zip(("prompt", "completion"), told, strict=True))] * 3)
    script.main(
        ["--teacher", str(tiny_teacher), "--data", str(data), "--answers", "2", "--draws", "2"]
        + ["--student", f"before={tiny_student}", "--student", f"after={tiny_teacher}"]
        + ["--json", str(output)]
    )
    run = json.loads(output.read_text())
    assert {"torch", "tdkd"} <= set(run["versions"])
    assert run["machine"]["cpu"]
    assert run["date"]
    assert "git" in run
    assert (run["answers"], run["draws"]) == (2, 2)
    assert list(run["students"]) == ["before", "after"]
    for rows in run["students"].values():
        assert [(row["extra"], row["law"], row["normaliser"]) for row in rows] == cases
        assert rows[0]["bias"] < 0  # a part of the mass
        # everything is in it
        for row in (rows[2], rows[4]):
            assert row["columns"] == 264
            assert row["bias"] == pytest.approx(0, abs=1e-5)
        assert rows[2]["gradient_error"] < 1e-4
    # of a student that is its teacher the gradient is rounding, which is another one there
    assert run["students"]["before"][4]["gradient_error"] < 1e-4
