"""tdkd generate: records, sampling, and going on after a kill as if nothing had happened."""

import json
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from tdkd import records
from tdkd.cli import generate as command
from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer

transformers = pytest.importorskip("transformers")

PROMPTS = ["why?", "a b c", "north by east", "0", "tick tock", "zig zag", "one two three"]
OPTIONS = {
    "num_examples": 7,
    "max_prompt_tokens": 40,
    "max_new_tokens": 8,
    "batch_size": 2,
    "top_k": 20,
    "temperature": 1.0,
    "seed": 3,
    "device": "cpu",
}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(PROMPTS))
    )
    return path


def generate(model, output, **options):
    command.run(model=str(model), output=str(output), **{"prompts": None, **OPTIONS, **options})
    return output.read_bytes()


def test_records_are_conversations_and_keep_other_fields(writer, prompts, tmp_path):
    output = tmp_path / "data.jsonl"
    generate(writer, output, prompts=str(prompts))
    written = records.read(output)
    assert sorted(record["id"] for record in written) == list(range(len(PROMPTS)))
    tokenizer = load_tokenizer(writer)
    for record in written:
        assert record["prompt"] == [{"role": "user", "content": PROMPTS[record["id"]]}]
        ((role, text),) = [tuple(m.values()) for m in record["completion"]]
        assert role == "assistant"
        assert "<|" not in text
        length = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert length == 8 if record["truncated"] else length < 8
    assert {record["truncated"] for record in written} == {True, False}


def test_chat_messages_are_taken_as_they_are(writer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"prompt": chat}))
    output = tmp_path / "data.jsonl"
    generate(writer, output, prompts=str(path))
    assert records.read(output)[0]["prompt"] == chat


def test_long_prompts_are_left_out(writer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "x" * 41}) + "\n")
    output = tmp_path / "data.jsonl"
    generate(writer, output, prompts=str(path))
    (record,) = records.read(output)
    assert record["prompt"][0]["content"] == "short"


def test_greedy_answers_do_not_depend_on_the_batch(writer):
    model, tokenizer = load_model(writer), load_tokenizer(writer)
    encoded = [records.Chat(tokenizer).prompt({"prompt": p}) for p in PROMPTS]
    together = command.sample(model, tokenizer, encoded, max_new_tokens=10, temperature=0)
    for ids, (tokens, truncated) in zip(encoded, together, strict=True):
        row = list(ids)
        with torch.no_grad():
            while len(row) < len(ids) + 10 and row[-1:] != [tokenizer.eos_token_id]:
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        ended = row[-1] == tokenizer.eos_token_id
        assert tokens == (row[len(ids) : -1] if ended else row[len(ids) :])
        assert truncated is not ended


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "shared prompt"])
def test_penalties_of_a_model_do_not_enter(writer, count):
    model, tokenizer = load_model(writer), load_tokenizer(writer)
    ids = [records.Chat(tokenizer).prompt({"prompt": "why?"})] * count
    for temperature in (0.0, 1.0):
        draw = partial(
            command.sample, model, tokenizer, ids, max_new_tokens=10, temperature=temperature
        )
        model.generation_config = transformers.GenerationConfig()
        plain = draw()
        model.generation_config = transformers.GenerationConfig(
            repetition_penalty=9.0, no_repeat_ngram_size=1
        )
        assert draw() == plain


def test_a_shared_prompt_is_read_once_and_changes_nothing(writer):
    model, tokenizer = load_model(writer), load_tokenizer(writer)
    ids = records.Chat(tokenizer).prompt({"prompt": "why?"})
    (alone,) = command.sample(model, tokenizer, [ids], max_new_tokens=10, temperature=0)
    shared = command.sample(model, tokenizer, [ids] * 3, max_new_tokens=10, temperature=0)
    assert shared == [alone] * 3


def test_the_sampler_draws_from_the_softmax_of_the_top_k():
    torch.manual_seed(0)
    logits = torch.randn(12)
    sampler = command.TopKSampler(5, 0.7, torch.Generator().manual_seed(1))
    drawn = sampler(None, logits.expand(40_000, -1)).argmax(-1)
    share = torch.bincount(drawn, minlength=12) / drawn.numel()
    top = logits.topk(5)
    expected = torch.zeros(12).scatter(0, top.indices, (top.values / 0.7).softmax(-1))
    # 4 standard deviations of a share
    assert (share - expected).abs().max() < 4 * 0.5 / 40_000**0.5
    assert not share[expected == 0].any()


