"""tdkd cache: what goes in comes out, through kills, packing and shuffling; students learn from it
what they learn from the live teacher."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from datasets import Dataset

from tdkd import cache as caches
from tdkd import cli, ops
from tdkd.cache import Cache, Collator, Example
from tdkd.cli import cache as command
from tdkd.cli import distill
from tdkd.errors import UserError
from tdkd.kernels.batch_vocabulary.reference import LAW_ROWS
from tdkd.models import last_hidden_state, lm_head, load_model, load_tokenizer
from tdkd.testing import memory_events
from tdkd.trainer import TDConfig, TDTrainer

WORDS = ["one two", "red", "a b c d e", "why?", "north by east", "0123", "tick tock", "zig"]
K, P = 6, 0.9
ROOT = Path(__file__).resolve().parents[1]


def records(n=11):
    return [
        {
            "prompt": [{"role": "user", "content": WORDS[i % 8]}],
            "completion": [{"role": "assistant", "content": WORDS[(3 * i + 1) % 8]}],
        }
        for i in range(n)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(output, *, model=None, data=None, **options):
    given = {
        "served": None, "tokenizer": None, "action_top_k": K, "action_top_p": P,
        "teacher_temperature": 1.0, "max_length": 64, "tail": True, "log_probs": "float16",
        "model_dtype": "float32", "vocab_size": None, "assistant_only_loss": False,
        "batch_size": 2, "shard_examples": 4, "device": "cpu",
    }  # fmt: skip
    command.run(
        output=str(output), model=model and str(model), data=data and str(data),
        **{**given, **options},
    )  # fmt: skip
    return Cache(output)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", records())


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_teacher, data):
    return run(tmp_path_factory.mktemp("cache") / "c", model=tiny_teacher, data=data)


def live_sets(teacher, ids, states, temperature=1.0):
    """The sets of the places of one sequence, by the reference in float64."""
    model = load_model(str(teacher))
    head = lm_head(model)
    with torch.inference_mode():
        hidden = last_hidden_state(
            model, input_ids=ids[None], attention_mask=torch.ones(1, len(ids))
        )
    before = hidden[0, states - 1].double()
    return ops.linear_select_actions(
        before, head.weight.double(), K, P, include=ids[states], temperature=temperature,
        impl="reference",
    )  # fmt: skip


def test_sets_are_those_of_the_live_teacher(made, tiny_teacher):
    """Ids are equal; rounding to two bytes moves a log-probability by what the docs say."""
    unit = 2.0**-11
    dataset = made.dataset()
    assert len(dataset) == len(made) == 11
    states = 0
    for example in dataset:
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        where = (labels >= 0).nonzero().squeeze(-1)
        numbers = labels[where].numpy()
        assert (made.tokens(numbers) == ids[where].numpy()).all()
        got, expected = made.sets(numbers), live_sets(tiny_teacher, ids, where)
        assert torch.equal(got.ids, expected.ids)
        assert torch.equal(got.count, expected.count)
        wanted = torch.where(got.valid, expected.log_probs, 0.0)
        tail = 1 - expected.mass
        entropy = -(wanted.exp() * wanted * got.valid).sum(-1)
        entropy = entropy - torch.xlogy(tail.clamp(min=0), tail.clamp(min=1e-12))
        bound = 1.02 * unit * (wanted.abs() + entropy[:, None]) + 2e-6
        off = (torch.where(got.valid, got.log_probs, 0.0).double() - wanted).abs()
        assert (off <= bound).all()
        assert off.max() > 0
        # the tail is as good as the rest, however small
        rest = torch.log1p(-got.log_probs.double().exp().sum(-1))
        noise = 4 * torch.finfo(torch.float32).eps / tail
        assert (
            (rest - tail.log()).abs() <= 1.02 * unit * (tail.log().abs() + entropy) + noise
        ).all()
        states += len(where)
    assert states == made.manifest.states
    assert made.manifest.members == sum(
        int(made.sets(np.arange(i, i + 1)).count) for i in range(states)
    )


def test_tokens_are_those_that_the_trainer_makes(made, tmp_path, tiny_teacher, tiny_student, data):
    tokenizer = load_tokenizer(tiny_student)
    loaded = distill.load_data(str(data), "train_file", tokenizer)
    live = TDTrainer(
        load_model(tiny_student), str(tiny_teacher), config(tmp_path), train_dataset=loaded,
        processing_class=tokenizer,
    )  # fmt: skip
    cached = made.dataset()
    for ours, theirs in zip(cached, live.train_dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        learned = [x if y >= 0 else -100 for x, y in zip(*_columns(ours), strict=True)]
        assert learned == theirs["labels"]


def _columns(example):
    return example["input_ids"], example["labels"]


OF_NOBODY = {
    "teacher": {}, "tokenizer": "", "chat_template": None, "data": {}, "tokens_sha256": None,
    "assistant_only_loss": False, "model_dtype": None,
}  # fmt: skip


@pytest.mark.parametrize("log_probs", ["float16", "bfloat16"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_ragged_sets_come_back(tmp_path, log_probs, tail, vocab_size):
    """Empty sets, whole rows, ids beyond two bytes, log-probabilities beyond a half's range."""
    rng = np.random.default_rng(0)
    examples, sets = [], []
    for size in (1, 7, 30):
        mask = rng.random(size) < 0.7
        mask[0] = False
        counts = rng.integers(0, 6, mask.sum())
        own = []
        for count in counts:
            log_probs_of = np.sort(rng.normal(-3, 1, count) - np.log(6))[::-1]
            own.append((rng.choice(vocab_size, count, replace=False), log_probs_of))
        if own and size == 30:
            own[0] = (np.array([vocab_size - 1, 3]), np.array([-1e-5, -1e6]))
            counts[0] = 2
        sets += own
        with np.errstate(divide="ignore"):
            tails = np.log([max(0.0, 1 - np.exp(x).sum()) for _, x in own])
        examples.append(
            Example(
                rng.integers(0, vocab_size, size), mask, counts,
                np.concatenate([i for i, _ in own] or [np.empty(0, int)]),
                np.concatenate([x for _, x in own] or [np.empty(0)]).astype(np.float32),
                tails.astype(np.float32) if own else np.empty(0, np.float32),
            )
        )  # fmt: skip
    told = caches.write_shard(
        tmp_path, 0, examples, vocab_size=vocab_size, dtype=log_probs, tail=tail
    )
    caches.write_manifest(
        tmp_path, [told], **OF_NOBODY, vocab_size=vocab_size, action_top_k=7, action_top_p=1.0,
        teacher_temperature=1.0, max_length=None, dtype=log_probs, tail=tail,
    )  # fmt: skip
    read = Cache(tmp_path)
    order = rng.permutation(len(sets))
    got = read.sets(np.array([*order, -1, -100]))
    assert got.count[-2:].tolist() == [0, 0]
    assert got.ids.shape == (len(sets) + 2, 7)
    unit = 2.0**-11 if log_probs == "float16" else 2.0**-8
    for row, number in enumerate(order):
        ids, wanted = sets[number]
        count = len(ids)
        assert got.ids[row, :count].tolist() == ids.tolist()
        assert (got.ids[row, count:] == -1).all()
        assert (got.log_probs[row, count:] == -torch.inf).all()
        off = np.abs(got.log_probs[row, :count].numpy() - np.maximum(wanted, caches.LOWEST))
        # eight outcomes at most have an entropy of log 8
        most = 1.02 * unit * (np.abs(np.maximum(wanted, caches.LOWEST)) + np.log(8))
        assert (off <= most).all()
    assert (got.mass <= 1 + 1e-6).all()
    taken = np.concatenate([x.input_ids[x.mask] for x in examples])
    assert (read.tokens(order) == taken[order]).all()


