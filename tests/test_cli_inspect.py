"""tdkd inspect: every number against a sorted softmax."""

import json
import math

import pytest
import torch

from tdkd import records
from tdkd.cli import inspect as command
from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer

pytest.importorskip("transformers")

DATA = [
    {"prompt": "why?", "completion": "because"},
    {"prompt": "zig", "completion": "zag zig", "truncated": True},
    {"prompt": "a longer question", "completion": "no"},
]
OPTIONS = {
    "output": None,
    "max_examples": None,
    "mass": 0.95,
    "gamma": 0.99,
    "max_k": 1024,
    "teacher_temperature": 1.0,
    "vocab_size": None,
    "max_length": 512,
    "batch_size": 2,
    "max_new_tokens": 4,
    "seed": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    model = load_model(tiny_teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a teacher that is sure of some things
    return model


@pytest.fixture(scope="module")
def unsure(tiny_teacher):
    """Its half likeliest takes some thirty tokens."""
    return load_model(tiny_teacher)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


def naive(teacher, tokenizer, temperature=1.0, vocab_size=None):
    rows = []
    for record in DATA:
        prompt, completion = records.Chat(tokenizer).encode(record, 512)
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + completion])).logits[0].double()
        of_answer = logits[len(prompt) - 1 : -1, :vocab_size] / temperature
        rows.append(of_answer.softmax(-1))
    return torch.cat(rows).sort(-1, descending=True).values


