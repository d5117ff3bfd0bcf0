"""A full disk, a read-only folder, torn files: one clear line, nothing lost or half-written."""

import json
import os
import random
import shutil

import pytest
import torch
import yaml
from commands import bound_by_modes, call, contents, room_for
from safetensors.torch import save_file

from tdkd import checkpoints, records
from tdkd.cli import distill, main
from tdkd.errors import UserError
from tdkd.trainer import TDTrainer

PROMPTS = ["why?", "a b c", "north by east", "0", "tick tock", "zig zag", "one two three"]
RECORDS = [
    {
        "prompt": [{"role": "user", "content": f"say {i}"}],
        "completion": [{"role": "assistant", "content": "yes " * (i % 3 + 1)}],
    }
    for i in range(6)
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "data.jsonl", RECORDS)


@pytest.fixture
def generating(writer, tmp_path):
    """Arguments of a short run of generate, but for its output."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return [
        "generate", "--model", writer, "--prompts", prompts, "--batch-size", "2",
        "--max-new-tokens", "8", "--output",
    ]  # fmt: skip


@pytest.fixture
def evaluating(tiny_student, tiny_teacher, data):
    """Arguments of a short run of evaluate, but for its output."""
    return [
        "evaluate", "--model", tiny_student, "--teacher", tiny_teacher, "--data", data,
        "--samples", "6", "--max-new-tokens", "60", "--output",
    ]  # fmt: skip


@pytest.fixture
def distilling(tmp_path, tiny_student, tiny_teacher, data):
    """Arguments of a run of distill with three steps and checkpoints, but for its output."""
    config = {
        "model_name_or_path": str(tiny_student),
        "teacher_model_name_or_path": str(tiny_teacher),
        "train_file": str(data),
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["distill", tmp_path / "config.yaml", "--output_dir"]


def outcome(out):
    """What a run of distill ends with: losses and weights, and no folder that is not whole."""
    log = json.loads((out / "log.json").read_text())
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "final",
    ]  # fmt: skip
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return losses, (out / "final" / "model.safetensors").read_bytes()


def one_error(error):
    """The only line that is one; a run that had begun has shown bars and notes before it."""
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("tdkd: "))
    assert error.endswith(line + "\n")
    return line


def refused(monkeypatch, capsys, args):
    code, error = call(monkeypatch, capsys, *args)
    assert code == 2, error
    return one_error(error)


# A full disk


@pytest.mark.parametrize("seed", range(8))
def test_lines_are_appended_whole_or_not_at_all(tmp_path, seed):
    path = write_lines(tmp_path / "data.jsonl", RECORDS)
    before = path.read_bytes()
    room = random.Random(seed).randrange(2 * len(before))
    with room_for(room), pytest.raises(UserError, match=f"^output: .* {path}, got File too large"):
        records.append(path, RECORDS)
    assert path.read_bytes() == before
    records.append(path, RECORDS)
    assert path.read_bytes() == 2 * before


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, room):
    path = tmp_path / "state.json"
    records.write_whole(path, {"batches": 1})
    with room_for(room), pytest.raises(UserError, match=f"^output: .* {path}, got File too large"):
        records.write_whole(path, RECORDS)
    assert records.read_json(path) == {"batches": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["[]", "null", "5"])
def test_a_json_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    words = f"^output: expected an object in {path}, got "
    with pytest.raises(UserError, match=words):
        records.read_json(path)
    with pytest.raises(UserError, match=words):
        records.check_settings(path, {"batches": 1})


@pytest.mark.parametrize("room", [700, 900])
def test_generate_goes_on_when_there_is_room_again(monkeypatch, capsys, tmp_path, generating, room):
    assert call(monkeypatch, capsys, *generating, tmp_path / "one" / "data.jsonl")[0] == 0
    whole = (tmp_path / "one" / "data.jsonl").read_bytes()
    assert len(whole) > room
    output = tmp_path / "two" / "data.jsonl"
    with room_for(room):
        line = refused(monkeypatch, capsys, [*generating, output])
    assert f"output: expected to write to {output}, got File too large" in line
    left = output.read_bytes()
    assert whole.startswith(left)
    assert left.count(b"\n") % 2 == 0
    assert left.endswith(b"\n")
    assert call(monkeypatch, capsys, *generating, output)[0] == 0
    assert contents(output.parent).keys() == contents(tmp_path / "one").keys()
    assert output.read_bytes() == whole


def test_evaluate_has_told_its_metrics_when_the_disk_is_full(
    monkeypatch, capsys, tmp_path, evaluating
):
    output = tmp_path / "new" / "out.json"
    monkeypatch.setattr("sys.argv", ["tdkd", *map(str, evaluating), str(output)])
    with room_for(1000), pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert f"output: expected to write to {output}, got File too large" in one_error(printed.err)
    assert "acceptance" in printed.out
    assert list(output.parent.iterdir()) == []


def when_saving(monkeypatch, step, action):
    """Does something before a checkpoint is saved."""
    real = TDTrainer._save_checkpoint

    def save(self, *args, **kwargs):
        if self.state.global_step != step:
            return real(self, *args, **kwargs)
        with action():
            return real(self, *args, **kwargs)

    monkeypatch.setattr(TDTrainer, "_save_checkpoint", save)


# of the files of a checkpoint that are larger: tokenizer.json and all after it in a checkpoint of
# this size, the weights alone, the state of the optimiser alone
@pytest.mark.parametrize("room,what", [(300, "card"), (20_000, "weights"), (50_000, "optimiser")])
def test_distill_goes_on_when_there_is_room_again(
    monkeypatch, capsys, tmp_path, distilling, room, what
):
    assert call(monkeypatch, capsys, *distilling, tmp_path / "one")[0] == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "one/checkpoint-2").iterdir()}
    assert sizes["model.safetensors"] < sizes["optimizer.pt"]
    assert (sizes["model.safetensors"] > room) is (what in ("card", "weights"))
    assert sizes["optimizer.pt"] > room
    out = tmp_path / "two"
    with monkeypatch.context() as patch:
        when_saving(patch, 2, lambda: room_for(room))
        line = refused(monkeypatch, capsys, [*distilling, out])
    assert f"output_dir: expected to write to {out}, got" in line
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-1"]
    checkpoints.check(out / "checkpoint-1")
    assert call(monkeypatch, capsys, *distilling, out)[0] == 0
    assert outcome(out) == outcome(tmp_path / "one")


def test_no_room_for_the_cache_of_the_data_is_one_line(
    monkeypatch, capsys, tmp_path, distilling, data
):
    with room_for(100):
        line = refused(monkeypatch, capsys, [*distilling, tmp_path / "out"])
    assert "File too large" in line
    assert contents(tmp_path / "out") == {}


def test_a_student_that_finds_no_room_is_not_left_in_part(
    monkeypatch, capsys, tmp_path, distilling
):
    assert call(monkeypatch, capsys, *distilling, tmp_path / "out")[0] == 0
    expected = outcome(tmp_path / "out")
    real = distill.save_whole

    def save(*args):
        with room_for(20_000):
            real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "save_whole", save)
        line = refused(monkeypatch, capsys, [*distilling, tmp_path / "out"])
    assert "output_dir: expected to write to" in line
    assert outcome(tmp_path / "out") == expected  # the student of the first run


def test_an_output_takes_the_place_of_no_device(tmp_path):
    """/dev/null is one; a file would be put in its place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"output: expected a regular file to write, got .*pipe"):
        records.check_output(tmp_path / "pipe")


