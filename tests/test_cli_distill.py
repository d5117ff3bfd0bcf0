"""tdkd distill: a whole run from YAML and flags, resume, truncated answers, and what it refuses."""

import json
import logging
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdkd import cli, ops
from tdkd.cache import fingerprint
from tdkd.cli import distill, settings
from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer
from tdkd.trainer import TDConfig, TDTrainer

RECORDS = [
    {
        "prompt": [{"role": "user", "content": f"say {i}"}],
        "completion": [{"role": "assistant", "content": "yes " * (i % 3 + 1)}],
    }
    for i in range(6)
]


@pytest.fixture
def setting(tmp_path, tiny_teacher, tiny_student):
    """A data file and a YAML file of a run with two steps; returns the YAML's path and content."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    content = {
        "model_name_or_path": str(tiny_student),
        "teacher_model_name_or_path": str(tiny_teacher),
        "train_file": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": False,
        "action_top_k": 4,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, content


def test_a_run_leaves_a_student_and_a_log_and_resumes(setting, tmp_path, capsys):
    path, content = setting
    distill.run([str(path)])
    final = tmp_path / "out" / "final"
    AutoModelForCausalLM.from_pretrained(final)
    AutoTokenizer.from_pretrained(final)
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert not (tmp_path / "out" / "final.tmp").exists()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves in" in capsys.readouterr().err
    distill.run([str(path), "--max_steps", "3"])
    assert "checkpoint-2" in capsys.readouterr().err
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert "nothing was trained" not in capsys.readouterr().err
    distill.run([str(path), "--max_steps", "3"])
    assert "at the last step already: nothing was trained" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_shows_what_is_logged(setting, capsys, monkeypatch, rank):
    path, _ = setting
    ops._log.cache_clear()
    monkeypatch.setattr(TDConfig, "process_index", property(lambda self: rank))
    distill.run([str(path), "--save_strategy", "no"])
    shown = capsys.readouterr().err
    assert ("heads: normaliser batch; no normaliser: k head rows" in shown) == (rank == 0)
    # 24 rows of 4 ids and 1,024 samples are most of 264 columns
    route = "H = 16, cpu: log Z over all columns, for the batch vocabulary would cost more"
    assert shown.count(route) == (rank == 0)
    assert not logging.getLogger("tdkd").handlers


def test_without_matplotlib_there_is_a_log_and_no_picture(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path, content = setting
    path.write_text(yaml.safe_dump({**content, "max_steps": 1, "save_strategy": "no"}))
    distill.run([str(path)])
    assert (tmp_path / "out" / "log.json").is_file()
    assert not (tmp_path / "out" / "curves.png").exists()
    assert 'no curves.png: pip install "tdkd[train]"' in capsys.readouterr().err


def test_an_adapter_is_read_with_its_base_model(setting, tmp_path):
    """What distill leaves of LoRA is a model for the other commands, and for distill itself."""
    path, content = setting
    distill.run([str(path), "--use_peft", "true", "--lora_target_modules", "all-linear"])
    final = tmp_path / "out" / "final"
    assert not (final / "config.json").exists()
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        merged, base = (load_model(x)(ids).logits for x in (final, content["model_name_or_path"]))
        expected = AutoPeftModelForCausalLM.from_pretrained(final).eval()(ids).logits
    torch.testing.assert_close(merged, expected)
    assert (merged - base).abs().max() > 1e-4
    assert load_tokenizer(final).chat_template
    run = TDTrainer(
        final, Path(content["teacher_model_name_or_path"]), TDConfig(str(tmp_path / "by path")),
        train_dataset=Dataset.from_list(RECORDS), processing_class=load_tokenizer(final),
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(ids.to(run.model.device)).logits, merged)
    more = ["--model_name_or_path", str(final), "--output_dir", str(tmp_path / "more")]
    distill.run([str(path), *more])
    assert (tmp_path / "more" / "final" / "config.json").is_file()
    for file in final.glob("adapter_model.*"):
        file.rename(final / "adapter_model.bin")
    with pytest.raises(UserError, match="model: expected adapter_model.safetensors in"):
        load_model(final)
    named = json.loads((final / "adapter_config.json").read_text())
    (final / "adapter_config.json").write_text(
        json.dumps({**named, "base_model_name_or_path": str(tmp_path / "nowhere")})
    )
    (final / "adapter_model.bin").rename(final / "adapter_model.safetensors")
    with pytest.raises(UserError, match="nowhere, which does not exist .*base model of the adap"):
        load_model(final)


def test_the_dtype_of_the_student_is_the_one_that_was_asked_for(setting, tmp_path):
    path, _ = setting
    distill.run([str(path), "--dtype", "bfloat16", "--max_steps", "1"])
    assert load_model(tmp_path / "out" / "final", dtype="auto").dtype == torch.bfloat16


def test_an_objective_by_name_in_the_file_and_as_a_flag(setting, tmp_path):
    path, content = setting
    text = "JSD(0.3, tail=True) + 0.1 * SoftTD(steps=2)"
    logs = []
    for name, flags in (("file", []), ("flag", ["--objective", text])):
        changed = {"output_dir": str(tmp_path / name), "save_strategy": "no"}
        if name == "file":
            changed["objective"] = text
        path.write_text(yaml.safe_dump({**content, **changed}))
        distill.run([str(path), *flags])
        log = json.loads((tmp_path / name / "log.json").read_text())
        logs.append([entry["loss"] for entry in log if "loss" in entry])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


REFUSED = {
    "no_config": (["nowhere.yaml"], {}, "config: expected a YAML file"),
    "unknown_key": (
        [],
        {"action_topk": 3, "foo": "--x"},
        "config: expected fields of tdkd distill (--help lists them), got action_topk foo",
    ),
    "unknown_flag": (
        ["--action_topk", "3"],
        {},
        "config: expected flags of tdkd distill (--help lists them), got --action_topk 3",
    ),
    "abbreviation": (["--temp", "2"], {}, "(--help lists them), got --temp 2"),
    "bad_value": ([], {"gamma": 2.0}, "gamma: expected a number in [0, 1], got 2.0"),
    "bad_flag_value": (["--max_steps", "many"], {}, "max_steps"),
    "bad_objective": ([], {"objective": "KL() + JSD"}, "objective: expected one of ForwardKL"),
    "model_init_kwargs": ([], {"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs: "),
    "resume_from": (["--resume_from_checkpoint", "x"], {}, "resume_from_checkpoint: expected it"),
    "four_bits": (["--load_in_4bit", "true"], {}, "load_in_4bit: expected it to be left out"),
    "attention": (["--attn_implementation", "foo"], {}, "model_name_or_path: expected a causal"),
    "eval_file_alone": (["--eval_file", "x.jsonl"], {}, "eval_file: expected none without eval_st"),
    "two_files": ([], {"train_file": ["a", "b"]}, "train_file: expected one path, got ['a', 'b']"),
    "dtype": (
        [],
        {"dtype": "bf16"},
        "dtype: expected one of auto, float32, bfloat16, flo",
    ),
    "negative_length": (["--max_length", "-1"], {}, "max_length: expected a number >= 1, got -1"),
    "no_eval_file": (["--eval_strategy", "steps"], {}, "eval_strategy: expected 'no' without eval"),
    "too_short": (["--max_length", "3"], {}, "cut off at max_length (3)"),
    "lora_target": (
        ["--use_peft", "true", "--lora_target_modules", "zzz"],
        {},
        "config: Target modules",
    ),
    "two_objectives": (
        ["--td_weight", "0.3"],
        {"objective": "JSD"},
        "td_weight: expected it to be left out beside objective, got 0.3",
    ),
    "too_few_columns": (["--vocab_size", "80"], {}, "largest token of train_file, got 80"),
    "negative_rate": (["--learning_rate", "-1"], {}, "learning_rate: expected a number >= 0 and"),
    "no_batch": (
        [],
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size: expected a number >= 1, got 0",
    ),
    "no_wandb": (["--report_to", "wandb"], {}, "config: WandbCallback requires wandb to be inst"),
    "no_data": ([], {"train_file": "nowhere.jsonl"}, "train_file: expected a JSONL file"),
    "no_student": ([], {"model_name_or_path": "nowhere"}, "model_name_or_path: expected"),
    "no_teacher": ([], {"teacher_model_name_or_path": None}, "teacher_model: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_line(setting, monkeypatch, capsys, name):
    flags, changed, message = REFUSED[name]
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", bool)
    path, content = setting
    path.write_text(yaml.safe_dump({**content, **changed}))
    first = [] if name == "no_config" else [str(path)]
    monkeypatch.setattr("sys.argv", ["tdkd", "distill", *first, *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tdkd: ")
    assert message in last


def test_conversations_need_a_chat_template(setting, tmp_path, tiny_student, monkeypatch, capsys):
    path, content = setting
    plain = tmp_path / "plain"
    shutil.copytree(tiny_student, plain)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    monkeypatch.setattr(
        "sys.argv", ["tdkd", "distill", str(path), "--model_name_or_path", str(plain)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "with a chat template" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "content", ["", "{}\n", '{"question": "a"}\n'], ids=["empty", "no_fields", "other_fields"]
)
def test_useless_data_is_one_line(setting, tmp_path, monkeypatch, capsys, content):
    path, _ = setting
    (tmp_path / "train.jsonl").write_text(content)
    monkeypatch.setattr("sys.argv", ["tdkd", "distill", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "train_file: expected" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("content", ["chat", "text"])
def test_dates_are_text_and_names_are_no_patterns(tmp_path, tiny_student, content):
    def record(text):
        if content == "text":
            return {"prompt": "when?", "completion": text}
        return {
            "prompt": [{"role": "user", "content": "when?"}],
            "completion": [{"role": "assistant", "content": text}],
        }

    for name, text in (("run1", "another"), ("run[1]", "2024-01-02")):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record(text)) + "\n"] * 3
        (tmp_path / name / "data.jsonl").write_text("".join(lines))
    data = str(tmp_path / "run[1]" / "data.jsonl")
    loaded = distill.load_data(data, "train_file", load_tokenizer(tiny_student))
    assert list(loaded) == [record("2024-01-02")] * 3


def test_a_checkpoint_of_the_model_alone_is_not_resumed(setting):
    path, _ = setting
    distill.run([str(path), "--save_only_model", "true"])
    with pytest.raises(UserError, match="resume: expected false with save_only_model"):
        distill.run([str(path), "--save_only_model", "true", "--max_steps", "3"])
    distill.run([str(path), "--save_only_model", "true", "--resume", "false"])


def test_what_starts_afresh_is_not_resumed_from_what_was_before(setting, tmp_path, capsys):
    path, _ = setting
    out = tmp_path / "out"
    for afresh in (1, 2):
        distill.run([str(path), "--max_steps", "4", "--save_steps", "2"])
        distill.run([str(path), "--max_steps", "2", "--save_steps", "2", "--resume", "false"])
        assert f"earlier-{afresh}" in capsys.readouterr().err
        assert (out / f"earlier-{afresh}" / "checkpoint-4").is_dir()
        assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]
        distill.run([str(path), "--max_steps", "4", "--save_steps", "2"])
        assert f"resuming from {out / 'checkpoint-2'}" in capsys.readouterr().err


def test_what_was_begun_otherwise_is_not_resumed(setting, tmp_path, tiny_teacher, tiny_student):
    path, _ = setting
    out = tmp_path / "out"
    distill.run([str(path), "--max_steps", "1"])
    begun = (out / "settings.json").read_bytes()
    more = tmp_path / "more.jsonl"
    more.write_text((tmp_path / "train.jsonl").read_text() * 2)
    lora = ["--use_peft", "true", "--lora_target_modules", "q_proj"]
    size = r"per_device_train_batch_size \* gradient_accumulation_steps \* processes"
    for flags, name in (
        (["--action_top_k", "8"], "action_top_k: expected 4 as in .*settings.json, got 8"),
        (["--learning_rate", "1e-3"], "learning_rate: expected 2e-05 as in .*, got 0.001"),
        (["--objective", "JSD(0.3, tail=True)"], "objective: expected None as in .*, got 'JSD"),
        (["--train_file", str(more)], "train_file: expected .*train.jsonl.*, got .*more.jsonl"),
        (["--teacher_model_name_or_path", str(tiny_student)], "teacher_model_name_or_path: expec"),
        (["--model_name_or_path", str(tiny_teacher)], "model_name_or_path: expected "),
        (lora, "use_peft: expected False as in .*, got True"),
        (["--optim", "sgd"], "optim: expected 'adamw_torch_fused' as in .*, got 'sgd'"),
        (["--per_device_train_batch_size", "2"], f"{size}: expected 3 as in .*, got 2"),
        (["--seed", "1"], "seed: expected 42 as in .*, got 1; give --resume false or another"),
    ):
        with pytest.raises(UserError, match=f"^{name}"):
            distill.run([str(path), *flags])
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]
    # what may differ, and the same sequences a step in smaller parts
    parts = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3"]
    told = ["--logging_steps", "2", "--save_steps", "3", "--save_total_limit", "2"]
    distill.run([str(path), *parts, *told])
    assert (out / "settings.json").read_bytes() == begun
    distill.run([str(path), "--seed", "1", "--resume", "false"])
    assert (out / "earlier-1" / "settings.json").read_bytes() == begun
    with pytest.raises(UserError, match="^seed: expected 1 as in .*, got 42"):
        distill.run([str(path)])
    (out / "settings.json").unlink()  # as versions before it left a run
    distill.run([str(path), "--seed", "2", "--max_steps", "3"])
    assert not (out / "settings.json").exists()


def test_a_setting_that_a_library_did_not_have_is_not_compared(setting, tmp_path):
    path, _ = setting
    distill.run([str(path), "--max_steps", "1"])
    place = tmp_path / "out" / "settings.json"
    before = json.loads(place.read_text())
    del before["gamma"]
    place.write_text(json.dumps({**before, "forgotten": 1}))
    distill.run([str(path), "--gamma", "0.5"])
    place.write_text("5")
    with pytest.raises(UserError, match="expected an object in .*settings.json, got 5"):
        distill.run([str(path)])


def test_data_sets_are_called_files_but_where_a_path_has_their_name():
    said = (
        "eval_dataset: expected rows in /data/train_dataset/eval_dataset.jsonl, not train_dataset"
    )
    told = "eval_file: expected rows in /data/train_dataset/eval_dataset.jsonl, not train_file"
    assert distill._of_files(said) == told


def test_settings_are_fields_that_there_are():
    known = {field.name for field in fields(TDConfig)}
    assert not (settings.THEIRS | settings.ELSEWHERE) - known
    assert {"gamma", "objective", "action_top_k", "normaliser"} <= settings.OURS
    assert not {"max_steps", "output_dir", "logging_steps"} & (settings.OURS | settings.THEIRS)


def test_another_model_of_the_same_shape_has_another_fingerprint(tmp_path, tiny_student):
    """Where a file differs in its last quarter alone, too."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        shutil.copytree(tiny_student, folder)
    assert fingerprint(one) == fingerprint(other)
    (weights,) = other.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) * 3 // 4 :] = bytes(len(content) - len(content) * 3 // 4)
    weights.write_bytes(content)
    assert fingerprint(one) != fingerprint(other)