@pytest.mark.parametrize(
    "options", [{}, {"teacher_temperature": 2.0, "vocab_size": 40, "gamma": 0.9}], ids=["", "more"]
)
def test_mass_sizes_and_cuts(teacher, tokenizer, options):
    result = command.inspect(teacher, tokenizer, DATA, batch_size=2, mass=0.6, **options)
    p = naive(
        teacher, tokenizer, options.get("teacher_temperature", 1.0), options.get("vocab_size")
    )
    horizon = 9 if "gamma" in options else 99
    assert result["positions"] == p.shape[0]
    assert result["looked_at"] == p.shape[1]
    for k, mass in result["mass"].items():
        held = p[:, : int(k)].sum(-1)
        assert mass == pytest.approx(float(held.mean()), abs=1e-5)
        expected = -horizon * float(held.log().mean())
        assert result["kappa"][k] == pytest.approx(expected, abs=horizon * 1e-5)
    for top_p, found in result["sets"].items():
        size = torch.tensor(
            [int((row.cumsum(0) < float(top_p) * (1 - 1e-5)).sum()) + 1 for row in p]
        ).double()
        assert found["mean"] == pytest.approx(float(size.mean()))
        assert found["median"] == size.quantile(0.5, interpolation="higher")
        assert found["kappa"] == pytest.approx(-horizon * math.log(float(top_p)))
        assert found["beyond"] == 0
        for k, share in found["cut"].items():
            assert share == pytest.approx(float((size > int(k)).double().mean()))
            held = [row[: min(int(n), int(k))].sum() for row, n in zip(p, size, strict=True)]
            expected = -horizon * float(torch.stack(held).log().mean())
            assert found["kappa_cut"][k] == pytest.approx(expected, abs=horizon * 1e-5)
    assert result["recommended"]["action_top_p"] == 1
    k = result["recommended"]["action_top_k"]
    assert result["mass"][str(k)] >= 0.6
    assert k == 1 or result["mass"][str(k // 2)] < 0.6


def test_where_k_cuts_the_nominal_kappa_is_no_bound(unsure, tokenizer):
    result = command.inspect(unsure, tokenizer, DATA, max_k=4)
    of_p = result["sets"]["0.5"]
    assert of_p["cut"]["4"] == 1
    assert of_p["kappa_cut"]["4"] > of_p["kappa"]


def test_a_k_that_is_too_small_everywhere(unsure, tokenizer, capsys):
    result = command.inspect(unsure, tokenizer, DATA, max_k=1)
    assert result["recommended"] == {"action_top_k": None, "action_top_p": 1.0}
    found = result["sets"]["0.5"]
    # larger than what was looked at
    assert [found[name] for name in ("mean", "median", "p95", "beyond")] == [2, 2, 2, 1]
    command._show(result, 0.95)
    said = capsys.readouterr().out
    assert "the 1 likeliest tokens hold less than 0.95" in said
    table = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    (line,) = (cells for cells in table if cells[1:2] == ["0.5"])
    assert line[2:5] == [">2", ">1", ">1"]


def test_without_discount_there_is_no_bound_but_of_everything(teacher, tokenizer, tmp_path):
    columns = teacher.lm_head.weight.shape[0]
    power = 2 ** (columns.bit_length() - 1)
    result = command.inspect(teacher, tokenizer, DATA, gamma=1.0, vocab_size=power)
    kappas = list(result["kappa"].values())
    assert kappas[0] is None
    assert kappas[-1] == 0
    assert {of_p["kappa"] for of_p in result["sets"].values()} == {None}
    json.dumps(result, allow_nan=False)
    command._show(result, 0.95)
    pytest.importorskip("matplotlib")
    command._draw(result, tmp_path / "some.png")
    # a set of the whole vocabulary loses nothing, whatever the discount
    assert command._kappa(1.0, -math.log(1.0)) == 0
    assert command._kappa(0.99, 1e-9) == 0


def test_the_tables_fit_a_terminal_of_80_columns(teacher, tokenizer, capsys):
    """Sizes beyond 1,000, and kappas without a bound."""
    result = command.inspect(teacher, tokenizer, DATA)
    numbers = {str(2**i): 0.5 for i in range(11)}
    bounds = dict.fromkeys(numbers)
    sizes = {"mean": 1020.3, "median": 12345.0, "p95": 1025.0, "beyond": 0.5, "kappa": None}
    result |= {"positions": 1234567, "looked_at": 1024, "mass": numbers, "kappa": bounds}
    result["sets"] = {"0.99": {**sizes, "cut": numbers, "kappa_cut": bounds}}
    result["recommended"]["action_top_k"] = 1024
    command._show(result, 0.95)
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80
    for text in ("1,234,567 positions", "cut at 1,024", ">1,020", ">1,024", "no bound", "50.0%"):
        assert text in said


def test_prompts_alone_are_answered(teacher, tokenizer):
    data = [{"prompt": "why?"}, {"prompt": "zig zag"}]
    result = command.inspect(teacher, tokenizer, data, max_new_tokens=4)
    assert 2 <= result["positions"] <= 8


def test_the_command(tiny_teacher, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, output = tmp_path / "data.jsonl", tmp_path / "inspect.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in DATA))
    command.run(
        model=str(tiny_teacher), data=str(data), **{**OPTIONS, "output": str(output), "gamma": 1.0}
    )

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    written = json.loads(output.read_text(), parse_constant=refuse)
    assert written["examples"] == 3
    said = capsys.readouterr().out
    assert f"action_top_k: {written['recommended']['action_top_k']}" in said
    assert (tmp_path / "inspect.png").stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "data.jsonl",
        "inspect.json",
        "inspect.png",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mass": 0.0}, r"mass: expected a number in \(0, 1\], got 0.0"),
        ({"teacher_temperature": 0.0}, "teacher-temperature: expected a number > 0, got 0.0"),
        ({"vocab_size": 10**6}, "vocab-size: expected 1 to .*columns of the teacher, got 1000000"),
        ({"gamma": 2.0}, r"gamma: expected a number in \[0, 1\], got 2.0"),
        ({"output": "stats.png"}, "output: expected a file of JSON, .*got stats.png"),
        ({"max_k": 0}, "max-k: expected a number >= 1, got 0"),
        ({"max_new_tokens": 500}, "max-new-tokens: expected sequences of at most 512 tokens"),
        ({"max_length": 3}, "data: expected responses within max-length 3, got none"),
    ],
)
def test_what_it_refuses(tiny_teacher, tmp_path, options, message):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(DATA[0]) + "\n")
    if "max_new_tokens" in options:
        data.write_text(json.dumps({"prompt": "why?"}) + "\n")
    with pytest.raises(UserError, match=message):
        command.run(model=str(tiny_teacher), data=str(data), **{**OPTIONS, **options})


def test_prompts_without_room_for_an_answer_are_not_asked(teacher, tokenizer, monkeypatch):
    asked = []
    real = command.sample
    monkeypatch.setattr(
        command, "sample", lambda *args, **kw: asked.extend(args[2]) or real(*args, **kw)
    )
    size = len(records.Chat(tokenizer).prompt({"prompt": "why?"}))
    data = [{"prompt": "why?"}, {"prompt": "why??"}, {"prompt": "x" * 500}]
    result = command.inspect(teacher, tokenizer, data, max_length=size + 1, max_new_tokens=4)
    assert [len(prompt) for prompt in asked] == [size]
    assert result["positions"] == 1