def config(path, **options):
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False,
        "disable_tqdm": True, "use_cpu": True, "normaliser": "exact", "action_top_k": K,
        "action_top_p": P, "seed": 0, "optim": "sgd", "td_weight": 0.1,
    }  # fmt: skip
    return TDConfig(output_dir=str(path), **{**defaults, **options})


def cached_trainer(path, student, cache, data=None, eval_dataset=None, **options):
    return TDTrainer(
        load_model(student),
        args=config(path, teacher="cache", teacher_cache=str(cache.path), **options),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(student),
    )


LAYOUTS = {
    "padded": {},
    "short": {"max_length": 24},
    "end": {"max_length": 24, "truncation_mode": "keep_end"},
    "packed": {"packing": True, "max_length": 60},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
    "target network": {"target_network": "ema", "value_head": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_learns_what_it_learns_from_the_live_teacher(
    made, tmp_path, tiny_teacher, tiny_student, data, layout
):
    """The same parameters after two steps, but for what two bytes cannot hold of a probability."""
    options = LAYOUTS[layout]
    tokenizer = load_tokenizer(tiny_student)
    live = TDTrainer(
        load_model(tiny_student), str(tiny_teacher), config(tmp_path / "live", **options),
        train_dataset=distill.load_data(str(data), "train_file", tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    cached = cached_trainer(tmp_path / "cached", tiny_student, made, **options)
    assert cached.teacher is None
    before = [p.detach().clone() for p in live.model.parameters()]
    if layout in ("end", "wrapped"):
        # what is cut at its beginning is another text to a live teacher
        _same_tokens(live, cached)
        cached.train()
        losses = [entry["loss"] for entry in cached.state.log_history if "loss" in entry]
        assert len(losses) == 2
        assert np.isfinite(losses).all()
        return
    _learn_the_same(live, cached, before)


def _learn_the_same(live, cached, before):
    live.train()
    cached.train()
    moved = off = 0.0
    for old, a, b in zip(before, live.model.parameters(), cached.model.parameters(), strict=True):
        moved = max(moved, (a.detach() - old).abs().max().item())
        off = max(off, (a - b).detach().abs().max().item())
    assert moved > 1e-4
    # Rounding moves a row's probabilities by 2 u H in all, H at most log(K + 2) with the tail; two
    # random models share little mass, so that the row's gradient is of size 1.
    assert off < 2 * 2.0**-11 * np.log(K + 2) * moved


def test_vocabularies_that_are_padded_differently(
    tmp_path, tiny_tokenizer, tiny_teacher, tiny_student, data
):
    """What a student of fewer columns learns from a wider teacher, live and cached."""
    wide = tiny.save_llama(tmp_path / "wide", tiny_tokenizer, layers=4, seed=0, vocab_size=320)
    whole = run(tmp_path / "whole", model=wide, data=data)
    with pytest.raises(UserError, match="model: expected the 320 columns of .*, got 264; where"):
        cached_trainer(tmp_path, tiny_student, whole)
    with pytest.raises(UserError, match="vocab_size: expected the 320 columns of .*, got 264"):
        cached_trainer(tmp_path, tiny_student, whole, vocab_size=264)
    cut = run(tmp_path / "cut", model=wide, data=data, vocab_size=264)
    assert cut.manifest.vocab_size == 264
    assert int(whole.sets(np.arange(93)).ids.max()) >= 264 > int(cut.sets(np.arange(93)).ids.max())
    with pytest.raises(UserError, match="model: expected the 264 columns of .*, got 320"):
        cached_trainer(tmp_path, wide, cut)
    tokenizer = load_tokenizer(tiny_student)
    live = TDTrainer(
        load_model(tiny_student), str(wide), config(tmp_path / "live", vocab_size=264),
        train_dataset=distill.load_data(str(data), "train_file", tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    before = [p.detach().clone() for p in live.model.parameters()]
    _learn_the_same(live, cached_trainer(tmp_path / "cached", tiny_student, cut), before)
    with pytest.raises(UserError, match="vocab-size: expected at most the 264 columns .* got 265"):
        run(tmp_path / "c", model=tiny_teacher, data=data, vocab_size=265)
    with pytest.raises(UserError, match="vocab-size: expected more than 2.., the largest token"):
        run(tmp_path / "d", model=tiny_teacher, data=data, vocab_size=100)
    # which settled nothing
    assert run(tmp_path / "d", model=tiny_teacher, data=data).manifest.vocab_size == 264


def _same_tokens(live, cached):
    for a, b in zip(live.get_train_dataloader(), cached.get_train_dataloader(), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
        held = b["labels"] >= 0
        assert (b["action_ids"][held] == b["labels"][held][:, None]).any(-1).all()
        assert (b["action_ids"][~held] == -1).all()


def joined(examples):
    columns = {name: [x[name] for x in examples] for name in examples[0]}
    return {name: torch.tensor(sum(column, [])) for name, column in columns.items()}


def test_shuffling_filtering_and_streaming_carry_the_sets(made):
    whole = {tuple(x["labels"]): x for x in made.dataset()}
    moved = made.dataset().shuffle(seed=3).filter(lambda x: len(x["input_ids"]) % 2)
    assert 0 < len(moved) < len(whole)
    streamed = list(made.dataset(streaming=True))
    assert len(streamed) == len(whole)
    # as a worker of a data loader that is spawned gets it
    collate = pickle.loads(pickle.dumps(Collator(joined, made)))
    for x in [*moved, *streamed]:
        assert whole[tuple(x["labels"])]["input_ids"] == x["input_ids"]
        batch = collate([x])
        numbers = np.array(x["labels"])
        expected = made.sets(numbers)
        assert torch.equal(batch["action_ids"], expected.ids)
        assert torch.equal(batch["action_log_probs"], expected.log_probs)


@pytest.mark.parametrize("packing", [False, True])
def test_a_student_learns_from_a_stream(made, tmp_path, tiny_student, packing):
    """What it learns from the same examples in memory, in the same order."""
    options = {"packing": packing, "max_length": 64, "train_sampling_strategy": "sequential"}
    runs = [
        cached_trainer(tmp_path, tiny_student, made, made.dataset(streaming=streaming), **options)
        for streaming in (True, False)
    ]
    for one in runs:
        one.train()
    assert runs[0].state.log_history[0]["loss"] > 0
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_holds_no_row_of_logits(tmp_path, tiny_tokenizer, data):
    """Nothing that a step allocates is larger than the gradient of the head, or than the logits of
    the 64 rows by whose law columns are sampled."""
    columns, width = 100_000, 16
    teacher, student = (
        tiny.save_llama(tmp_path / name, tiny_tokenizer, layers=2, seed=seed, vocab_size=columns)
        for seed, name in enumerate(("teacher", "student"))
    )
    made = run(tmp_path / "c", model=teacher, data=data)

    def largest(**options):
        trainer = cached_trainer(tmp_path, student, made, per_device_train_batch_size=11, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        states = int((batch["labels"][:, 1:] >= 0).sum())
        assert states > max(5 * width, LAW_ROWS)
        sizes = memory_events(lambda: trainer.training_step(trainer.model, dict(batch), states))
        return max(sizes) / 4, states

    for normaliser in ("batch", "sampled"):
        options = {"normaliser": normaliser, "batch_vocabulary_extra": 64}
        uniform = largest(batch_vocabulary_law="uniform", **options)[0]
        assert uniform <= columns * width
        assert largest(**options)[0] <= columns * LAW_ROWS
    # and so it is seen where there are logits
    exact, states = largest(normaliser="exact")
    assert exact >= columns * states


def test_a_shard_is_a_data_set(made):
    """As the docs of tdkd.cache say: without our reader too."""
    shard = Dataset.from_file(str(made.path / "sets-00000.arrow"))
    assert len(shard) == 4
    example = shard[0]
    got = made.sets(np.arange(len(example["count"])))
    assert example["count"] == got.count.tolist()
    assert example["ids"] == got.ids[got.valid].tolist()
    kept = torch.tensor(example["log_probs"])
    torch.testing.assert_close(kept, got.log_probs[got.valid], rtol=2e-3, atol=2e-3)


def test_evaluation_on_a_part_that_is_held_out(made, tmp_path, tiny_student):
    parts = made.dataset().train_test_split(3, seed=0)
    run_ = cached_trainer(
        tmp_path, tiny_student, made, parts["train"], parts["test"],
        eval_strategy="steps", eval_steps=1, prediction_loss_only=True,
    )  # fmt: skip
    run_.train()
    assert [x["eval_loss"] for x in run_.state.log_history if "eval_loss" in x][-1] > 0


def test_what_is_done_is_not_done_again(tmp_path, tiny_teacher, data, monkeypatch):
    """A killed run leaves whole shards, and what it left goes on to the same bytes."""
    whole = run(tmp_path / "whole", model=tiny_teacher, data=data)
    write_shard, made = caches.write_shard, []

    def killed(folder, number, *args, **kwargs):
        if number == 2:
            (folder / "sets-00002.arrow.tmp").write_bytes(b"torn")
            raise KeyboardInterrupt
        made.append(number)
        return write_shard(folder, number, *args, **kwargs)

    monkeypatch.setattr(caches, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", model=tiny_teacher, data=data)
    assert made == [0, 1]
    with pytest.raises(UserError, match="expected a folder that tdkd cache has finished"):
        Cache(tmp_path / "cut")
    # one that was damaged meanwhile is made again, and one that nothing readable is told of
    (tmp_path / "cut" / "sets-00000.json").write_bytes(b"")
    (tmp_path / "cut" / "sets-00001.arrow").write_bytes(b"damaged")
    made.clear()
    monkeypatch.setattr(
        caches, "write_shard", lambda f, n, *a, **k: made.append(n) or write_shard(f, n, *a, **k)
    )
    cut = run(tmp_path / "cut", model=tiny_teacher, data=data)
    assert made == [0, 1, 2]
    assert cut.manifest == whole.manifest
    for told in ("{}", "[]", '{"sha256": 1}'):
        (tmp_path / "cut" / "sets-00001.json").write_text(told)
        made.clear()
        run(tmp_path / "cut", model=tiny_teacher, data=data)
        assert made == [1]


def test_processes_share_the_work(tmp_path, tiny_teacher, data):
    alone = run(tmp_path / "alone", model=tiny_teacher, data=data)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "tdkd", "cache", "--model", str(tiny_teacher), "--data", str(data), "--output",
        str(tmp_path / "both"), "--action-top-k", str(K), "--action-top-p", str(P),
        "--max-length", "64", "--batch-size", "2", "--shard-examples", "4", "--device", "cpu",
    ]  # fmt: skip
    told = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert Cache(tmp_path / "both").manifest == alone.manifest


def test_another_teacher_or_option_does_not_go_on(tmp_path, tiny_teacher, tiny_student, data):
    run(tmp_path / "c", model=tiny_teacher, data=data)
    with pytest.raises(UserError, match=r"action_top_k: expected 6 as in .*, got 5; choose"):
        run(tmp_path / "c", model=tiny_teacher, data=data, action_top_k=5)
    with pytest.raises(UserError, match=r"teacher: expected .*; choose another --output"):
        run(tmp_path / "c", model=tiny_student, data=data)
    other = write(tmp_path / "other.jsonl", records(3))
    with pytest.raises(UserError, match=r"data: expected .*; choose another --output"):
        run(tmp_path / "c", model=tiny_teacher, data=other)
    with pytest.raises(UserError, match="model_dtype: expected 'float32' as in .*, got 'bfloat16'"):
        run(tmp_path / "c", model=tiny_teacher, data=data, model_dtype="bfloat16")
    chatty = with_template(tiny_teacher, tmp_path / tiny_teacher.name, OTHER_TEMPLATE)
    with pytest.raises(UserError, match=r"chat_template: expected .*; choose another --output"):
        run(tmp_path / "c", model=chatty, data=data)
    # templates may look at the clock: the tokens themselves count
    settings = json.loads((tmp_path / "c" / "settings.json").read_text())
    assert settings["tokens_sha256"] == Cache(tmp_path / "c").manifest.tokens_sha256
    settings["tokens_sha256"] = "0" * 64
    place = tmp_path / "c" / "settings.json"
    place.write_text("null")
    with pytest.raises(UserError, match="output: expected an object in .*settings.json, got None"):
        run(tmp_path / "c", model=tiny_teacher, data=data)
    place.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="tokens_sha256: .*writes today's date .*chat_template_kw"):
        run(tmp_path / "c", model=tiny_teacher, data=data)
    with pytest.raises(UserError, match="action_top_k: expected 6 as in .*, got 5; choose"):
        run(tmp_path / "c", model=tiny_teacher, data=data, action_top_k=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="output: expected a new folder or one of tdkd cache"):
        run(tmp_path / "full", model=tiny_teacher, data=data)


def test_damage_is_found(tmp_path, tiny_teacher, data, capsys):
    made = run(tmp_path / "c", model=tiny_teacher, data=data)
    command.verify(str(made.path))
    assert "11 examples" in capsys.readouterr().err
    file = made.path / "sets-00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"verify: expected the \d+ bytes .*another checksum"):
        command.verify(str(made.path))
    Cache(made.path, verify=False)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="teacher_cache: expected the .* bytes"):
        Cache(made.path, verify=False)
    file.unlink()
    with pytest.raises(UserError, match="got no such file"):
        Cache(made.path, verify=False)


def test_a_manifest_that_lacks_something_is_refused(made, tmp_path):
    whole = json.loads((made.path / "manifest.json").read_text())
    (shard, *others) = whole["shards"]
    short = {name: value for name, value in whole.items() if name not in ("tail", "data")}
    for content, words in (
        (json.dumps({**whole, "format": 1}), "expected format 2 in .*, got 1; run tdkd cache"),
        ("{}", "expected format 2 in .*, got None; run tdkd cache again"),
        ("[]", r"sets: expected an object in .*manifest.json, got \[\]"),
        (json.dumps({**whole, "shards": 5}), "sets: expected file, .* of each shard in .*"),
        ("", "sets: expected JSON in .*manifest.json"),
        (json.dumps(short), "sets: expected data, tail in .*manifest.json, got none; run tdkd"),
        (
            json.dumps({**whole, "shards": [*others, {"file": shard["file"]}]}),
            "expected file, sha256, .* of each shard in .*, got none",
        ),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=words):
            Cache(tmp_path, argument="sets")
    # what a later version adds does no harm
    (tmp_path / "manifest.json").write_text(json.dumps({**whole, "shards": [], "more": 1}))
    Cache(tmp_path)


def test_other_data_tokenizers_and_sets_are_refused(made, tmp_path, tiny_student):
    with pytest.raises(UserError, match="action_top_p: expected 0.9 as in .*, got 0.5"):
        cached_trainer(tmp_path, tiny_student, made, action_top_p=0.5)
    with pytest.raises(UserError, match="teacher_cache: expected a folder with teacher: cache"):
        config(tmp_path, teacher="cache")
    with pytest.raises(UserError, match="teacher_cache: expected a folder with teacher: cache"):
        config(tmp_path, teacher_cache="somewhere")
    with pytest.raises(UserError, match="teacher_model_name_or_path: expected none with teacher"):
        config(tmp_path, teacher="cache", teacher_cache="x", teacher_model_name_or_path="somewhere")
    with pytest.raises(UserError, match="lmbda: expected 0 with teacher: cache"):
        config(tmp_path, teacher="cache", teacher_cache="x", lmbda=0.5)
    with pytest.raises(UserError, match="teacher_model: expected none with teacher: cache"):
        TDTrainer(
            load_model(tiny_student), load_model(tiny_student),
            config(tmp_path, teacher="cache", teacher_cache=str(made.path)),
        )  # fmt: skip
    plain = made.dataset().map(lambda x: {"labels": x["labels"][1:] + [-100]})
    with pytest.raises(UserError, match="train_dataset: expected examples of .*, got others"):
        cached_trainer(tmp_path, tiny_student, made, plain)
    beyond = made.dataset().map(lambda x: {"labels": [10**6] * len(x["input_ids"])})
    with pytest.raises(UserError, match="train_dataset: expected labels that number the 93 states"):
        cached_trainer(tmp_path, tiny_student, made, beyond)
    tokenizer = load_tokenizer(tiny_student)
    made.check_tokenizer(tokenizer, "processing_class")
    tokenizer.add_tokens(["novel"])
    with pytest.raises(UserError, match="processing_class: expected the tokenizer that"):
        made.check_tokenizer(tokenizer, "processing_class")


def test_distill_from_a_cache(made, tmp_path, tiny_student, data):
    flags = [
        "--model_name_or_path", str(tiny_student), "--teacher", "cache", "--teacher_cache",
        str(made.path), "--output_dir", str(tmp_path / "out"), "--max_steps", "2",
        "--per_device_train_batch_size", "3", "--report_to", "none", "--save_strategy", "no",
        "--gradient_checkpointing", "false", "--action_top_k", str(K), "--action_top_p", str(P),
        "--logging_steps", "1",
    ]  # fmt: skip
    other = write(tmp_path / "other.jsonl", records(3))
    with pytest.raises(UserError, match="train_file: expected the content of train.jsonl"):
        distill.run([*flags, "--train_file", str(other)])
    with pytest.raises(UserError, match="eval_file: expected none with teacher: cache"):
        distill.run([*flags, "--eval_file", str(other)])
    distill.run([*flags, "--train_file", str(data)])
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert log[0]["set_size"] > 1


def test_a_run_goes_on_from_its_own_cache(made, tmp_path, tiny_teacher, tiny_student, data):
    kept = ["--save_strategy", "steps", "--save_steps", "1"]
    distill.run(distilling(tiny_student, made, tmp_path / "out", *kept))
    moved = tmp_path / made.path.name
    shutil.copytree(made.path, moved)
    steps = ["--max_steps", "2"]
    distill.run(distilling(tiny_student, Cache(moved), tmp_path / "out", *kept, *steps))
    other = run(tmp_path / "other", model=tiny_student, data=data)
    with pytest.raises(UserError, match="^teacher_cache: expected .* as in .*settings.json, got"):
        distill.run(distilling(tiny_student, other, tmp_path / "out", *kept))


OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' says: ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant says: ' }}{% endif %}"
)


def with_template(model, path, template):
    """A copy of a model whose tokenizer has another chat template."""
    shutil.copytree(model, path)
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = template
    (path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(path)
    return path


def distilling(student, cache, out, *more):
    return [
        "--model_name_or_path", str(student), "--teacher", "cache", "--teacher_cache",
        str(cache.path), "--output_dir", str(out), "--max_steps", "1", "--report_to", "none",
        "--per_device_train_batch_size", "3", "--save_strategy", "no", "--use_cpu", "true",
        "--gradient_checkpointing", "false", "--action_top_k", str(K), "--action_top_p", str(P),
        *more,
    ]  # fmt: skip


def test_a_student_with_another_chat_template(made, tmp_path, tiny_teacher, tiny_student, data):
    """Its prompts would not be those that it learned from."""
    other = with_template(tiny_student, tmp_path / "other", OTHER_TEMPLATE)
    with pytest.raises(UserError, match="train_file: expected the tokens of .*chat template"):
        distill.run(distilling(other, made, tmp_path / "a", "--train_file", str(data)))
    with pytest.raises(
        UserError, match="processing_class: expected the chat template of .*another"
    ):
        distill.run(distilling(other, made, tmp_path / "b"))
    none = with_template(tiny_student, tmp_path / "none", None)
    with pytest.raises(UserError, match="processing_class: expected the chat template .*got none"):
        distill.run(distilling(none, made, tmp_path / "c"))
    # TRL gives it the teacher's
    (tmp_path / "t.jinja").write_text(tiny.CHAT_TEMPLATE)
    distill.run(
        distilling(none, made, tmp_path / "c", "--chat_template_path", str(tmp_path / "t.jinja"))
    )
    # the same tokens by other words
    same = with_template(tiny_student, tmp_path / "same", "{# - #}" + tiny.CHAT_TEMPLATE)
    with pytest.raises(UserError, match="processing_class: expected the chat template of"):
        distill.run(distilling(same, made, tmp_path / "d"))
    distill.run(distilling(same, made, tmp_path / "d", "--train_file", str(data)))
    assert (tmp_path / "d" / "final" / "config.json").exists()
    # no conversation, no template
    lines = [{"prompt": "say " + word, "completion": " " + word} for word in WORDS]
    plain = write(tmp_path / "plain.jsonl", lines)
    sets = run(tmp_path / "plain", model=tiny_teacher, data=plain)
    assert sets.manifest.chat_template is None
    cached_trainer(tmp_path, other, sets)


def test_the_extent_of_examples():
    lists = {"input_ids": [[1, 9, 3], [], [4]], "labels": [[-100, 9, 3], [], [4]]}
    assert caches.extent(Dataset.from_dict(lists)) == (3, 9, 2)
    packed = {"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, -100, 4]], "seq_lengths": [[1, 3]]}
    assert caches.extent(Dataset.from_dict(packed)) == (3, 4, 1)
    many = Dataset.from_dict({name: column * 999 for name, column in lists.items()})
    assert caches.extent(many) == (3, 9, 1998)
    assert caches.extent(many.select([2, 2])) == (1, 4, 0)
    assert caches.extent(many.select([])) == (0, 0, 0)


def test_the_hash_of_tokens():
    """Of what is learned, where examples end, and nothing else."""
    lists = [[1, 2, 3], [4], [5, 6]]
    labels = [[-100, 2, 3], [4], [-100, 6]]

    def hashed(ids, labels):
        return caches.tokens_hash(Dataset.from_dict({"input_ids": ids, "labels": labels}))

    whole = hashed(lists, labels)
    twice = Dataset.from_dict({"input_ids": lists[::-1] * 999, "labels": labels[::-1] * 999})
    assert caches.tokens_hash(twice.select([2, 1, 0])) == whole
    assert caches.tokens_hash(twice) == caches.tokens_hash(twice.filter(lambda x: True))
    assert hashed(lists[::-1], labels[::-1]) != whole
    assert hashed(lists, [[1, 2, 3], *labels[1:]]) != whole
    assert hashed([[1, 2], [3, 4], [5, 6]], [[-100, 2], [3, 4], [-100, 6]]) != whole


GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_the_assistant_says(tmp_path, tiny_teacher, tiny_student, data):
    """As TRL's trainer masks it."""
    teacher = with_template(tiny_teacher, tmp_path / "teacher", GENERATION_TEMPLATE)
    student = with_template(tiny_student, tmp_path / "student", GENERATION_TEMPLATE)
    turns = [{"messages": [*x["prompt"], *x["completion"], *y["prompt"], *y["completion"]]}
             for x, y in zip(records(5), records(7)[2:], strict=True)]  # fmt: skip
    talk = write(tmp_path / "talk.jsonl", turns)
    every = run(tmp_path / "every", model=teacher, data=talk)
    made = run(tmp_path / "c", model=teacher, data=talk, assistant_only_loss=True)
    assert 0 < made.manifest.states < every.manifest.states / 2
    tokenizer = load_tokenizer(student)
    live = TDTrainer(
        load_model(student), str(teacher),
        config(tmp_path, assistant_only_loss=True, max_length=64),
        train_dataset=distill.load_data(str(talk), "train_file", tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    for ours, theirs in zip(made.dataset(), live.train_dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        learned = [x if y >= 0 else -100 for x, y in zip(*_columns(ours), strict=True)]
        assert learned == theirs["labels"]
    distill.run(
        distilling(student, made, tmp_path / "out", "--assistant_only_loss", "true", "--train_file",
              str(talk), "--max_length", "64")
    )  # fmt: skip
    with pytest.raises(UserError, match="assistant_only_loss: expected False as in .*, got True;"):
        cached_trainer(tmp_path, student, every, assistant_only_loss=True)
    with pytest.raises(UserError, match="assistant_only_loss: expected True as in .*, got False"):
        cached_trainer(tmp_path, student, made)
    with pytest.raises(
        UserError, match="assistant-only-loss: The chat template is not training-co"
    ):
        run(tmp_path / "no", model=tiny_teacher, data=talk, assistant_only_loss=True)
    cut = write(tmp_path / "cut.jsonl", [{**x, "truncated": True} for x in records(3)])
    with pytest.raises(UserError, match="assistant-only-loss: expected chat messages that do not"):
        run(tmp_path / "no", model=teacher, data=cut, assistant_only_loss=True)


def test_a_model_is_hashed_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    content = bytearray(2 * caches.PART + 5)
    file.write_bytes(content)
    parts = []
    before = caches.folder_hash(tmp_path, parts.append)
    assert sum(parts) == len(content) + 2
    for place in (0, len(content) // 3, len(content) - 1):
        content[place] = 1
        file.write_bytes(content)
        after = caches.folder_hash(tmp_path)
        assert after != before
        before = after


def test_checksums_may_be_left_out(made, tmp_path, tiny_student, monkeypatch):
    read = []
    file_hash = caches.file_hash
    monkeypatch.setattr(caches, "file_hash", lambda path: read.append(path) or file_hash(path))
    cached_trainer(tmp_path, tiny_student, made)
    assert len(read) == 3
    cached_trainer(tmp_path, tiny_student, made, teacher_cache_verify=False)
    assert len(read) == 3


def test_the_device_is_the_one_that_was_asked_for(tmp_path, tiny_teacher, data, monkeypatch):
    """TRL's configuration, which prepares the data, has a device of its own."""
    loaded = []

    def load(path, **options):
        loaded.append(options["device"])
        return load_model(path, **options)

    monkeypatch.setattr(command, "load_model", load)
    run(tmp_path / "c", model=tiny_teacher, data=data, device="cpu:0")
    assert loaded == [torch.device("cpu:0")]


def test_the_dtype_of_the_teacher(tmp_path, tiny_teacher, data):
    half = tmp_path / "half"
    shutil.copytree(tiny_teacher, half)
    load_model(half, dtype=torch.bfloat16).save_pretrained(half)
    assert load_model(half, dtype=command._dtype("auto", torch.device("cuda"))).dtype == (
        torch.bfloat16
    )
    for name, dtype in (("auto", "float32"), ("bfloat16", "bfloat16")):
        made = run(tmp_path / name, model=half, data=data, model_dtype=name)
        assert made.manifest.model_dtype == dtype


def test_what_does_not_fit_is_refused(tmp_path):
    """Nothing wraps: neither numbers of two bytes nor offsets of four."""
    most = np.iinfo(np.uint16).max

    def write_one(tokens, members, vocab_size):
        states = Example(
            np.array(tokens), np.array([False, True]), np.array([members]), np.arange(members),
            np.full(members, -12.0, np.float32), np.zeros(1, np.float32),
        )  # fmt: skip
        return caches.write_shard(
            tmp_path, 0, [states], vocab_size=vocab_size, dtype="float16", tail=True
        )

    with pytest.raises(UserError, match="count: expected numbers of at most 65535, got 65536"):
        write_one([1, 2], most + 1, 70_000)
    with pytest.raises(UserError, match="input_ids: expected numbers of at most 65535, got 70000"):
        write_one([1, 70_000], 3, 300)
    write_one([1, 2], most, 70_000)
    schema = pa.ipc.open_stream(tmp_path / "sets-00000.arrow").schema
    assert schema.field("ids").type == pa.large_list(pa.uint32())
    assert schema.field("log_probs").type == pa.large_list(pa.float16())

    class Long:
        def __len__(self):
            return 2**30

    with pytest.raises(UserError, match="shard-examples: expected at most 2147483647 mask in a fi"):
        caches._lists("mask", [Long(), Long()], pa.bool_())


def test_options_are_refused_by_name(tmp_path, tiny_teacher, data, capsys):
    for flags, words in {
        ("--action-top-k", "0"): "action-top-k: expected a number >= 1, got 0",
        ("--action-top-p", "1.5"): "action-top-p: expected a number in (0, 1], got 1.5",
        ("--teacher-temperature", "0"): "teacher-temperature: expected a finite number > 0, got 0",
        ("--log-probs", "int8"): "log-probs: expected one of float16, bfloat16, got 'int8'",
        ("--model-dtype", "int8"): "model-dtype: expected one of",
        ("--max-length", "2"): "data: expected a token to learn that has others before it, got",
        ("--served", "x"): "served: expected neither --model nor --data",
        ("--action-top-k", "65536"): "action-top-k: expected at most the 65535 members",
        ("--vocab-size", "0"): "vocab-size: expected a number >= 1, got 0",
        ("--tokenizer", "x"): "tokenizer: expected it beside --served alone, got x",
    }.items():
        sys.argv = [
            "tdkd", "cache", "--model", str(tiny_teacher), "--data", str(data), "--output",
            str(tmp_path / "c"), "--device", "cpu", *flags,
        ]  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main()
        assert words in capsys.readouterr().err
    sys.argv = ["tdkd", "cache", "--output", str(tmp_path / "c")]
    with pytest.raises(SystemExit):
        cli.main()
    assert "model: expected --model and --data, or --served" in capsys.readouterr().err


def test_an_adapter_may_teach(tmp_path, tiny_teacher, data):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(tiny_teacher), config).save_pretrained(tmp_path / "adapter")
    load_tokenizer(tiny_teacher).save_pretrained(tmp_path / "adapter")
    cache = run(tmp_path / "c", model=tmp_path / "adapter", data=data)
    example = cache.dataset()[0]
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
    where = (labels >= 0).nonzero().squeeze(-1)
    expected = live_sets(tmp_path / "adapter", ids, where)
    assert torch.equal(cache.sets(labels[where].numpy()).ids, expected.ids)
    before = cache.manifest.teacher["sha256"]
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    assert caches.folder_hash(tmp_path / "adapter") != before


def test_a_slow_tokenizer_is_refused(tmp_path, tiny_teacher, data, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(UserError, match="^tokenizer: expected a fast one, which says how it makes"):
        run(tmp_path / "c", model=tiny_teacher, data=data)


def test_examples_longer_than_the_positions_are_refused(tmp_path, tiny_teacher):
    long = write(tmp_path / "long.jsonl", [{"prompt": "why", "completion": "x" * 600}])
    with pytest.raises(UserError, match="^max-length: expected sequences of at most 512 tokens"):
        run(tmp_path / "c", model=tiny_teacher, data=long, max_length=1000)


def test_a_max_length_beyond_that_of_a_cache(tmp_path, tiny_teacher, tiny_student, data):
    """Where the cache has cut examples a live teacher would see more of them."""
    short = run(tmp_path / "short", model=tiny_teacher, data=data, max_length=24)
    refused = (
        "^max_length: expected at most the 24 .*short were cut at, got 1024; set max_length: 24"
    )
    with pytest.raises(UserError, match=refused):
        cached_trainer(tmp_path, tiny_student, short)
    with pytest.raises(UserError, match="^max_length: expected at most the 24"):
        distill.run(distilling(tiny_student, short, tmp_path / "out"))
    for options in ({"max_length": 24}, {"max_length": None}, {"packing": True}):
        cached_trainer(tmp_path, tiny_student, short, **options)
    whole = run(tmp_path / "whole", model=tiny_teacher, data=data, max_length=64)
    assert max(map(len, whole.dataset()["input_ids"])) < 64
    cached_trainer(tmp_path, tiny_student, whole, max_length=100)  # nothing was cut


def test_a_max_length_that_leaves_nothing_of_a_cache(tmp_path, made, tiny_student):
    with pytest.raises(UserError, match=r"expected at least one example, got none that max_length"):
        cached_trainer(tmp_path, tiny_student, made, max_length=2)


def test_states_may_be_numbered_by_a_tensor_or_a_list(made):
    wanted = made.sets(np.array([3, -1, 0]))
    for numbers in (torch.tensor([3, -1, 0]), [3, -1, 0]):
        assert torch.equal(made.sets(numbers).ids, wanted.ids)
        assert (made.tokens(numbers) == made.tokens(np.array([3, -1, 0]))).all()
