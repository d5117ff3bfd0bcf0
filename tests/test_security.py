"""What SECURITY.md promises and no other test holds: no code of others, no shell, no network."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from commands import call, one_line
from datasets import Dataset
from safetensors.torch import load_file

from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer
from tdkd.trainer import TDConfig, TDTrainer

MESSAGES = [
    {
        "prompt": [{"role": "user", "content": f"say {i}"}],
        "completion": [{"role": "assistant", "content": "yes"}],
        "truncated": i == 1,
    }
    for i in range(4)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in MESSAGES))
    return path


@pytest.fixture
def settings(tmp_path, tiny_student, tiny_teacher, data):
    return {
        "model_name_or_path": str(tiny_student),
        "teacher_model_name_or_path": str(tiny_teacher),
        "train_file": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }


# Runs commands and prints every event by which they would start a process, reach the network or
# load a pickle; torch looks for libraries with ldconfig and gcc when it is imported.
WATCHED = """
import sys
import tdkd.cli.distill, tdkd.cli.evaluate, tdkd.cli.generate
WATCHED = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.",
    "socket.", "urllib.", "http.", "ftplib.", "pickle.find_class",
)
def watch(event, args):
    if event.startswith(WATCHED):
        print("EVENT", event, str(args)[:200], flush=True)
sys.addaudithook(watch)
from tdkd.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = line.split("\\t")
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, line
print("DONE")
"""


def test_commands_start_no_process_and_reach_for_no_network(
    tmp_path, tiny_student, tiny_teacher, data, settings
):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    student, teacher, made = str(tiny_student), str(tiny_teacher), tmp_path / "made.jsonl"
    commands = [
        ["generate", "--model", teacher, "--prompts", data, "--output", made,
         "--max-new-tokens", "4"],
        ["distill", tmp_path / "config.yaml"],
        ["evaluate", "--model", student, "--teacher", teacher, "--data", data,
         "--output", tmp_path / "out.json", "--max-new-tokens", "4"],
    ]  # fmt: skip
    lines = "\n".join("\t".join(["tdkd", *map(str, command)]) for command in commands)
    # not told to be silent: offline, without telemetry, in CI
    silent = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CI")
    environment = {
        name: x for name, x in os.environ.items() if name not in silent and "TELEMETRY" not in name
    }
    environment |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    # matplotlib asks fc-list for the fonts of a machine once
    fonts = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(fonts, env=environment, capture_output=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], input=lines, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "DONE"
    assert [line for line in done.stdout.splitlines() if line.startswith("EVENT")] == []


def test_code_that_comes_with_a_model_is_not_run(tiny_teacher, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    (path / "code.py").write_text(code)
    config = {
        "model_type": "its-own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (path / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="^model: expected "):
            load(path)
    assert not marker.exists()


def test_distill_runs_no_code_of_a_model(monkeypatch, capsys, tmp_path, settings):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    args = ["distill", tmp_path / "config.yaml", "--trust_remote_code", "true"]
    code, error = call(monkeypatch, capsys, *args)
    assert code == 2
    assert "trust_remote_code: expected False" in one_line(error)


def test_the_trainer_runs_no_code_of_a_model(tmp_path, tiny_student):
    with pytest.raises(UserError, match="^trust_remote_code: expected False"):
        TDConfig(output_dir=str(tmp_path), trust_remote_code=True)
    config = TDConfig(output_dir=str(tmp_path), model_init_kwargs={"trust_remote_code": True})
    with pytest.raises(UserError, match="^model_init_kwargs: expected no trust_remote_code"):
        TDTrainer(str(tiny_student), args=config)


def test_the_trainer_reads_no_pickle_as_a_student(tmp_path, tiny_student, tiny_teacher):
    path = tmp_path / "model"
    shutil.copytree(tiny_student, path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    config = TDConfig(output_dir=str(tmp_path / "out"))
    data = Dataset.from_list(MESSAGES)
    with pytest.raises(OSError, match="safetensors"):
        TDTrainer(str(path), str(tiny_teacher), config, train_dataset=data)


def test_the_trainer_takes_local_directories_alone(tmp_path, tiny_teacher):
    config = TDConfig(output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="^model: expected a model directory, got some/model"):
        TDTrainer("some/model", str(tiny_teacher), config)


def test_yaml_makes_no_objects(monkeypatch, capsys, tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "config.yaml"
    path.write_text(f"train_file: !!python/object/apply:os.mkdir ['{marker}']\n")
    code, error = call(monkeypatch, capsys, "distill", path)
    assert code == 2
    assert "config: expected YAML" in one_line(error)
    assert not marker.exists()