# What a process leaves that dies


@pytest.mark.parametrize("name", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_distill_goes_on_after_it_died_inside_a_checkpoint(
    monkeypatch, capsys, tmp_path, distilling, name
):
    assert call(monkeypatch, capsys, *distilling, tmp_path / "one")[0] == 0
    out = tmp_path / "two"
    real = getattr(TDTrainer, name)

    def die(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TDTrainer, name, die)
        assert call(monkeypatch, capsys, *distilling, out)[0] == 130
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        ".tdkd-unfinished", "checkpoint-1",
    ]  # fmt: skip
    assert call(monkeypatch, capsys, *distilling, out)[0] == 0
    assert outcome(out) == outcome(tmp_path / "one")


def test_adapters_go_on_too(monkeypatch, capsys, tmp_path, distilling):
    lora = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert call(monkeypatch, capsys, *distilling, tmp_path / "one", *lora)[0] == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("final", "checkpoint-3"):
        shutil.rmtree(tmp_path / "two" / name)
    assert call(monkeypatch, capsys, *distilling, tmp_path / "two", *lora)[0] == 0
    one, two = (tmp_path / name / "final" / "adapter_model.safetensors" for name in ("one", "two"))
    assert two.read_bytes() == one.read_bytes()


def test_a_run_that_has_ended_ends_again_as_it_was(monkeypatch, capsys, tmp_path, distilling):
    """Two steps an epoch and three in all: the Trainer alone would do a fourth."""
    assert call(monkeypatch, capsys, *distilling, tmp_path / "out")[0] == 0
    expected = outcome(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    (tmp_path / "out" / "log.json").unlink()
    assert call(monkeypatch, capsys, *distilling, tmp_path / "out")[0] == 0
    assert outcome(tmp_path / "out") == expected


def test_what_was_about_to_be_replaced_comes_back(tmp_path):
    before = tmp_path / checkpoints.UNFINISHED / "before-final"
    before.mkdir(parents=True)
    (before / "model").write_text("old")
    (tmp_path / checkpoints.UNFINISHED / "final").mkdir()
    checkpoints.clear(tmp_path)
    assert contents(tmp_path) == {"final/model": b"old"}


def test_the_new_one_stays_where_both_are_there(tmp_path):
    for name, text in ((".tdkd-unfinished/before-final", "old"), ("final", "new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model").write_text(text)
    checkpoints.clear(tmp_path)
    assert contents(tmp_path) == {"final/model": b"new"}


def test_a_folder_replaces_the_one_before(tmp_path):
    for name, text in ((".tdkd-unfinished/final", "new"), ("final", "old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model").write_text(text)
    checkpoints.publish(tmp_path, "final")
    assert contents(tmp_path) == {"final/model": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_one_before_comes_back_where_there_is_no_room_for_the_new_one(tmp_path, monkeypatch):
    for name, text in ((".tdkd-unfinished/final", "new"), ("final", "old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model").write_text(text)
    real = os.replace

    def full(source, target):
        if source == tmp_path / ".tdkd-unfinished" / "final":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"), checkpoints.writing(tmp_path):
        checkpoints.publish(tmp_path, "final")
    assert contents(tmp_path) == {"final/model": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(
    "limit,keep,left",
    [
        (None, {}, [2, 10, 9, 20]),
        (4, {}, [2, 10, 9, 20]),
        (2, {20}, [9, 20]),
        (2, {20, 2}, [2, 20]),
        (1, {20, 2}, [2, 20]),
        (3, {20, 2}, [2, 9, 20]),
    ],
)
def test_the_oldest_checkpoints_go(tmp_path, limit, keep, left):
    """Oldest by the clock, as the Trainer has it: 9 was written after 10, by a second run."""
    for i, step in enumerate((2, 10, 9, 20)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1000 * i, 1000 * i))
    checkpoints.rotate(tmp_path, limit, {f"checkpoint-{step}" for step in keep})
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-20"


# A read-only folder


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def no_model(*args, **kwargs):
    raise AssertionError("a model was loaded for a run that cannot write")


@pytest.mark.parametrize("command", ["generating", "evaluating", "distilling"])
@pytest.mark.parametrize("below", ["", "new"])
def test_a_read_only_folder_is_told_before_a_model_is_loaded(
    monkeypatch, capsys, request, read_only, command, below
):
    args = request.getfixturevalue(command)
    for module in ("generate", "evaluate", "distill"):
        monkeypatch.setattr(f"tdkd.cli.{module}.load_model", no_model)
    output = read_only / below if command == "distilling" else read_only / below / "out.json"
    with bound_by_modes():
        line = refused(monkeypatch, capsys, [*args, output])
    assert line.startswith("tdkd: output")
    assert f"got {output}: Permission denied" in line
    assert list(read_only.iterdir()) == []


@pytest.mark.parametrize("command", ["generating", "distilling"])
def test_a_path_below_a_file_is_one_line(monkeypatch, capsys, request, data, command):
    before = data.read_bytes()
    args = request.getfixturevalue(command)
    line = refused(monkeypatch, capsys, [*args, data / "out"])
    assert f"got {data}/out: Not a directory" in line
    assert data.read_bytes() == before


def test_a_result_that_is_read_only_is_not_replaced(monkeypatch, capsys, tmp_path, evaluating):
    output = tmp_path / "out.json"
    output.write_text("mine")
    output.chmod(0o444)
    with bound_by_modes():
        line = refused(monkeypatch, capsys, [*evaluating, output])
    assert f"output: expected a file to write, got {output}: Permission denied" in line
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    "args",
    [
        ["verify", "--op", "soft_value", "--dtype", "float32", "--cases", "1", "--json"],
        ["bench", "--op", "select_actions", "--rounds", "1", "--vocab", "64", "--output"],
    ],
)
def test_verify_and_bench_name_the_folder_too(monkeypatch, capsys, read_only, args):
    with bound_by_modes():
        line = refused(monkeypatch, capsys, [*args, read_only / "out"])
    assert str(read_only) in line
    assert "Permission denied" in line


# A truncated checkpoint


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, tiny_student, tiny_teacher):
    """The output folder of a run, but for what it ended with."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "model_name_or_path": str(tiny_student),
        "teacher_model_name_or_path": str(tiny_teacher),
        "train_file": str(write_lines(folder / "data.jsonl", RECORDS)),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    distill.run([str(folder / "config.yaml")])
    return folder


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, empty, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
)
def test_a_truncated_checkpoint_is_one_line(
    monkeypatch, capsys, tmp_path, two_checkpoints, spoil, name
):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints / "out", out)
    spoil(out / "checkpoint-2" / name)
    before = contents(out)
    args = ["distill", two_checkpoints / "config.yaml", "--output_dir", out]
    line = refused(monkeypatch, capsys, args)
    assert f"output_dir: expected a whole checkpoint in {out}/checkpoint-2, got" in line
    assert name.removeprefix("model") in line
    assert "move it away to go on from checkpoint-1" in line
    assert contents(out) == before


def test_without_the_truncated_checkpoint_the_run_goes_on(
    monkeypatch, capsys, tmp_path, two_checkpoints
):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints / "out", out)
    expected = (out / "final" / "model.safetensors").read_bytes()
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(out / name)
    args = ["distill", two_checkpoints / "config.yaml", "--output_dir", out]
    assert call(monkeypatch, capsys, *args)[0] == 0
    assert (out / "final" / "model.safetensors").read_bytes() == expected


def test_a_shard_that_is_missing_is_found(tmp_path):
    path = tmp_path / "checkpoint-3"
    path.mkdir()
    (path / checkpoints.STATE).write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, path / "model-1.safetensors")
    with pytest.raises(UserError, match="got no model-2.safetensors, which .*; move .* afresh"):
        checkpoints.check(path, [checkpoints.STATE])


# A corrupted line


BROKEN = {
    "torn": ('{"prompt": [{"ro', "expected JSON on line 4 of"),
    "bytes": (b"\x00\xff", "expected JSON on line 4 of"),
    "no_object": ("[1]", "expected a JSON object on line 4 of"),
    "digits": ('{"prompt": ' + "1" * 5000 + "}", "expected JSON on line 4 of"),
    "brackets": ("[" * 200_000, "expected JSON on line 4 of"),
    "no_prompt": ('{"completion": "b"}', "on line 4 of"),
    "null": ('{"prompt": null, "completion": "b"}', "on line 4 of"),
    "no_answer": ('{"prompt": [{"role": "user", "content": "a"}]}', "on line 4 of"),
    "no_role": ('{"prompt": [{"content": "a"}], "completion": [{"content": "a"}]}', "on line 4 of"),
}


def break_line(path, line):
    """In place of the fourth line; what there is then."""
    lines = path.read_bytes().split(b"\n")
    lines[3] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))
    return path.read_bytes()


@pytest.mark.parametrize("command", ["evaluating", "distilling"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_of_data_is_named(
    monkeypatch, capsys, request, tmp_path, data, command, name
):
    args = request.getfixturevalue(command)
    line, says = BROKEN[name]
    broken = break_line(data, line)
    output = tmp_path / "new" / "out"
    told = refused(monkeypatch, capsys, [*args, output])
    assert f"{says} {data}" in told
    assert told.startswith("tdkd: train_file: " if command == "distilling" else "tdkd: data: ")
    assert len(told) < 500
    assert data.read_bytes() == broken
    assert contents(output.parent) == {}


def test_a_broken_line_of_held_out_data_is_named(monkeypatch, capsys, tmp_path, distilling, data):
    held_out = write_lines(tmp_path / "held_out.jsonl", RECORDS)
    break_line(held_out, "{")
    args = [*distilling, tmp_path / "out", "--eval_file", held_out, "--eval_strategy", "epoch"]
    line = refused(monkeypatch, capsys, args)
    assert f"tdkd: eval_file: expected JSON on line 4 of {held_out}" in line


def test_records_of_another_kind_are_named(monkeypatch, capsys, tmp_path, distilling, data):
    break_line(data, '{"prompt": "why?", "completion": "so"}')
    line = refused(monkeypatch, capsys, [*distilling, tmp_path / "out"])
    assert (
        f"train_file: expected prompt to be chat messages with a role on line 4 of {data}, got a "
        "string" in line
    )


def test_a_broken_line_of_generated_data_is_named(monkeypatch, capsys, tmp_path, generating):
    output = tmp_path / "new" / "data.jsonl"
    assert call(monkeypatch, capsys, *generating, output)[0] == 0
    whole = output.read_bytes()
    for line, tail in ((b"\x00" * 40, b""), (b"[]", b'{"prompt": ['), (b"{", b"")):
        output.write_bytes(whole)
        # the last line is torn as well: nothing may be cut while something is wrong before it
        broken = break_line(output, line)[:-9] + tail
        output.write_bytes(broken)
        told = refused(monkeypatch, capsys, [*generating, output])
        assert f"tdkd: output: expected {'a ' * (line == b'[]')}JSON" in told
        assert f"on line 4 of {output}" in told
        assert output.read_bytes() == broken
    # what the line says can be done
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert call(monkeypatch, capsys, *generating, output)[0] == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("name", ["settings", "prompts"])
def test_a_broken_file_beside_generated_data_is_named(monkeypatch, capsys, tmp_path, writer, name):
    args = [
        "generate", "--model", writer, "--num-examples", "4", "--batch-size", "4",
        "--max-prompt-tokens", "40", "--max-new-tokens", "4", "--output", tmp_path / "data.jsonl",
    ]  # fmt: skip
    assert call(monkeypatch, capsys, *args)[0] == 0
    cut(tmp_path / f"data.jsonl.{name}.json")
    before = contents(tmp_path)
    line = refused(monkeypatch, capsys, args)
    assert f"tdkd: output: expected JSON in {tmp_path}/data.jsonl.{name}.json, got" in line
    assert contents(tmp_path) == before


# An unreadable model


@pytest.mark.parametrize(
    "command,option",
    [
        ("generating", "model"),
        ("evaluating", "model"),
        ("evaluating", "teacher"),
        ("distilling", "model_name_or_path"),
        ("distilling", "teacher_model_name_or_path"),
    ],
)
@pytest.mark.parametrize("name,spoil", [("model.safetensors", cut), ("config.json", empty)])
def test_a_model_that_cannot_be_read_is_named(
    monkeypatch, capsys, request, tmp_path, tiny_student, command, option, name, spoil
):
    args = request.getfixturevalue(command)
    model = tmp_path / "model"
    shutil.copytree(tiny_student, model)
    spoil(model / name)
    output = tmp_path / "new" / "out"
    line = refused(monkeypatch, capsys, [*args, output, f"--{option}", model])
    assert line.startswith(f"tdkd: {option}: expected")
    assert str(model) in line
    assert contents(output.parent) == {}


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_may_not_be_read_is_named(
    monkeypatch, capsys, tmp_path, evaluating, tiny_student, name
):
    model = tmp_path / "model"
    shutil.copytree(tiny_student, model)
    (model / name).chmod(0)
    with bound_by_modes():
        line = refused(monkeypatch, capsys, [*evaluating, tmp_path / "out.json", "--model", model])
    (model / name).chmod(0o755)
    assert line.startswith("tdkd: model: expected")
    assert str(model) in line
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", ["evaluating", "distilling"])
def test_data_that_may_not_be_read_are_named(monkeypatch, capsys, request, tmp_path, data, command):
    args = request.getfixturevalue(command)
    data.chmod(0)
    with bound_by_modes():
        line = refused(monkeypatch, capsys, [*args, tmp_path / "out"])
    data.chmod(0o644)
    assert f"expected a JSONL file to read, got {data}: Permission denied" in line