def test_a_folder_of_the_users_own_is_left_alone(setting, tmp_path):
    path, _ = setting
    notes = tmp_path / "out" / "unfinished" / "notes"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    distill.run([str(path), "--max_steps", "1"])
    assert notes.read_text() == "mine"


@pytest.fixture
def refusal(setting, tmp_path, monkeypatch, capsys):
    """The line in which a command refuses records, with exit code 2."""
    path, content = setting

    def of(command, records, *more):
        data = tmp_path / "train.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = [str(path), *more]
        if command == "cache":
            arguments = ["--model", content["teacher_model_name_or_path"], "--data", str(data)]
            arguments += ["--output", str(tmp_path / "cache"), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["tdkd", command, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return of


@pytest.mark.parametrize("command", ["distill", "cache"])
@pytest.mark.parametrize("kind", ["text", "answer"])
def test_data_with_nothing_to_learn_is_refused(refusal, tmp_path, command, kind):
    cut = {**RECORDS[0], "completion": [{"role": "assistant", "content": ""}], "truncated": True}
    records = [{"text": ""} if kind == "text" else cut] * 4
    last = refusal(command, records, "--max_length", "None")
    name, limit = ("data", "-length (1024)") if command == "cache" else ("train_file", "_length (N")
    assert last.startswith(
        f"tdkd: {name}: expected a token to learn that has others before it, got"
    )
    assert f"every response is empty, or cut off at max{limit}" in last
    assert not (tmp_path / "cache").exists()


TURN = [{"role": "user", "content": "say"}]
ANSWER = [{"role": "assistant", "content": "yes"}]
WITHOUT = [{"role": "assistant", "content": None, "tool_calls": None}]
KWARGS = {"chat_template_kwargs": {"mood": "calm"}}


@pytest.mark.parametrize("command", ["distill", "cache"])
@pytest.mark.parametrize(
    "records, message",
    [
        (
            [{"prompt": TURN, "completion": "yes"}],
            "expected prompt and completion of one kind on line 1 of ",
        ),
        (
            [{"prompt": "say", "completion": ANSWER}],
            "expected prompt and completion of one kind on line 1 of ",
        ),
        (
            [{"prompt": TURN, "completion": ANSWER}, {"prompt": TURN, "completion": WITHOUT}],
            "expected messages that the chat template takes in example 1, got ",
        ),
        (
            [{"prompt": TURN, "completion": ANSWER, **more} for more in (KWARGS, {})],
            "expected chat_template_kwargs in every example or in none, got none in example 1",
        ),
        (
            [{"prompt": TURN, "completion": ANSWER, "tools": tools} for tools in ("[]", "{")],
            "tools: expected a list or its JSON, got ",
        ),
        (
            [{"prompt": TURN, "completion": ANSWER * 2, "truncated": True}],
            "completion: expected one message, got 2",
        ),
        (
            [{"prompt": "say", "completion": "yes", "truncated": False}],
            "expected chat messages as prompt and completion where records say truncated, got ",
        ),
    ],
    ids=["chat_text", "text_chat", "null", "kwargs", "tools", "several", "plain"],
)
def test_what_cannot_be_prepared_is_one_line(refusal, command, records, message):
    last = refusal(command, records)
    assert last.startswith(f"tdkd: {'data' if command == 'cache' else 'train_file'}: {message}")
