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
    "top_p": 0.8,
    "cut": 0.05,
    "gamma": 0.99,
    "max_k": 1024,
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
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


def naive(teacher, tokenizer):
    rows = []
    for record in DATA:
        prompt, completion = records.encode(record, tokenizer, 512)
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + completion])).logits[0].double()
        rows.append(logits[len(prompt) - 1 : -1].softmax(-1))
    return torch.cat(rows).sort(-1, descending=True).values


def test_mass_sizes_and_cuts(teacher, tokenizer):
    result = command.inspect(teacher, tokenizer, DATA, batch_size=2, top_p=0.9)
    p = naive(teacher, tokenizer)
    assert result["positions"] == p.shape[0]
    for k, mass in result["mass"].items():
        assert mass == pytest.approx(float(p[:, : int(k)].sum(-1).mean()), abs=1e-5)
    for top_p, found in result["sets"].items():
        size = torch.tensor(
            [int((row.cumsum(0) < float(top_p) * (1 - 1e-5)).sum()) + 1 for row in p]
        ).double()
        assert found["mean"] == pytest.approx(float(size.mean()))
        assert found["median"] == pytest.approx(float(size.quantile(0.5)))
        assert found["kappa"] == pytest.approx(-99 * math.log(float(top_p)))
        for k, share in found["cut"].items():
            assert share == pytest.approx(float((size > int(k)).double().mean()))
    k = result["recommended"]["action_top_k"]
    cuts = result["sets"]["0.9"]["cut"]
    assert cuts[str(k)] <= 0.05
    assert cuts[str(k // 2)] > 0.05


def test_a_k_that_is_too_small_everywhere(teacher, tokenizer):
    result = command.inspect(teacher, tokenizer, DATA, max_k=1, cut=0.0, top_p=1.0)
    assert result["recommended"] == {"action_top_k": None, "action_top_p": 1.0}
    assert result["sets"]["1"]["kappa"] == 0
    assert 1 < result["sets"]["1"]["mean"] <= 2  # 2: larger than what was looked at


def test_prompts_alone_are_answered(teacher, tokenizer):
    data = [{"prompt": "why?"}, {"prompt": "zig zag"}]
    result = command.inspect(teacher, tokenizer, data, max_new_tokens=4)
    assert 2 <= result["positions"] <= 8


def test_the_command(tiny_teacher, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, output = tmp_path / "data.jsonl", tmp_path / "inspect.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in DATA))
    command.run(
        model=str(tiny_teacher), data=str(data), **{**OPTIONS, "output": str(output), "cut": 0.2}
    )
    written = json.loads(output.read_text())
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
        ({"top_p": 0.0}, r"top-p: expected a number in \(0, 1\], got 0.0"),
        ({"cut": 1.0}, r"cut: expected a number in \[0, 1\), got 1.0"),
        ({"gamma": 2.0}, r"gamma: expected a number in \[0, 1\], got 2.0"),
        ({"max_k": 0}, "max-k: expected a number >= 1, got 0"),
        ({"max_length": 3}, "data: expected responses within max-length 3, got none"),
    ],
)
def test_what_it_refuses(tiny_teacher, tmp_path, options, message):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(DATA[0]) + "\n")
    with pytest.raises(UserError, match=message):
        command.run(model=str(tiny_teacher), data=str(data), **{**OPTIONS, **options})
