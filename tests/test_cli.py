"""The command: what it refuses, what works without the extras, what info says."""

import json
import sys

import pytest
from commands import call, one_line

from tdkd.cli import main


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return path


@pytest.mark.parametrize(
    "args,names",
    [
        (["no-such-command"], "no-such-command"),
        (["generate", "--no-such-option"], "--no-such-option"),
        (["generate", "--output", "x"], "--model"),
        (["generate", "--model", "m", "--output", "x", "--seed", "s"], "--seed"),
        (["evaluate", "--model", "m"], "--teacher"),
        (["generate", "--model", "nowhere", "--output", "x"], "model: expected"),
        (["generate", "--model", "m", "--output", "x", "--batch-size", "0"], "batch-size"),
        (["generate", "--model", "m", "--output", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "--model", "m", "--output", "x", "--top-k", "0"], "top-k"),
        (["generate", "--model", "m", "--output", "x", "--temperature", "-1"], "temperature"),
        (["generate", "--model", "m", "--output", "x", "--prompts", "nowhere"], "prompts: exp"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, args, names):
    monkeypatch.chdir(tmp_path)
    code, error = call(monkeypatch, capsys, *args)
    assert code == 2
    assert names in one_line(error)


@pytest.mark.parametrize(
    "content,says",
    [
        ("", "at least one record"),
        ("{\n", "JSON on line 1"),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', "line 2"),
        ('{"question": "a"}\n', '"prompt"'),
        ('{"prompt": "a"}\n', '"completion" or "references"'),
        ('{"prompt": 5}\n', "expected prompt to be a string or chat messages"),
        ('{"prompt": []}\n', "expected prompt to be a string or chat messages"),
        ('{"prompt": [{"content": "a"}]}\n', "expected prompt to be a string or chat messages"),
        ('{"prompt": "a", "completion": []}\n', "expected completion to be"),
        ('{"prompt": "a", "references": "b"}\n', "expected references to be a list"),
        ("\udcff\n", "JSON on line 1"),
    ],
)
def test_broken_data_is_one_line(
    monkeypatch, capsys, tmp_path, tiny_teacher, tiny_student, content, says
):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    code, error = call(
        monkeypatch, capsys, "evaluate", "--model", tiny_student, "--teacher", tiny_teacher,
        "--data", path, "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 2
    assert says in one_line(error)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "option,value",
    [
        ("batch-size", "0"),
        ("max-new-tokens", "0"),
        ("max-examples", "0"),
        ("max-length", "0"),
        ("temperature", "-1"),
        ("samples", "-1"),
        ("device", "no-such-device"),
        ("output", "."),
        ("output", "data.jsonl/out.json"),
    ],
)
def test_evaluate_refuses_options_out_of_range(
    monkeypatch, capsys, tmp_path, tiny_teacher, tiny_student, data, option, value
):
    monkeypatch.chdir(tmp_path)
    options = {"model": tiny_student, "teacher": tiny_teacher, "data": data, "output": "out.json"}
    options[option] = value
    args = [part for name, given in options.items() for part in (f"--{name}", given)]
    code, error = call(monkeypatch, capsys, "evaluate", *args)
    assert code == 2
    assert f"tdkd: {option}: expected" in one_line(error)


@pytest.mark.parametrize("which", ["model", "teacher", "data"])
def test_evaluate_names_the_path_that_is_missing(
    monkeypatch, capsys, tmp_path, tiny_teacher, tiny_student, data, which
):
    paths = {"model": tiny_student, "teacher": tiny_teacher, "data": data, which: "nowhere"}
    options = [part for name, path in paths.items() for part in (f"--{name}", path)]
    code, error = call(monkeypatch, capsys, "evaluate", *options, "--output", tmp_path / "out.json")
    assert code == 2
    assert f"{which}: expected" in one_line(error)


def test_info_names_versions_and_implementations(monkeypatch, capsys):
    import torch

    import tdkd

    monkeypatch.setattr(sys, "argv", ["tdkd", "info"])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert not stop.value.code
    for word in (tdkd.__version__, torch.__version__, "transformers", "reference"):
        assert word in out