def test_the_seed_decides(writer, prompts, tmp_path):
    one, again, other = (
        generate(writer, tmp_path / f"{name}.jsonl", prompts=str(prompts), seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one == again != other


@pytest.mark.parametrize("share", [0.0, 0.1, 0.45, 0.8, 0.999])
def test_a_torn_file_is_completed_to_the_same_bytes(writer, prompts, tmp_path, share):
    output = tmp_path / "data.jsonl"
    whole = generate(writer, output, prompts=str(prompts))
    output.write_bytes(whole[: int(share * len(whole))])
    assert generate(writer, output, prompts=str(prompts)) == whole


def test_what_is_finished_is_not_done_again(writer, prompts, tmp_path, monkeypatch):
    output = tmp_path / "data.jsonl"
    whole = generate(writer, output, prompts=str(prompts))
    batches = []
    real = command.sample
    monkeypatch.setattr(
        command, "sample", lambda *args, **kw: batches.append(len(args[2])) or real(*args, **kw)
    )
    assert generate(writer, output, prompts=str(prompts)) == whole
    assert batches == []
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    assert generate(writer, output, prompts=str(prompts)) == whole
    assert batches == [2, 1]


# Runs the command in a process of its own, which dies in the middle of writing its nth batch.
DIES = """
import json, os, signal, sys
from tdkd import records
from tdkd.cli.generate import run
name, calls, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
real = getattr(records, name)
def die(path, content):
    global calls
    calls -= 1
    if calls:
        return real(path, content)
    torn = path if name == "append" else path.with_name(path.name + ".tmp")
    with torn.open("a") as file:
        file.write('{"prompt": [{"ro')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
setattr(records, name, die)
run(**options)
"""


def killed(model, output, name, calls, **options):
    options = {"model": str(model), "output": str(output), "prompts": None, **OPTIONS, **options}
    done = subprocess.run(
        [sys.executable, "-c", DIES, name, str(calls), json.dumps(options)], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_goes_on_to_the_same_bytes(writer, prompts, tmp_path):
    undisturbed = generate(writer, tmp_path / "one.jsonl", prompts=str(prompts))
    output = tmp_path / "two.jsonl"
    killed(writer, output, "append", 3, prompts=str(prompts))
    assert output.read_bytes().count(b"\n") == 4
    assert generate(writer, output, prompts=str(prompts)) == undisturbed


def test_a_teacher_writes_prompts_and_answers(writer, tmp_path):
    output = tmp_path / "data.jsonl"
    generate(writer, output)
    written = records.read(output)
    texts = [record["prompt"][0]["content"] for record in written]
    assert len(set(texts)) == len(texts) == 7
    assert all(text.isalpha() and text.islower() for text in texts)


@pytest.mark.parametrize("name,calls", [("write_whole", 3), ("append", 2)])
def test_writing_prompts_goes_on_after_a_kill(writer, tmp_path, name, calls):
    options = {"num_examples": 12, "batch_size": 4}
    undisturbed = generate(writer, tmp_path / "one.jsonl", **options)
    output = tmp_path / "two.jsonl"
    killed(writer, output, name, calls, **options)
    assert generate(writer, output, **options) == undisturbed


def test_the_opening_of_a_user_turn_is_the_templates_own(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = "<|im_start|>system\nbe good<|im_end|>\n" + tokenizer.chat_template
    opening = tokenizer.decode(command._user_opening(tokenizer))
    assert opening == "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("name,value", [("seed", 4), ("max_new_tokens", 9), ("top_k", 3)])
def test_other_settings_are_refused(writer, prompts, tmp_path, name, value):
    output = tmp_path / "data.jsonl"
    whole = generate(writer, output, prompts=str(prompts))
    with pytest.raises(UserError, match=f"^{name}: expected {OPTIONS[name]} .*got {value}"):
        generate(writer, output, prompts=str(prompts), **{name: value})
    assert output.read_bytes() == whole


def test_other_prompts_in_the_same_file_are_refused(writer, prompts, tmp_path):
    output = tmp_path / "data.jsonl"
    generate(writer, output, prompts=str(prompts))
    prompts.write_text('{"prompt": "something else"}')
    with pytest.raises(UserError, match="^prompts_sha256: expected "):
        generate(writer, output, prompts=str(prompts))


def test_a_run_that_never_began_settles_nothing(writer, prompts, tmp_path):
    output = tmp_path / "data.jsonl"
    with pytest.raises(UserError, match="^device: "):
        generate(writer, output, prompts=str(prompts), device="no-such-device", seed=9)
    generate(writer, output, prompts=str(prompts))


def test_a_dropped_batch_is_told(writer, prompts, tmp_path, capsys):
    output = tmp_path / "data.jsonl"
    output.write_bytes(generate(writer, output, prompts=str(prompts))[:-5])
    capsys.readouterr()
    generate(writer, output, prompts=str(prompts))
    assert "is dropped and done again" in " ".join(capsys.readouterr().err.split())


def test_line_separators_of_unicode_stay_inside_a_record(writer, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
    text = "a\u2028b\u0085c"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False), encoding="utf-8")
    generate(writer, output, prompts=str(path))
    assert records.read(output)[0]["prompt"][0]["content"] == text


def test_a_file_of_something_else_is_left_alone(writer, prompts, tmp_path):
    output = tmp_path / "data.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UserError, match="^output: expected a new file"):
        generate(writer, output, prompts=str(prompts))
    assert output.read_text() == "mine\n"


def test_a_teacher_without_a_chat_template_is_refused(writer, prompts, tmp_path):
    tokenizer = load_tokenizer(writer)
    tokenizer.chat_template = None
    path = tmp_path / "model"
    load_model(writer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="chat template"):
        generate(path, tmp_path / "data.jsonl", prompts=str(prompts))


def test_a_teacher_that_never_ends_a_prompt_is_refused(writer, tmp_path):
    with pytest.raises(UserError, match="^model: expected a teacher that writes prompts"):
        generate(writer, tmp_path / "data.jsonl", max_prompt_tokens=1, top_k=1)


def test_answers_beyond_the_positions_are_refused(writer, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="^max-new-tokens: expected sequences of at most 256 tok"):
        generate(writer, out, prompts=str(prompts), max_new_tokens=250)
    with pytest.raises(UserError, match="^temperature: expected a number >= 0, got nan"):
        generate(writer, out, prompts=str(prompts), temperature=float("nan"))


def test_a_refused_run_settles_nothing(writer, prompts, tmp_path):
    """The corrected command goes on."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="^max-new-tokens: "):
        generate(writer, out, prompts=str(prompts), max_new_tokens=250)
    prompts.write_text('{"prompt": "why?"}')
    with pytest.raises(UserError, match="^prompts: expected prompts of at most 1 tokens, got none"):
        generate(writer, out, prompts=str(prompts), max_prompt_tokens=1, seed=9)
    prompts.write_text('{"prompt": "why?", "tools": "{"}')
    with pytest.raises(UserError, match="^tools: "):
        generate(writer, out, prompts=str(prompts), seed=9)
    prompts.write_text('{"prompt": "why?"}')
    generate(writer, out, prompts=str(prompts))


@pytest.mark.parametrize("name", ["max_prompt_tokens", "max_new_tokens"])
def test_prompts_of_its_own_must_fit_the_positions(writer, tmp_path, name):
    out = tmp_path / "out.jsonl"
    option = name.replace("_", "-")
    with pytest.raises(UserError, match=f"^{option}: expected sequences of at most 256 tokens"):
        generate(writer, out, **{name: 260})
    generate(writer, out)


def test_an_answer_that_was_cut_within_a_character(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    chat = records.Chat(tokenizer)
    prompt = chat.prompt({"prompt": "why?"})
    ids = tokenizer("ab\u4e2d", add_special_tokens=False).input_ids
    assert len(ids) == 5
    for kept in (2, 3, 4):
        assert command._text(chat, prompt, ids[:kept], True) == "ab"
    assert command._text(chat, prompt, ids, True) == "ab\u4e2d"
    assert command._text(chat, prompt, ids[2:4], True) == ""
    assert command._text(chat, prompt, ids[:3], False) == "ab\ufffd"


@pytest.mark.parametrize("between", ["", " "])
def test_what_was_written_is_what_is_learned(tiny_teacher, between):
    """Some templates put a space before an answer, which the model writes itself."""
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
        "{% else %}{{ '" + between + "' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    chat = records.Chat(tokenizer)
    assert chat.between == between
    record = {"prompt": "why?", "truncated": True}
    prompt = chat.prompt(record)
    written = tokenizer(between + "because", add_special_tokens=False).input_ids
    text = command._text(chat, prompt, written, True)
    assert text == "because"
    assert chat.encode({**record, "completion": text}) == (prompt, written)
