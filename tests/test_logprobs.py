"""What serving engines return becomes a cache: both forms of log-probabilities, ids and text."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from tdkd import logprobs, ops, records
from tdkd.cache import Cache, template_hash
from tdkd.cli import cache as command
from tdkd.errors import UserError
from tdkd.models import eos_beside, last_hidden_state, lm_head, load_model, load_tokenizer

K, P = 4, 0.95
ANSWER = "the tin"


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_tokenizer(str(tiny_teacher), chat=True)


@pytest.fixture(scope="module")
def served(tiny_teacher, tokenizer):
    """Prompt, taken tokens, and the teacher's top 20 log-probabilities there: (id, value) pairs."""
    model = load_model(str(tiny_teacher))
    prompt = records.Chat(tokenizer).prompt({"prompt": "hello"})
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


def read(tmp_path, tokenizer, *lines, k=K, top_p=P, max_length=100, **options):
    path = tmp_path / "served.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return list(logprobs.read(path, tokenizer, k=k, top_p=top_p, max_length=max_length, **options))


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


@pytest.mark.parametrize("form", [chat, completion])
def test_a_server_without_alternatives(tmp_path, tokenizer, served, form):
    """A set is the taken token: what is not told of the others is mass outside."""
    alone = {**served, "top": [[] for _ in served["taken"]]}
    (example,) = read(
        tmp_path, tokenizer, {"prompt": "hello", **form(alone, by_id, "length")}, k=1, top_p=1.0
    )
    assert example.count.tolist() == [1] * len(served["taken"])
    assert example.ids.tolist() == served["taken"]
    np.testing.assert_allclose(example.log_probs, served["own"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(example.log_tail), 1 - np.exp(served["own"]), rtol=1e-5)


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


def test_an_end_is_added_where_the_model_ended_alone(tmp_path, tokenizer, served):
    """Not after a stop string, and not after another token that ends answers."""
    eos = tokenizer.eos_token_id
    line = {"prompt": "hello", **chat(served, by_id)}

    def last(taken, **choice):
        own = {**served, "taken": taken}
        own |= {name: served[name][: len(taken)] for name in ("own", "top")}
        ended = {"prompt": "hello", **chat(own, by_id)}
        ended["choices"][0].update(choice)
        (example,) = read(tmp_path, tokenizer, ended, eos=[0])
        return example.input_ids.tolist()[len(served["prompt"]) :]

    some = served["taken"][:2]
    assert last(some) == [*some, eos]
    assert last(some, stop_reason=None) == [*some, eos]
    assert last(some, stop_reason="\n\n") == some
    assert last(some, stop_reason=7) == some
    assert last([*some, 0]) == [*some, 0]
    assert last([*some, 0], stop_reason=0) == [*some, 0]
    assert len(read(tmp_path, tokenizer, line)[0].count) == len(served["taken"]) + 1


def test_every_choice_is_an_answer(tmp_path, tokenizer, served):
    line = {"prompt": "hello", **chat(served, by_id)}
    short = {**served, "taken": served["taken"][:3], "own": served["own"][:3]}
    line["choices"] += chat({**short, "top": served["top"][:3]}, by_id, "length")["choices"]
    long, cut = read(tmp_path, tokenizer, line)
    assert long.input_ids.tolist()[:-5] == cut.input_ids.tolist()
    assert len(cut.count) == 3


@pytest.mark.parametrize("unknown", [-math.inf, -9999.0, None])
def test_tokens_without_a_log_probability_are_not_learned(tmp_path, tokenizer, served, unknown):
    """What a server does not tell is no probability: not of the taken token, nor of another."""
    odd = {**served, "own": list(served["own"]), "top": [list(top) for top in served["top"]]}
    odd["top"][1] = [odd["top"][1][0], (5, -9999.0), (6, -math.inf)]
    odd["own"][2] = unknown
    left = logprobs.Left()
    line = {"prompt": "hello", **completion(odd, by_id, "length")}
    line["prompt"] = tokenizer.decode(served["prompt"])
    (example,) = read(tmp_path, tokenizer, line, left=left)
    start = len(served["prompt"])
    assert example.input_ids.tolist() == served["prompt"] + served["taken"]
    learned = example.mask.tolist()[start:]
    assert learned == [i != 2 for i in range(len(served["taken"]))]
    assert len(example.count) == len(example.log_tail) == sum(learned)
    assert np.isfinite(example.log_probs).all()
    assert example.log_probs.min() > -100
    assert (left.answers, left.states) == (0, 1)
    assert "1 states left out" in str(left)
    line["choices"][0]["logprobs"]["token_logprobs"] = [-9999.0] * len(served["taken"])
    with pytest.raises(UserError, match="a log-probability of a taken token, on line 1 of"):
        read(tmp_path, tokenizer, line)


def test_a_prompt_of_another_length_is_another_prompt(tmp_path, tokenizer, served):
    line = {"prompt": "hello", **chat(served, by_id)}
    line["usage"] = {"prompt_tokens": len(served["prompt"])}
    read(tmp_path, tokenizer, line)
    line["usage"] = {"prompt_tokens": len(served["prompt"]) + 3}
    words = f"the {len(served['prompt'])} tokens of .*chat template.*on line 1 of .*got usage"
    with pytest.raises(UserError, match=words):
        read(tmp_path, tokenizer, line)


def test_lines_that_cannot_be_used_are_left_out(tmp_path, tokenizer, served):
    good = {"prompt": "hello", **chat(served, by_id)}
    left = logprobs.Left()
    lines = [
        {"prompt": "hello", "response": None, "error": {"code": "timeout"}},
        good,
        '{"prompt": "torn',
        {"prompt": [{"role": 1}], **chat(served, by_id)},
        {"prompt": [70, 71], **chat(served, by_id)},
        good,
    ]
    assert len(read(tmp_path, tokenizer, *lines, left=left)) == 2
    assert left.answers == 4
    assert "expected choices with logprobs of tokens on line 1 of" in str(left)
    assert str(left).startswith("4 answers left out, the first since served: expected")
    assert logprobs.model_name(tmp_path / "served.jsonl") == "big"
    with pytest.raises(UserError, match=r"expected JSON on line 1 of .*; no answer of the file"):
        read(tmp_path, tokenizer, lines[2], lines[0])
    with pytest.raises(UserError, match="served: expected at least one answer in .*, got none"):
        read(tmp_path, tokenizer)


ASKED = [{"role": "user", "content": "hello"}]
TOLD = [{"role": "assistant", "content": ANSWER}]


@pytest.fixture(scope="module")
def scored(tiny_teacher, tokenizer):
    """The tokens of a prompt with an answer, where that begins, and all log-probabilities."""
    text = tokenizer.apply_chat_template(ASKED + TOLD, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    model = load_model(str(tiny_teacher))
    ids = torch.tensor([whole])
    with torch.inference_mode():
        hidden = last_hidden_state(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        log_p = lm_head(model).logits(hidden[0]).double().log_softmax(-1)
    return whole, len(records.Chat(tokenizer).prompt({"prompt": "hello"})), log_p


def told(scored, name):
    """For each token: itself first, and the 20 likeliest."""
    whole, _, log_p = scored
    found = [None]
    for taken, row in zip(whole[1:], log_p, strict=False):
        likely = {int(i): float(x) for x, i in zip(*row.topk(20), strict=True)}
        found.append({name(i): float(row[i]) for i in [taken, *likely]})
    return found


def of_vllm(scored, *, chat_form):
    listed = [
        position and {str(i): {"logprob": x, "rank": 1, "decoded_token": "?"}
                      for i, x in position.items()}
        for position in told(scored, int)
    ]  # fmt: skip
    choice = {"finish_reason": "length", "logprobs": None}
    body = {"choices": [choice, dict(choice)], "usage": {"prompt_tokens": len(scored[0])}}
    (body if chat_form else choice)["prompt_logprobs"] = listed
    return body


def of_echo(scored, name, extra=1):
    """With a token more, where the server has to write one."""
    whole, tops = scored[0], told(scored, name)
    columns = {
        "tokens": [name(i) for i in whole] + [name(70)] * extra,
        "token_logprobs": [top and top[name(i)] for i, top in zip(whole, tops, strict=True)],
        "top_logprobs": tops + [{name(70): -0.1}] * extra,
    }
    columns["token_logprobs"] += [-0.1] * extra
    choice = {"finish_reason": "length", "logprobs": columns}
    return {"choices": [choice], "usage": {"prompt_tokens": len(whole)}}


@pytest.mark.parametrize("form", ["chat", "completion", "echo", "echo by text", "texts"])
def test_answers_that_were_there_before(tmp_path, tokenizer, scored, form):
    """Sets of the teacher at the tokens of the answer, its end included."""
    whole, start, log_p = scored
    line = {"prompt": ASKED, "completion": TOLD}
    if form in ("chat", "completion"):
        line |= of_vllm(scored, chat_form=form == "chat")
    else:
        name = (lambda i: tokenizer.decode([i])) if form == "echo by text" else by_id
        line |= of_echo(scored, name, extra=form != "texts")
    if form == "texts":
        line["prompt"], line["completion"] = (
            tokenizer.decode(part) for part in (whole[:start], whole[start:])
        )
    (example,) = read(tmp_path, tokenizer, line)
    assert example.input_ids.tolist() == whole
    assert tokenizer.eos_token_id in example.input_ids[start:]
    assert example.mask.tolist() == [i >= start for i in range(len(whole))]
    if form == "echo by text":
        return
    wanted = ops.select_actions(
        log_p[start - 1 : -1], K, P, include=torch.tensor(whole[start:]), impl="reference"
    )
    assert example.ids.tolist() == wanted.ids[wanted.valid].tolist()
    np.testing.assert_allclose(example.log_probs, wanted.log_probs[wanted.valid], rtol=1e-5)


@pytest.mark.parametrize("form", ["messages", "text"])
def test_an_answer_that_was_cut_has_no_end_to_learn(tmp_path, tokenizer, scored, form):
    """What the template writes behind it was not the model's."""
    whole, start, _ = scored
    told = TOLD if form == "messages" else TOLD[0]["content"]
    line = {"prompt": ASKED, "completion": told, **of_vllm(scored, chat_form=True)}
    (example,) = read(tmp_path, tokenizer, {**line, "truncated": True})
    size = start + len(tokenizer(TOLD[0]["content"], add_special_tokens=False).input_ids)
    assert example.input_ids.tolist() == whole[:size]
    assert tokenizer.eos_token_id not in example.input_ids[start:]
    assert example.mask.tolist() == [i >= start for i in range(size)]
    (example,) = read(tmp_path, tokenizer, {**line, "truncated": False})
    assert example.input_ids.tolist() == whole
    with pytest.raises(UserError, match="^served: truncated: expected true .*got 'yes' on line 1"):
        read(tmp_path, tokenizer, {**line, "truncated": "yes"})


def test_a_cut_answer_that_the_template_changes_is_refused(tmp_path, tiny_teacher, scored):
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content']|upper"
    )
    line = {"prompt": ASKED, "completion": TOLD, "truncated": True}
    line |= of_vllm(scored, chat_form=True)
    with pytest.raises(UserError, match="write an answer that was cut as its prompt, and then"):
        # the server's tokens are taken for the template's
        read(tmp_path, tokenizer, relabelled(line, tokenizer))


def relabelled(line, tokenizer):
    """As a server would have scored what this tokenizer's template makes of a conversation."""
    text = tokenizer.apply_chat_template(line["prompt"] + line["completion"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    listed = [None, *({str(i): {"logprob": -1.0}} for i in ids[1:])]
    return {**line, "prompt_logprobs": listed, "usage": {"prompt_tokens": len(ids)}}


def test_what_a_template_is_told_beside_the_messages(tmp_path, tiny_teacher, served):
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{{ mood }}" + tokenizer.chat_template
    )
    told = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    prompt = records.Chat(tokenizer).prompt({"prompt": "hello", **told})
    assert tokenizer.decode(prompt).startswith("fcalm<|im_start|>")
    line = {"prompt": "hello", **told, **chat(served, by_id)}
    line["usage"] = {"prompt_tokens": len(prompt)}
    (example,) = read(tmp_path, tokenizer, line)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    scored = relabelled({"prompt": ASKED, "completion": TOLD, **told, "choices": [{}]}, tokenizer)
    with pytest.raises(UserError, match="got usage.prompt_tokens"):  # the server was told nothing
        read(tmp_path, tokenizer, scored)
    with pytest.raises(
        UserError, match="^served: tools: expected a list or its JSON, .* on line 1"
    ):
        read(tmp_path, tokenizer, {**line, "tools": "{"})


def test_answers_of_another_tokenizer_or_template(tmp_path, tokenizer, scored):
    whole = scored[0]
    line = {"prompt": ASKED, "completion": TOLD, **of_vllm(scored, chat_form=True)}
    other = json.loads(json.dumps(line))
    other["usage"]["prompt_tokens"] += 1
    with pytest.raises(
        UserError, match=f"expected the {len(whole)} tokens of the tokenizer and it"
    ):
        read(tmp_path, tokenizer, other)
    other = json.loads(json.dumps(line))
    other["prompt_logprobs"].append(None)
    with pytest.raises(UserError, match="expected prompt_logprobs of the tokens .*ValueError: "):
        read(tmp_path, tokenizer, other)
    other = json.loads(json.dumps(line))
    del other["prompt_logprobs"][-1][str(whole[-1])]
    with pytest.raises(UserError, match="expected prompt_logprobs of the tokens .*KeyError: "):
        read(tmp_path, tokenizer, other)
    echo = {"prompt": ASKED, "completion": TOLD, **of_echo(scored, by_id)}
    echo["choices"][0]["logprobs"]["tokens"][1] = by_id(9)
    with pytest.raises(UserError, match=f"expected the {len(whole)} tokens that the tokenizer and"):
        read(tmp_path, tokenizer, echo)
    with pytest.raises(UserError, match="prompt and completion as strings or chat messages"):
        read(tmp_path, tokenizer, {**line, "completion": 3})


def test_an_echo_is_cut_off(tmp_path, tokenizer, served, scored):
    """A prompt that comes back before a new answer."""
    asked = tokenizer.decode(served["prompt"])
    line = {"prompt": asked, **completion(served, by_id, "length")}
    (plain,) = read(tmp_path, tokenizer, line)
    columns = line["choices"][0]["logprobs"]
    size = len(served["prompt"])
    columns["tokens"] = [*map(by_id, served["prompt"]), *columns["tokens"]]
    columns["token_logprobs"] = [None, *[-1.0] * (size - 1), *columns["token_logprobs"]]
    columns["top_logprobs"] = [None, *[{by_id(7): -1.0}] * (size - 1), *columns["top_logprobs"]]
    (echoed,) = read(tmp_path, tokenizer, line)
    for a, b in zip(plain, echoed, strict=True):
        assert a.tolist() == b.tolist()


def test_a_cache_of_a_served_teacher(tmp_path, tiny_teacher, tokenizer, served, capsys):
    path = tmp_path / "served.jsonl"
    path.write_text(json.dumps({"prompt": "hello", **chat(served, by_id)}) + "\n{}\n")
    options = {
        "model": None, "data": None, "served": str(path), "tokenizer": str(tiny_teacher),
        "output": str(tmp_path / "c"), "action_top_k": K, "action_top_p": P,
        "teacher_temperature": 1.0, "max_length": 100, "tail": True, "log_probs": "float16",
        "model_dtype": "auto", "vocab_size": None, "assistant_only_loss": False, "batch_size": 1,
        "shard_examples": 1, "device": "cpu",
    }  # fmt: skip
    command.run(**options)
    made = Cache(tmp_path / "c")
    assert "1 answers left out, the first since served: expected cho" in capsys.readouterr().err
    assert made.manifest.teacher == {"name": "big", "sha256": None}
    assert made.manifest.chat_template == template_hash(tokenizer)
    # nobody knows the columns of its head: the student's 264 hold the tokenizer's 259
    made.check_vocabulary(264, "model")
    with pytest.raises(UserError, match="model: expected the 259 columns"):
        made.check_vocabulary(258, "model")
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
    for option in ({"vocab_size": 264}, {"assistant_only_loss": True}):
        with pytest.raises(UserError, match="served: expected neither --vocab-size nor --assist"):
            command.run(**{**options, **option})


def test_only_chats_need_a_template(tmp_path, tiny_teacher, served):
    """Plain completions come without one, and say nothing of it in the manifest."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_teacher, bare)
    for path in bare.glob("chat_template*"):
        path.unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "served.jsonl"
    options = {
        "model": None, "data": None, "served": str(path), "action_top_k": K, "action_top_p": P,
        "teacher_temperature": 1.0, "max_length": 100, "tail": True, "log_probs": "float16",
        "model_dtype": "auto", "vocab_size": None, "assistant_only_loss": False, "batch_size": 1,
        "shard_examples": 1, "device": "cpu",
    }  # fmt: skip
    path.write_text(json.dumps({"prompt": "hello", **completion(served, by_id)}) + "\n")
    for name, tokenizer in (("none", bare), ("one", tiny_teacher)):
        command.run(**options, tokenizer=str(tokenizer), output=str(tmp_path / name))
        assert Cache(tmp_path / name).manifest.chat_template is None
    for asked in ({"prompt": "hello"}, {"messages": ASKED}):
        path.write_text(json.dumps({**asked, **chat(served, by_id)}) + "\n")
        with pytest.raises(UserError, match="^tokenizer: expected a tokenizer with a chat temp"):
            command.run(**options, tokenizer=str(bare), output=str(tmp_path / "chat"))


def test_a_file_that_cannot_be_used_begins_no_cache(tmp_path, tiny_teacher, served):
    path, output = tmp_path / "served.jsonl", tmp_path / "c"
    options = {
        "model": None, "data": None, "served": str(path), "tokenizer": str(tiny_teacher),
        "output": str(output), "action_top_k": K, "action_top_p": P, "teacher_temperature": 1.0,
        "tail": True, "log_probs": "float16", "model_dtype": "auto", "vocab_size": None,
        "assistant_only_loss": False, "batch_size": 1, "shard_examples": 1, "device": "cpu",
    }  # fmt: skip
    path.write_text(json.dumps({"prompt": "hello", **chat(served, by_id)}) + "\n")
    with pytest.raises(UserError, match="expected an answer that begins within 3 tokens"):
        command.run(**options, max_length=3)
    command.run(**options, max_length=100)
    assert Cache(output).manifest.max_length == 100


def test_ends_beside_a_tokenizer(tmp_path, tiny_teacher, tiny_tokenizer, tokenizer):
    """Those of a generation config, if there is one."""
    assert eos_beside(tiny_tokenizer, tokenizer) == [2]
    shutil.copytree(tiny_teacher, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "generation_config.json").read_text())
    config["eos_token_id"] = [0, 2]
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps(config))
    assert eos_beside(tmp_path / "t", tokenizer) == [0, 2]


def test_lines_that_cannot_be_read_are_named(tmp_path, tokenizer, served):
    good = {"prompt": "hello", **chat(served, by_id)}
    with pytest.raises(UserError, match=r"served: expected choices with logprobs .* on line 1 of"):
        read(tmp_path, tokenizer, {"prompt": "hello", "choices": []})
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
