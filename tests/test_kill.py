"""The script behind make faults: what it takes for a loss."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("kill", Path(__file__).parent / "faults" / "kill.py")
kill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill)

QUIET = {"log": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], "files": ["a", "b"]}


def changed(path, value):
    result = json.loads(json.dumps(QUIET))
    part = result
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return result


def test_the_same_is_no_loss():
    assert kill.difference(changed(["files"], ["a", "b"]), QUIET) is None


@pytest.mark.parametrize(
    "path,value,where",
    [
        (["log", 1, "loss"], 0.25000001, "/log[1]/loss"),
        (["log"], QUIET["log"][:1], "/log: 1 entries for 2"),
        (["files"], ["a", "b", "b.tmp"], "/files: 3 entries for 2: ['b.tmp']"),
        (["weights"], {"model": "0"}, "/weights"),
    ],
)
def test_every_difference_is_a_loss(path, value, where):
    assert kill.difference(changed(path, value), QUIET).startswith(where)


def test_a_checkpoint_that_is_being_written_is_seen(tmp_path):
    whole = tmp_path / "checkpoint-1"
    whole.mkdir()
    assert kill.being_written(tmp_path) == whole
    (whole / "trainer_state.json").write_text("{}")
    assert kill.being_written(tmp_path) is None
    (tmp_path / ".tdkd-unfinished").mkdir()
    assert kill.being_written(tmp_path) == tmp_path / ".tdkd-unfinished"


def test_results_know_the_clock_from_the_run(tmp_path):
    log = [
        {"step": 1, "loss": 0.5, "time/learn": 0.1},
        {"train_runtime": 3.0, "train_steps_per_second": 2.0},
    ]
    (tmp_path / "log.json").write_text(json.dumps(log))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = kill._distilled(tmp_path)
    assert first["log"] == [{"step": 1, "loss": 0.5}, {}]
    assert first["files"] == ["log.json", "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert kill.difference(kill._distilled(tmp_path), first).startswith("/weights/model")


PAIR = kill.Job("pair", lambda out: [], lambda out: None, 2)
FOR_EVER = "import os, sys, time; {}; time.sleep(600)"


def test_two_processes_know_their_places_and_are_killed(tmp_path, monkeypatch):
    saying = "open(os.environ['RANK'] + os.environ['WORLD_SIZE'], 'x')"
    monkeypatch.setattr(kill, "COMMAND", FOR_EVER.format(saying))
    monkeypatch.chdir(tmp_path)
    run = kill.Run(PAIR, tmp_path, tmp_path / "log", fork=False)
    while len(list(tmp_path.glob("[01]2"))) < 2:
        assert not run.ended()
        time.sleep(0.01)
    assert run.kill(first=1, lag=0.01)
    assert run.codes == [-9, -9]


def test_a_process_that_fails_stops_the_other(tmp_path, monkeypatch):
    failing = "os.environ['RANK'] == '1' and sys.exit(3)"
    monkeypatch.setattr(kill, "COMMAND", FOR_EVER.format(failing))
    run = kill.Run(PAIR, tmp_path, tmp_path / "log", fork=False)
    assert run.wait() == 3
    assert run.codes == [3, -9]
    assert not run.kill()
