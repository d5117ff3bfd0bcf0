"""What serving engines return becomes a cache: both forms of log-probabilities, ids and text."""

import json
import math

import numpy as np
import pytest
import torch

from tdkd import logprobs, ops, records
from tdkd.cache import Cache
from tdkd.cli import cache as command
from tdkd.errors import UserError
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer

K, P = 4, 0.95
ANSWER = "the tin"


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_tokenizer(str(tiny_teacher), chat=True)


@pytest.fixture(scope="module")
def served(tiny_teacher, tokenizer):
    """Prompt, taken tokens, and the teacher's top 20 log-probabilities there: (id, value) pairs."""
    model = load_model(str(tiny_teacher))
    prompt = records.prompt_ids("hello", tokenizer)
    taken = tokenizer(ANSWER, add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + taken])
    with torch.inference_mode():
        hidden = last_hidden_state(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        log_p = lm_head(model).logits(hidden[0]).double().log_softmax(-1)
    rows = log_p[len(prompt) - 1 : -1]
    top = [[(int(i), float(x)) for x, i in zip(*row.topk(20), strict=True)] for row in rows]
    own = [float(row[token]) for row, token in zip(rows, taken, strict=True)]
    return {"prompt": prompt, "taken": taken, "own": own, "top": top, "rows": rows}


def chat(served, name, finish="stop"):
    """An OpenAI-style chat completion."""
    content = [
        {
            "token": name(token), "logprob": own, "bytes": None,
            "top_logprobs": [{"token": name(i), "logprob": x} for i, x in top],
        }
        for token, own, top in zip(served["taken"], served["own"], served["top"], strict=True)
    ]  # fmt: skip
    choice = {"finish_reason": finish, "logprobs": {"content": content}}
    return {"model": "big", "choices": [choice]}


def completion(served, name, finish="stop"):
    """A completion as vLLM has it."""
    columns = {
        "tokens": [name(token) for token in served["taken"]],
        "token_logprobs": served["own"],
        "top_logprobs": [{name(i): x for i, x in top} for top in served["top"]],
    }
    return {"model": "big", "choices": [{"finish_reason": finish, "logprobs": columns}]}


def read(tmp_path, tokenizer, *lines, k=K, top_p=P, max_length=100):
    path = tmp_path / "served.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(logprobs.read(path, tokenizer, k=k, top_p=top_p, max_length=max_length))


def by_id(token):
    return f"token_id:{token}"


@pytest.mark.parametrize("form", [chat, completion])
@pytest.mark.parametrize("names", ["ids", "text"])
def test_sets_are_those_of_the_teacher(tmp_path, tokenizer, served, form, names):
    name = by_id if names == "ids" else lambda i: tokenizer.decode([i])
    asked = (
        {"messages": [{"role": "user", "content": "hello"}]}
        if form is chat
        else {"prompt": tokenizer.decode(served["prompt"])}
    )
    (example,) = read(tmp_path, tokenizer, {**asked, **form(served, name, "length")})
    assert example.input_ids.tolist() == served["prompt"] + served["taken"]
    assert example.mask.tolist() == [False] * len(served["prompt"]) + [True] * len(served["taken"])
    wanted = ops.select_actions(
        served["rows"], K, P, include=torch.tensor(served["taken"]), impl="reference"
    )
    if names == "text":
        # bytes of 128 and more are no text by themselves: they count as mass outside
        known = [[x for x in top if tokenizer.decode(x[0]) != "\ufffd"] for top in served["top"]]
        assert any(len(some) < len(top) for some, top in zip(known, served["top"], strict=True))
        kept = {**served, "top": known}
        (expected,) = read(tmp_path, tokenizer, {**asked, **form(kept, by_id, "length")})
        assert example.count.tolist() == expected.count.tolist()
        assert example.ids.tolist() == expected.ids.tolist()
        assert example.log_probs.tolist() == expected.log_probs.tolist()
        return
    held = wanted.valid
    assert example.count.tolist() == wanted.count.tolist()
    assert example.ids.tolist() == wanted.ids[held].tolist()
    np.testing.assert_allclose(example.log_probs, wanted.log_probs[held], rtol=1e-6)
    np.testing.assert_allclose(np.exp(example.log_tail), 1 - wanted.mass, rtol=1e-5)


def test_the_end_of_a_finished_answer_is_certain(tmp_path, tokenizer, served):
    cut, whole = read(
        tmp_path, tokenizer,
        {"prompt": "hello", **chat(served, by_id, "length")},
        {"prompt": "hello", "response": {"body": chat(served, by_id)}},
    )  # fmt: skip
    eos = tokenizer.eos_token_id
    assert whole.input_ids.tolist() == [*cut.input_ids.tolist(), eos]
    assert whole.count.tolist() == [*cut.count.tolist(), 1]
    assert whole.ids[-1] == eos
    assert whole.log_probs[-1] == 0
    # a server that tells of the end token is believed
    ended = {**served, "taken": [*served["taken"], eos], "own": [*served["own"], -0.5]}
    ended["top"] = [*served["top"], [(eos, -0.5), (65, -1.5)]]
    (told,) = read(tmp_path, tokenizer, {"prompt": "hello", **chat(ended, by_id)})
    assert told.ids[-2:].tolist() == [eos, 65]
    assert told.log_probs[-2:].tolist() == [-0.5, -1.5]


def test_a_cache_of_a_served_teacher(tmp_path, tiny_teacher, tokenizer, served):
    path = tmp_path / "served.jsonl"
    path.write_text(json.dumps({"prompt": "hello", **chat(served, by_id)}) + "\n")
    options = {
        "model": None, "data": None, "served": str(path), "tokenizer": str(tiny_teacher),
        "output": str(tmp_path / "c"), "action_top_k": K, "action_top_p": P,
        "teacher_temperature": 1.0, "max_length": 100, "tail": True, "log_probs": "float16",
        "model_dtype": "float32", "batch_size": 1, "shard_examples": 1, "device": "cpu",
    }  # fmt: skip
    command.run(**options)
    made = Cache(tmp_path / "c")
    assert made.manifest.teacher == {"name": "big", "sha256": None}
    made.check_tokenizer(tokenizer, "tokenizer")
    example = made.dataset()[0]
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    got = made.sets(np.arange(made.manifest.states))
    assert got.ids[-1, 0] == tokenizer.eos_token_id
    mass = [math.exp(x[0][1]) for x in served["top"]]
    np.testing.assert_allclose(got.log_probs[:-1, 0].exp(), mass, rtol=5e-3)
    with pytest.raises(UserError, match="teacher-temperature: expected 1 beside --served"):
        command.run(**{**options, "teacher_temperature": 2.0})
    with pytest.raises(UserError, match="tokenizer: expected the directory of the student's"):
        command.run(**{**options, "tokenizer": None})


def test_lines_that_cannot_be_read_are_named(tmp_path, tokenizer, served):
    good = {"prompt": "hello", **chat(served, by_id)}
    with pytest.raises(UserError, match=r"served: expected choices with logprobs .* on line 2 of"):
        read(tmp_path, tokenizer, good, {"prompt": "hello", "choices": []})
    with pytest.raises(
        UserError, match=r"expected a prompt or messages on line 1 of .*got choices"
    ):
        read(tmp_path, tokenizer, chat(served, by_id))
    odd = json.loads(json.dumps(good).replace(by_id(served["taken"][0]), "<no such token>"))
    with pytest.raises(UserError, match=r"every taken token .*got '<no such token>'; let the"):
        read(tmp_path, tokenizer, odd)
    odd = json.loads(json.dumps(good).replace(by_id(served["taken"][0]), "token_id:999999"))
    with pytest.raises(UserError, match="every taken token .*got 'token_id:999999'"):
        read(tmp_path, tokenizer, odd)
    loud = {**served, "own": [3.0, *served["own"][1:]]}
    with pytest.raises(UserError, match=r"expected log-probabilities, of at most 0, on line 1"):
        read(tmp_path, tokenizer, {"prompt": "hello", **chat(loud, by_id)})
    with pytest.raises(UserError, match="expected an answer that begins within 3 tokens"):
        read(tmp_path, tokenizer, good, max_length=3)
