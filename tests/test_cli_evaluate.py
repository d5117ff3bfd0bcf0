"""tdkd evaluate: every number against a plain dense computation."""

import json
import math

import pytest
import torch
from tiny import shuffled_tokenizer

from tdkd.cli import evaluate as command
from tdkd.errors import UserError
from tdkd.models import Head, load_model, load_tokenizer

transformers = pytest.importorskip("transformers")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

DATA = [
    {"prompt": "why?", "completion": "because"},
    {
        "prompt": [{"role": "user", "content": "a b c"}],
        "completion": [{"role": "assistant", "content": "d e f g"}],
    },
    {"prompt": "zig", "completion": "zag zig", "truncated": True},
    {"prompt": "north by east", "references": ["south by west", "n"]},
]
TEXTS = ["because", "d e f g", "zag zig", "south by west"]


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher)


@pytest.fixture(scope="module")
def student(tiny_student):
    return load_model(tiny_student)


@pytest.fixture(scope="module")
def capped():
    """A student whose head caps its logits."""
    torch.manual_seed(2)
    config = transformers.Gemma2Config(
        vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=1.0,
        initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def evaluate(student, teacher, tokenizer, data=DATA, **options):
    return command.evaluate(student, teacher, tokenizer, data, **{"rouge": False, **options})


def token_ids(prompt, text, closed, tokenizer):
    chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    opening = tokenizer(chat, add_special_tokens=False).input_ids
    answer = tokenizer(text, add_special_tokens=False).input_ids
    return opening, answer + [tokenizer.eos_token_id] * closed


def dense(student, teacher, tokenizer, max_length=512):
    """One sequence at a time, [T, V] in float64."""
    rows = []
    for record, text in zip(DATA, TEXTS, strict=True):
        prompt = record["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[0]["content"]
        opening, answer = token_ids(prompt, text, not record.get("truncated"), tokenizer)
        ids = torch.tensor([(opening + answer)[:max_length]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (teacher, student))
        rows += [(p[i - 1], q[i - 1], int(ids[0, i])) for i in range(len(opening), ids.shape[1])]
    mean = {name: 0.0 for name in ("kl", "reverse_kl", "top1", "acceptance", "nll")}
    for p, q, token in rows:
        mean["kl"] += float((p.exp() * (p - q)).sum()) / len(rows)
        mean["reverse_kl"] += float((q.exp() * (q - p)).sum()) / len(rows)
        mean["top1"] += float(p.argmax() == q.argmax()) / len(rows)
        mean["acceptance"] += float(torch.minimum(p.exp(), q.exp()).sum()) / len(rows)
        mean["nll"] -= float(q[token]) / len(rows)
    perplexity = math.exp(mean.pop("nll"))
    return {**mean, "perplexity": perplexity, "positions": len(rows)}


@pytest.mark.parametrize("who", ["student", "capped"])
@pytest.mark.parametrize("batch_size,rows", [(1, 256), (3, 256), (8, 5), (8, 1)])
def test_metrics_are_those_of_a_dense_computation(
    request, teacher, tokenizer, monkeypatch, who, batch_size, rows
):
    student = request.getfixturevalue(who)
    monkeypatch.setattr(command, "CHUNK_ROWS", rows)
    result = evaluate(student, teacher, tokenizer, batch_size=batch_size)
    expected = dense(student, teacher, tokenizer)
    assert result["examples"] == 4
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_max_length_cuts_responses(student, teacher, tokenizer):
    length = len(token_ids("why?", "", False, tokenizer)[0]) + 6
    result = evaluate(student, teacher, tokenizer, max_length=length)
    expected = dense(student, teacher, tokenizer, length)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_logits_exist_for_a_chunk_of_rows_alone(student, teacher, tokenizer, monkeypatch):
    shapes = []
    real = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, h: shapes.append(h.shape[0]) or real(head, h))
    monkeypatch.setattr(command, "CHUNK_ROWS", 7)
    result = evaluate(student, teacher, tokenizer)
    assert max(shapes) == 7
    assert sum(shapes) == 2 * result["positions"]


def test_a_teacher_agrees_with_itself(teacher, tokenizer):
    result = evaluate(teacher, teacher, tokenizer)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1"] == 1
    assert result["acceptance"] == pytest.approx(1, abs=1e-5)


def test_kl_is_of_teacher_to_student(student, teacher, tokenizer):
    there = evaluate(student, teacher, tokenizer)
    back = evaluate(teacher, student, tokenizer)
    assert there["kl"] == pytest.approx(back["reverse_kl"], rel=1e-4)
    assert there["kl"] != pytest.approx(there["reverse_kl"], rel=1e-3)


def test_a_token_that_a_model_excludes_gives_no_nan():
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    sums = command._compare(log_p, log_q, torch.tensor([1])).sum(0)
    assert sums.isfinite().all()
    assert sums[3] == pytest.approx(0.75)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rouge_is_the_best_over_references_of_greedy_answers(teacher, tokenizer, batch_size):
    result = evaluate(
        teacher, teacher, tokenizer, rouge=True, max_new_tokens=12, batch_size=batch_size, samples=3
    )
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores, answers = [], []
    for record, text in zip(DATA, TEXTS, strict=True):
        prompt = record["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[0]["content"]
        ids = torch.tensor([token_ids(prompt, "", False, tokenizer)[0]])
        out = teacher.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        wanted = record.get("references", [text])
        scores.append(max(scorer.score(w, answers[-1])["rougeL"].fmeasure for w in wanted))
    assert result["rouge_l"] == pytest.approx(sum(scores) / 4)
    assert [s["answer"] for s in result["samples"]] == answers[:3]
    assert [s["reference"] for s in result["samples"]] == TEXTS[:3]
    assert [s["prompt"] for s in result["samples"]] == ["why?", "a b c", "zig"]


def test_rouge_takes_the_best_reference(student, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(command, "_answers", lambda *args, **kw: ["south runs"])
    data = [{"prompt": "x", "references": ["nothing alike", "south run"]}]
    # the stemmer makes runs and run one word
    assert evaluate(student, teacher, tokenizer, data, rouge=True)["rouge_l"] == 1


def test_without_rouge_nothing_is_generated(student, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(command, "sample", None)
    assert "rouge_l" not in evaluate(student, teacher, tokenizer)


def test_sampled_answers_follow_the_seed(student, teacher, tokenizer):
    one, again, other = (
        evaluate(
            student, teacher, tokenizer, temperature=1.0, samples=4, max_new_tokens=16, seed=seed
        )["samples"]
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_other_vocabularies_are_refused(student, tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    wide = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(UserError, match="^teacher: expected.*vocabulary of 264, got 300; where"):
        evaluate(student, wide, tokenizer)


def test_no_response_within_max_length_is_refused(student, teacher, tokenizer):
    with pytest.raises(UserError, match="within max-length 5, got none"):
        evaluate(student, teacher, tokenizer, max_length=5)


def test_the_command_writes_one_json_and_a_table(tiny_student, tiny_teacher, tmp_path, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "new" / "out.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in DATA))
    command.run(
        model=str(tiny_student), teacher=str(tiny_teacher), data=str(data), output=str(output),
        max_examples=3, max_length=512, vocab_size=None, batch_size=2, max_new_tokens=4,
        temperature=0.0, rouge=True, samples=2, seed=0, device="cpu",
    )  # fmt: skip
    written = json.loads(output.read_text())
    assert written["examples"] == 3
    assert len(written["samples"]) == 2
    assert list(output.parent.iterdir()) == [output]
    table = capsys.readouterr().out
    for name in command.METRICS:
        assert name in table
        assert f"{written[name]:.4f}" in table


def test_columns_of_padding_do_not_count(student, teacher, tokenizer, tiny_teacher):
    expected = evaluate(student, teacher, tokenizer, vocab_size=260)
    wide = load_model(tiny_teacher)
    wide.resize_token_embeddings(300)
    assert evaluate(student, wide, tokenizer, vocab_size=260) == expected
    assert expected != evaluate(student, teacher, tokenizer)
    for size in (0, 265):
        with pytest.raises(UserError, match=f"^vocab-size: expected 1 to 264, .* got {size}$"):
            evaluate(student, wide, tokenizer, vocab_size=size)


def test_records_longer_than_the_positions_are_refused(student, teacher, tokenizer):
    data = [{"prompt": "why?", "completion": "x" * 600}]
    with pytest.raises(UserError, match="^max-length: expected sequences of at most 512 tokens"):
        evaluate(student, teacher, tokenizer, data, max_length=1000)
    with pytest.raises(UserError, match="^max-new-tokens: expected sequences of at most 512"):
        evaluate(student, teacher, tokenizer, rouge=True, max_new_tokens=500)


def test_a_teacher_with_other_tokens_is_refused(tiny_student, tiny_teacher, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "why?", "completion": "so"}) + "\n")
    other = shuffled_tokenizer(tiny_teacher, tmp_path / "other")
    with pytest.raises(UserError, match="^teacher: expected the student's tokenizer, whose token"):
        command.run(
            model=str(tiny_student), teacher=str(other), data=str(data),
            output=str(tmp_path / "out.json"), max_examples=None, max_length=64, vocab_size=None,
            batch_size=2, max_new_tokens=4, temperature=0.0, rouge=False, samples=0, seed=0,
            device="cpu",
        )  # fmt: skip


def test_tokens_above_the_vocabulary_are_refused(student, teacher, tokenizer):
    with pytest.raises(UserError, match="^vocab-size: expected more than 2.., the largest token"):
        evaluate(student, teacher, tokenizer, vocab_size=100)


def test_prompts_that_are_not_asked_may_be_long(student, teacher, tokenizer):
    data = [DATA[0], {"prompt": "x" * 400, "completion": "y"}]
    result = evaluate(student, teacher, tokenizer, data, samples=1, max_new_tokens=120)
    assert [sample["prompt"] for sample in result["samples"]] == ["why?"]
    with pytest.raises(UserError, match="^max-new-tokens: expected sequences of at most 512"):
        evaluate(student, teacher, tokenizer, data, samples=2, max_new_tokens=120)
