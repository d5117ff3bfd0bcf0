"""The student's own answers: sampling, replay, what is learned from them, and resuming."""

import importlib.util
import inspect
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import yaml
from test_trainer import Batches, conversations, losses, trainer
from trl.distributed import DistributedBackend

from tdkd import online, ops
from tdkd.errors import UserError
from tdkd.models import cache_argument, load_model, positions
from tdkd.objectives import (
    JSD,
    LSIQ,
    SQIL,
    CrossEntropy,
    ForwardKL,
    IQLearn,
    ReverseKL,
    as_objective,
)
from tdkd.trainer import TDConfig, response_rows

EOS = 2
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65]]
KL = "ForwardKL(tail=True)"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def answers(model, *, teacher=None, seed=0, prompts=PROMPTS, eos=(EOS,), batch_size=None, **law):
    law = {"max_completion_length": 8, **law}
    return online.sample(
        model,
        prompts,
        online.Sampling(**law),
        eos=list(eos),
        pad_token_id=0,
        generator=generator(seed),
        teacher=teacher,
        batch_size=batch_size,
    )


def next_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def online_run(tmp_path, teacher, student, **options):
    """A run whose steps learn from answers of at most 6 tokens."""
    defaults = {"lmbda": 1.0, "max_completion_length": 6, "objective_text": KL}
    return trainer(tmp_path, teacher, student, **{**defaults, **options})


def parameters(run):
    return [p.detach().clone() for p in run.model.parameters()]


def same(got, expected):
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def completions(batch):
    """``(prompt, completion)`` of each sequence of a batch."""
    found = []
    for ids, labels in online.sequences(batch):
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert labels[first:] == ids[first:]
        found.append((tuple(ids[:first]), tuple(ids[first:])))
    return found


def replays(run):
    """Whether each step of the run took kept answers, as it goes on."""
    told, again = [], run._rollouts._again
    run._rollouts._again = lambda step: (told.append(again(step)), told[-1])[1]
    return told


def data_pairs(run):
    pairs = set()
    for example in run.train_dataset:
        first = next(i for i, label in enumerate(example["labels"]) if label != -100)
        pairs.add((tuple(example["input_ids"][:first]), tuple(example["input_ids"][first:])))
    return pairs


# Sampling


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"temperature": 1e-4}, {"top_k": 1}])
def test_a_greedy_answer_is_the_students_argmax(tiny_student, greedy):
    """Each token by token from the whole sequence, without padding and without a cache."""
    student = load_model(tiny_student)
    for prompt, completion in zip(PROMPTS, answers(student, **greedy), strict=True):
        ids = list(prompt)
        for token in completion:
            assert token == next_logits(student, ids).argmax()
            ids.append(token)
        assert len(completion) == 8 or completion[-1] == EOS


def test_tokens_follow_the_students_law(tiny_student):
    """20,000 first tokens of one prompt against its probabilities, filtered and tempered."""
    student = load_model(tiny_student)
    law = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    n = 20_000
    drawn = answers(student, prompts=[PROMPTS[0]] * n, max_completion_length=1, **law)
    seen = torch.zeros(264).index_add_(0, torch.tensor(drawn).flatten(), torch.ones(n)) / n

    scores = next_logits(student, PROMPTS[0]) / 0.7
    order = scores.argsort(descending=True)
    p = scores[order[:40]].softmax(-1)
    size = int((p.cumsum(-1) < 0.9).sum()) + 1
    assert 1 < size < 40
    expected = torch.zeros(264).scatter(0, order[:size], p[:size] / p[:size].sum())
    assert (seen[expected == 0] == 0).all()
    # five standard deviations of each frequency
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_draw_never_takes_what_has_no_probability():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1 - 2**-24])
    assert online.draw(probs, uniform).tolist() == [1, 1, 3, 3, 3]
    third = torch.full((1, 3), 1 / 3)
    assert online.draw(third, torch.tensor([1.0])).item() in (0, 1, 2)


def test_an_answer_ends_with_eos_or_was_cut(writer):
    student = load_model(writer)
    drawn = answers(student, prompts=PROMPTS * 8, max_completion_length=12)
    ended = [tokens for tokens in drawn if EOS in tokens]
    cut = [tokens for tokens in drawn if EOS not in tokens]
    assert ended
    assert cut
    assert all(tokens.index(EOS) == len(tokens) - 1 for tokens in ended)
    assert all(len(tokens) == 12 for tokens in cut)
    other = drawn[0][2]
    again = answers(student, prompts=PROMPTS * 8, max_completion_length=12, eos=(EOS, other))
    assert again[0] == drawn[0][: drawn[0].index(other) + 1]


@pytest.mark.parametrize("name", ["tiny_teacher", "writer"])
def test_all_of_the_teacher_is_its_own_sampling(tiny_student, name, request):
    """Rotary positions, which padding on the left only shifts, and absolute ones."""
    student, teacher = load_model(tiny_student), load_model(request.getfixturevalue(name))
    if name == "writer":  # its positions are drawn too small to matter
        teacher.transformer.wpe.weight.data *= 50
    alone = answers(teacher, temperature=0.8, seed=3)
    assert answers(student, teacher=teacher, teacher_mixture=1.0, temperature=0.8, seed=3) == alone
    assert answers(student, temperature=0.8, seed=3) != alone
    # without its probability the teacher is not asked
    assert answers(student, teacher=None, seed=3) == answers(student, teacher=teacher, seed=3)


def test_a_mixture_draws_from_the_mean_of_the_laws(tiny_student, tiny_teacher):
    """Second tokens too: the teacher's cache is at the right place for prompts of other lengths."""
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    uniform = torch.rand(3, 3, generator=generator(5))
    drawn = answers(
        student, teacher=teacher, teacher_mixture=0.25, max_completion_length=3, seed=5, eos=(263,)
    )
    for row, (prompt, completion) in enumerate(zip(PROMPTS, drawn, strict=True)):
        ids = list(prompt)
        for step, token in enumerate(completion):
            p = next_logits(student, ids).softmax(-1)
            q = next_logits(teacher, ids).softmax(-1)
            mixed = (0.75 * p + 0.25 * q).unsqueeze(0)
            assert online.draw(mixed, uniform[row, step : step + 1]).item() == token
            ids.append(token)


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_answers_are_the_same_in_smaller_batches(tiny_student, tiny_teacher, mixture):
    """And no more of them are in memory at once than asked for."""
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    sizes = []
    for model in (student, teacher):
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, args: sizes.append(args[0].shape[0])
        )
    given = {"teacher": teacher, "teacher_mixture": mixture, "prompts": PROMPTS * 3, "seed": 4}
    whole = answers(student, **given)
    assert set(sizes) == {9}
    for batch_size, seen in ((1, {1}), (4, {4, 1}), (20, {9})):
        sizes.clear()
        assert answers(student, batch_size=batch_size, **given) == whole
        assert set(sizes) == seen


def test_an_answer_ends_where_the_positions_do(writer):
    """Of the prompt that it follows: those beside it have room."""
    student = load_model(writer)
    assert positions(student) == 256
    long = [[1, *[40] * (n - 1)] for n in (251, 4, 255, 251, 250)]
    law = {"max_completion_length": 12, "eos": (263,), "seed": 2}
    drawn = answers(student, prompts=long, positions=256, **law)
    assert [len(tokens) for tokens in drawn] == [5, 12, 1, 5, 6]
    # the numbers that decide are those of their places
    free = answers(student, prompts=[p[-9:] for p in long], **law)
    assert free[1] == drawn[1]
    with pytest.raises(UserError, match="max_length: expected prompts of fewer .* 256 .*of 256"):
        answers(student, prompts=[[1] * 256], positions=256)


def test_positions_are_those_that_all_models_have(writer, tiny_teacher):
    small, large = load_model(writer), load_model(tiny_teacher)
    assert positions(large) == 512
    assert positions(large, small) == 256
    large.config.max_position_embeddings = -1
    assert positions(large) is None
    assert positions(large, small) == 256


def test_padding_columns_are_never_drawn(tiny_student, tiny_teacher):
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    teacher.resize_token_embeddings(300)
    drawn = answers(
        student, teacher=teacher, teacher_mixture=0.5, vocab_size=50, max_completion_length=20
    )
    tokens = {token for completion in drawn for token in completion}
    assert max(tokens) < 50
    assert len(tokens) > 5


def test_generation_does_not_trace_a_compiled_body(tiny_student, tiny_teacher):
    """One graph for every length would cost more than it brings."""
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    plain = answers(student, teacher=teacher, teacher_mixture=0.5)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for model in (student, teacher):
        model.model.compile(backend=backend)
    assert answers(student, teacher=teacher, teacher_mixture=0.5) == plain
    assert not graphs
    student.model(torch.tensor([[1, 2, 3]]))
    assert graphs


def test_generation_leaves_the_model_as_it_was(tiny_student):
    """Penalties of the model's own config do not enter, and modes come back, one by one."""
    student = load_model(tiny_student)
    plain = answers(student, temperature=0)
    student.train()
    student.model.layers[0].eval()
    student.generation_config.repetition_penalty = 9.0
    config = student.generation_config
    modes = [module.training for module in student.modules()]
    assert answers(student, temperature=0) == plain
    assert student.generation_config is config
    assert [module.training for module in student.modules()] == modes


# Replay


def test_replay_is_bounded_and_comes_back():
    replay = online.Replay(3)
    held = [online.Answer([1, i], [i] * (i + 1)) for i in range(5)]
    replay.add(held)
    assert list(replay.answers) == held[2:]
    drawn = replay.sample(3, generator(1))
    assert sorted(drawn) == held[2:]
    assert replay.sample(3, generator(1)) == drawn
    assert len(replay.sample(7, generator(1))) == 7
    other = online.Replay(3)
    other.load_state_dict(replay.state_dict())
    assert list(other.answers) == held[2:]
    smaller = online.Replay(1)
    smaller.load_state_dict(replay.state_dict())
    assert list(smaller.answers) == held[4:]
    other.load_state_dict(online.Replay(2).state_dict())
    assert not other.answers


def rollouts(run, **options):
    defaults = {
        "lmbda": 1.0, "replay_size": 0, "replay_ratio": 0.0, "eos": [EOS], "seed": 0, "rank": 0,
        "total": lambda counts: counts,
    }  # fmt: skip
    return online.Rollouts(run.data_collator, **{**defaults, **options})


def count_up(prompts, generator):
    """Answers that name the length of their prompt: the even ones end, the odd ones are cut."""
    return [[100 + len(p), 7] + ([EOS] if len(p) % 2 == 0 else []) for p in prompts]


@pytest.fixture
def run(tmp_path, tiny_teacher, tiny_student):
    return online_run(tmp_path, tiny_teacher, tiny_student)


LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 128},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_and_successors_of_answers(tmp_path, tiny_teacher, tiny_student, layout):
    run = online_run(tmp_path, tiny_teacher, tiny_student, **LAYOUTS[layout])
    given = list(run.get_train_dataloader())
    made, metrics = rollouts(run)(given, 0, count_up)
    before = [pair for batch in given for pair in completions(batch)]
    after = [pair for batch in made for pair in completions(batch)]
    assert [prompt for prompt, _ in after] == [prompt for prompt, _ in before]
    assert [list(c) for _, c in after] == count_up([p for p, _ in after], None)
    ends = 0
    for batch in made:
        tokens = batch["labels"][:, 1:]
        keep, successor = response_rows(tokens, [EOS])
        taken = tokens.flatten()[keep]
        last = (taken == EOS) | ((taken == 7) & (taken.roll(-1) != EOS))
        assert torch.equal(successor[taken == EOS], torch.full_like(taken[taken == EOS], -1))
        cut = last & (taken != EOS)
        assert torch.equal(successor[cut], torch.full_like(taken[cut], -2))
        rows = torch.arange(taken.numel())
        assert torch.equal(successor[~last], rows[~last] + 1)
        assert (batch["expert_weight"][batch["labels"] != -100] == 0).all()
        ends += int((taken == EOS).sum())
    assert 0 < ends < len(after)
    assert metrics["on_policy"] == 1
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - ends / len(after))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_sequences_stay_the_datas(tmp_path, tiny_teacher, tiny_student, layout):
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, data=conversations(40), **LAYOUTS[layout]
    )
    given = list(run.get_train_dataloader())
    data = {pair for batch in given for pair in completions(batch)}
    made, metrics = rollouts(run, lmbda=0.4)(given, 0, count_up)
    own = experts = 0
    learned = answered = 0
    for batch in made:
        weight = online.sequences({**batch, "labels": batch["expert_weight"]})
        for (prompt, completion), (_, of) in zip(completions(batch), weight, strict=True):
            of = set(of[len(prompt) :])
            learned += len(completion)
            if (prompt, completion) in data:
                experts += 1
                expert_weight = of.pop()
                assert expert_weight > 1
            else:
                own += 1
                answered += len(completion)
                assert of.pop() == 0
            assert not of
    assert (own, experts) != (0, 40)
    assert own + experts == 40
    # four standard deviations
    assert abs(own - 16) <= 4 * math.sqrt(40 * 0.4 * 0.6)
    assert expert_weight == pytest.approx(learned / (learned - answered))
    assert metrics["on_policy"] == pytest.approx(answered / learned)


def test_a_step_draws_from_its_number(run):
    given = list(run.get_train_dataloader())

    def drawing(prompts, generator):
        return torch.randint(3, 200, (len(prompts), 4), generator=generator).tolist()

    def drawn(step, **options):
        made, _ = rollouts(run, **options)(given, step, drawing)
        return [pair for batch in made for pair in completions(batch)]

    assert drawn(3) == drawn(3)
    different = [drawn(3), drawn(4), drawn(3, seed=1), drawn(3, rank=1)]
    assert len({str(one) for one in different}) == 4


def test_replay_takes_the_place_of_generation(run):
    given = list(run.get_train_dataloader())
    makes = rollouts(run, replay_size=4, replay_ratio=0.5)
    asked, replayed = [], 0

    def answering(prompts, generator):
        asked.append(len(prompts))
        return [[100 + len(asked), EOS] for _ in prompts]

    for step in range(40):
        held = set(map(str, makes.replay.answers))
        before = len(asked)
        made, _ = makes(given, step, answering)
        if len(asked) == before:
            replayed += 1
            pairs = [pair for batch in made for pair in completions(batch)]
            assert {str(online.Answer(list(p), list(c))) for p, c in pairs} <= held
    # four standard deviations
    assert abs(replayed - 20) <= 4 * math.sqrt(10)
    assert len(makes.replay.answers) == 4


def test_all_processes_replay_in_the_same_steps(run):
    """One that wrote answers would keep the others waiting."""
    given = list(run.get_train_dataloader())
    wrote = []
    for rank in range(8):
        makes, steps = rollouts(run, rank=rank, replay_size=4, replay_ratio=0.5), []
        for step in range(20):
            makes(given, step, lambda *_: (steps.append(step), count_up(*_))[1])  # noqa: B023
        wrote.append(steps)
    assert 0 < len(wrote[0]) < 20
    assert all(steps == wrote[0] for steps in wrote)


def test_none_replays_before_all_have_answers(run):
    given = list(run.get_train_dataloader())

    def total(counts):
        """Of this process and of one that holds none."""
        return counts + 1 if counts.numel() == 1 else counts

    makes = rollouts(run, replay_size=4, replay_ratio=0.9, total=total)
    asked = []
    for step in range(10):
        makes(given, step, lambda *_: (asked.append(step), count_up(*_))[1])  # noqa: B023
    assert asked == list(range(10))


def test_examples_without_a_prompt_are_refused(run):
    batch = run.data_collator([{"input_ids": [1, 5, 6], "labels": [1, 5, 6]}])
    with pytest.raises(UserError, match="lmbda: expected examples with a prompt"):
        rollouts(run)([batch], 0, count_up)


def test_a_prompt_may_be_one_token_where_batches_tell(run):
    """A padding-free batch hides the first token of what is learned from its beginning, too."""
    batch = run.data_collator([{"input_ids": [7, 5, 6], "labels": [-100, 5, 6]}])
    made, _ = rollouts(run)([batch], 0, count_up)
    assert completions(made[0])[0][0] == (7,)
    run.data_collator.padding_free = True
    with pytest.raises(UserError, match="lmbda: expected examples with a prompt"):
        rollouts(run)([run.data_collator([{"input_ids": [7, 5], "labels": [7, 5]}])], 0, count_up)


def test_a_sequence_without_labels_stays(run):
    batch = run.data_collator([{"input_ids": [1, 5, 6], "labels": [-100] * 3}])
    made, metrics = rollouts(run)([batch], 0, count_up)
    assert torch.equal(made[0]["input_ids"], batch["input_ids"])
    assert metrics == {"on_policy": 0}


# Training


def test_without_lmbda_nothing_changes(tmp_path, tiny_teacher, tiny_student, monkeypatch):
    """The code has no part in it: no answer, and the same bits."""
    runs = []
    for options in ({}, {"lmbda": 0.0}):
        run = trainer(tmp_path, tiny_teacher, tiny_student, **options)
        batches = Batches(run)
        monkeypatch.setattr(online, "sample", lambda *_, **__: pytest.fail("generated"))
        run.train()
        assert "expert_weight" not in batches.seen[0]
        assert "time/generate" not in run.state.log_history[0]
        runs.append(run)
    assert losses(runs[0]) == losses(runs[1])
    assert same(parameters(runs[0]), parameters(runs[1]))


def test_all_on_policy_never_learns_from_the_datas_answers(tmp_path, tiny_teacher, tiny_student):
    run = online_run(tmp_path, tiny_teacher, tiny_student, max_steps=4)
    batches = Batches(run)
    run.train()
    data = data_pairs(run)
    seen = [pair for batch in batches.seen for pair in completions(batch)]
    assert len(seen) == 16
    assert {prompt for prompt, _ in seen} == {prompt for prompt, _ in data}
    assert not set(seen) & data
    # the second time a prompt comes its answer is another
    assert len(set(seen)) > len(data)
    entry = run.state.log_history[0]
    assert entry["on_policy"] == 1
    assert entry["completions/mean_length"] <= 6
    for name in ("generate", "prefill", "score", "learn"):
        assert entry[f"time/{name}"] > 0
    assert entry["time/prefill"] < entry["time/generate"]
    json.dumps(run.state.log_history)


def test_answers_are_those_of_the_student_of_the_moment(tmp_path, tiny_teacher, tiny_student):
    """Greedy: of the student as it was before each step."""
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, temperature=0, learning_rate=1.0, max_steps=3
    )
    students, batches = [], Batches(run)
    answering = run._answers

    def remembering(*args):
        # a copy of a model that accelerate prepared runs the weights of the original
        students.append(load_model(tiny_student))
        students[-1].load_state_dict(run.model.state_dict())
        return answering(*args)

    run._answers = remembering
    run.train()
    texts = set()
    for student, batch in zip(students, batches.seen, strict=True):
        for prompt, completion in completions(batch):
            ids = list(prompt)
            for token in completion:
                assert token == next_logits(student, ids).argmax()
                ids.append(token)
            texts.add(completion)
    assert len(texts) > 4


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_gkd_is_trls(tmp_path, tiny_teacher, tiny_student, beta):
    """lmbda, and JSD(beta) with sets of the whole vocabulary: TRL's loss, value and gradient."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    jsd = f"JSD({beta}, tail=True)"
    name = {0.0: "ForwardKL(tail=True)", 1.0: "ReverseKL(tail=True)"}.get(beta, jsd)
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, objective_text=name, action_top_k=264,
        action_top_p=1.0, max_steps=1,
    )  # fmt: skip
    before = parameters(run)
    batches = Batches(run)
    run.train()
    batch = batches.seen[0]
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    forwarded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = gkd.GKDTrainer.generalized_jsd_loss(
        student(**forwarded).logits[:, :-1],
        teacher(**forwarded).logits[:, :-1].detach(),
        labels=batch["labels"][:, 1:],
        beta=beta,
    )
    loss.backward()
    assert losses(run)[0] == pytest.approx(loss.item(), rel=1e-4)
    pairs = zip(before, parameters(run), student.parameters(), strict=True)
    for old, new, parameter in pairs:
        # one step of SGD with a rate of 0.01
        torch.testing.assert_close((old - new) / 1e-2, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [None, 3])
def test_accumulation_counts_what_was_generated(tmp_path, tiny_teacher, tiny_student, at_once):
    """1 x 8 and 8 x 1 make the same answers and the same step, whose loss is a mean over them."""
    steps, seen = [], []
    for size, accumulate in ((8, 1), (1, 8)):
        run = online_run(
            tmp_path,
            tiny_teacher,
            tiny_student,
            lmbda=0.5,
            objective_text="ForwardKL(tail=True) + IQLearn('js', alpha=1.0, value='mixed')",
            lm_weight=0.3,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            generation_batch_size=at_once,
        )
        batches = Batches(run)
        items = []
        inner = run.training_step
        run.training_step = lambda m, i, n: (items.append(int(n)), inner(m, i, n))[1]  # noqa: B023
        run.train()
        pairs = [pair for batch in batches.seen for pair in completions(batch)]
        assert set(items) == {sum(len(completion) for _, completion in pairs)}
        seen.append(pairs)
        steps.append(parameters(run))
    assert seen[0] == seen[1]
    assert 0 < len(set(seen[0]) & data_pairs(run)) < 8
    for whole, parts in zip(*steps, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("replay", [{}, {"replay_size": 8, "replay_ratio": 0.5}])
def test_a_resumed_run_goes_on_exactly(tmp_path, tiny_teacher, tiny_student, replay):
    options = {
        "lmbda": 0.7, "max_steps": 8, "save_strategy": "steps", "save_steps": 3,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "optim": "adamw_torch",
        **replay,
    }  # fmt: skip
    whole = online_run(tmp_path / "whole", tiny_teacher, tiny_student, **options)
    every = Batches(whole)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "replay_0.pt").is_file() == bool(replay)
    resumed = online_run(tmp_path / "resumed", tiny_teacher, tiny_student, **options)
    rest = Batches(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(rest.seen) == 10
    for got, expected in zip(rest.seen, every.seen[6:], strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    assert same(parameters(resumed), parameters(whole))
    if replay:
        assert list(resumed._rollouts.replay.answers) == list(whole._rollouts.replay.answers)


def test_iq_learn_with_replay_resumes_exactly(tmp_path, tiny_teacher, tiny_student):
    """The guide's recipe: expert and policy states, some of the latter from the buffer."""
    (recipe,) = (recipe for recipe in RECIPES if "replay_size" in recipe)
    options = {
        **recipe, "objective_text": recipe["objective"], "max_completion_length": 4,
        "max_steps": 10, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch",
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    del options["objective"]

    def watched(name):
        run = trainer(tmp_path / name, tiny_teacher, tiny_student, **options)
        return run, Batches(run), replays(run)

    whole, every, replayed = watched("whole")
    before = parameters(whole)
    whole.train()
    assert set(replayed[:4]) == set(replayed[4:]) == {True, False}
    own = [batch["expert_weight"] == 0 for batch in every.seen]
    assert any(bool(rows.any()) and not bool(rows.all()) for rows in own)
    assert not same(parameters(whole), before)
    resumed, rest, replayed_then = watched("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert replayed_then == replayed[4:]
    for got, expected in zip(rest.seen, every.seen[8:], strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert losses(resumed) == losses(whole)
    assert all(math.isfinite(loss) for loss in losses(whole))
    assert same(parameters(resumed), parameters(whole))


def test_training_again_begins_with_nothing_to_replay(tmp_path, tiny_teacher, tiny_student):
    run = online_run(tmp_path, tiny_teacher, tiny_student, replay_size=99, replay_ratio=0.01)
    for _ in range(2):
        run.train()
        assert len(run._rollouts.replay.answers) == 8


def test_a_checkpoint_without_replay_is_told(
    tmp_path, tiny_teacher, tiny_student, caplog, monkeypatch
):
    """Where it was not kept before: the run begins to keep answers, and says so."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    online_run(tmp_path, tiny_teacher, tiny_student, **saving).train()
    run = online_run(tmp_path, tiny_teacher, tiny_student, replay_size=9, replay_ratio=0.5)
    monkeypatch.setattr(logging.getLogger("tdkd"), "propagate", True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "replay: no replay_0.pt in" in caplog.text
    assert len(run._rollouts.replay.answers) == 4


def test_evaluation_never_generates(tmp_path, tiny_teacher, tiny_student, monkeypatch):
    run = online_run(tmp_path, tiny_teacher, tiny_student)
    run.train()
    monkeypatch.setattr(online, "sample", lambda *_, **__: pytest.fail("generated"))
    evaluated = run.evaluate(conversations(4))
    offline = trainer(tmp_path, tiny_teacher, tiny_student, objective_text=KL)
    offline.model.load_state_dict(run.model.state_dict())
    assert evaluated["eval_loss"] == offline.evaluate(conversations(4))["eval_loss"]
    assert not any("time/" in name for name in evaluated)


def test_lora_answers_and_learns(tmp_path, tiny_teacher, tiny_student):
    peft = pytest.importorskip("peft")
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, temperature=0, max_steps=3, learning_rate=1.0,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    seen = []
    answering = run._answers

    def remembering(prompts, generator):
        given = answering(prompts, generator)
        seen.extend(
            token == next_logits(run.model.eval(), [*prompt, *completion[:i]]).argmax().item()
            for prompt, completion in zip(prompts, given, strict=True)
            for i, token in enumerate(completion)
        )
        return given

    run._answers = remembering
    run.train()
    assert len(seen) > 12
    assert all(seen)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_teacher, tiny_student):
    plain = online_run(tmp_path, tiny_teacher, tiny_student)
    plain.train()
    run = online_run(
        tmp_path,
        tiny_teacher,
        tiny_student,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lengths = []
    run.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: lengths.append((module.training, args[0].shape[1]))
    )
    run.train()
    assert same(parameters(run), parameters(plain))
    # in each of two steps a prompt, five tokens out of the cache, then forward and its repetition
    generated = [length for training, length in lengths if not training]
    assert [length == 1 for length in generated] == [False, *[True] * 5] * 2
    assert len(lengths) - len(generated) == 4


def test_the_teacher_mixes_in_training(tmp_path, tiny_teacher, tiny_student):
    mixed = online_run(tmp_path, tiny_teacher, tiny_student, teacher_mixture=1.0, max_steps=1)
    batches = Batches(mixed)
    mixed.train()
    teacher = load_model(tiny_teacher)
    alone = online_run(tmp_path, tiny_teacher, tiny_teacher, max_steps=1)
    expected = Batches(alone)
    alone.train()
    assert completions(batches.seen[0]) == completions(expected.seen[0])
    assert not teacher.training


def test_answers_to_long_prompts_are_cut(tmp_path, tiny_teacher, writer):
    """A student of 256 positions, one prompt of 251 tokens: it used to end in an IndexError."""
    data = conversations(4)
    long = {
        "prompt": [{"role": "user", "content": "x" * 232}],
        "completion": [{"role": "assistant", "content": "red"}],
    }
    data = type(data).from_list([long, *data])
    run = online_run(tmp_path, tiny_teacher, writer, data=data, max_completion_length=12)
    batches = Batches(run)
    run.train()
    pairs = [pair for batch in batches.seen for pair in completions(batch)]
    assert {len(prompt) for prompt, _ in pairs} >= {251}
    for prompt, completion in pairs:
        cut = min(12, 256 - len(prompt))
        assert len(completion) == cut or completion[-1] == EOS


def test_a_teacher_without_keys_scores_and_does_not_write(tmp_path, tiny_tokenizer, tiny_student):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=264, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    teacher = tmp_path / "mamba"
    transformers.MambaForCausalLM(config).save_pretrained(teacher)
    run = online_run(tmp_path, teacher, tiny_student, max_steps=1)
    run.train()
    assert math.isfinite(losses(run)[0])
    words = "teacher_mixture: expected a teacher that keeps keys and values, .*got MambaForCausalLM"
    with pytest.raises(UserError, match=words):
        online_run(tmp_path, teacher, tiny_student, teacher_mixture=0.5)


class Body(torch.nn.Module):
    _is_stateful = False
    base_model = property(lambda self: self)


class Newer(Body):
    def forward(self, input_ids, position_ids=None, cache=None): ...


class Older(Body):
    def forward(self, input_ids, position_ids=None, past_key_values=None): ...


class State(Body):
    _is_stateful = True

    def forward(self, input_ids, attention_mask=None, cache=None): ...


@pytest.mark.parametrize(
    "kind,name", [(Newer, "cache"), (Older, "past_key_values"), (State, None), (Body, None)]
)
def test_keys_and_values_go_by_the_name_of_the_release(kind, name):
    """Since transformers 5.24 it is ``cache``, as is the state of Mamba."""
    assert cache_argument(kind()) == name


TRLS = online.vllm_generation.VLLMGeneration


class Engine:
    """What TRL's VLLMGeneration is asked for, with the signature that it has, and what it would
    push."""

    made = None
    _iter_named_params = TRLS._iter_named_params
    _fix_param_name_to_vllm = TRLS._fix_param_name_to_vllm

    def __init__(self, *args, **options):
        self.given = inspect.signature(TRLS.__init__).bind(None, *args, **options)
        self.model = self.given.arguments["model"]
        self._dist = DistributedBackend(self.given.arguments["accelerator"])
        self.calls = []
        Engine.made = self

    def sync_weights(self):
        self.calls.append("sync")
        self.pushed = {name for name, _ in self._iter_named_params()}

    def generate(self, *args):
        given = inspect.signature(TRLS.generate).bind(None, *args).arguments
        prompts = given["prompts"]
        self.calls.append(prompts)
        assert given["images"] is None
        assert given["num_generations"] == 1
        return prompts, [(50 + i, 7, EOS, 9) for i in range(len(prompts))], None, None


def test_vllm_writes_the_answers(tmp_path, tiny_teacher, tiny_student, monkeypatch):
    monkeypatch.setattr(online.vllm_generation, "VLLMGeneration", Engine)
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, use_vllm=True, temperature=0.5, top_k=9, top_p=0.9,
        vllm_gpu_memory_utilization=0.2, generation_batch_size=3,
    )  # fmt: skip
    batches = Batches(run)
    run.train()
    given = Engine.made.given.arguments
    assert given["model"] is run.model
    assert given["processing_class"] is run.processing_class
    expected = {
        "mode": "colocate", "temperature": 0.5, "top_k": 9, "top_p": 0.9,
        "max_completion_length": 6, "gpu_memory_utilization": 0.2, "max_num_seqs": 3,
        "generation_kwargs": {"stop_token_ids": [EOS]},
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    assert Engine.made.calls[::2] == ["sync", "sync"]
    for prompts, batch in zip(Engine.made.calls[1::2], batches.seen, strict=True):
        wanted = [(tuple(p), (50 + i, 7, EOS)) for i, p in enumerate(prompts)]
        assert completions(batch) == wanted


def test_vllm_never_sees_the_value_head(tmp_path, tiny_teacher, tiny_student, monkeypatch):
    """It would look for a weight of that name in its own model. Here the head goes on learning."""
    monkeypatch.setattr(online.vllm_generation, "VLLMGeneration", Engine)
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, use_vllm=True, value_head=True, lmbda=0.5,
        objective_text="ForwardKL(tail=True) + IQLearn('chi2', alpha=1.0, value='mixed')",
    )  # fmt: skip
    run.train()
    weights = {name for name, _ in load_model(tiny_student).named_parameters()}
    assert Engine.made.pushed == weights
    assert {name for name, _ in run.model.named_parameters()} - weights == {"td_value_head"}
    assert run.model.td_value_head.abs().sum() > 0


def test_vllm_must_be_there(tmp_path, tiny_teacher, tiny_student):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match="use_vllm: expected vLLM to be installed, got"):
        online_run(tmp_path, tiny_teacher, tiny_student, use_vllm=True)


class Event:
    """A CUDA event whose clock moves by a millisecond at each record."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self):
        Event.now += 1
        self.at = Event.now

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return float(end.at - self.at)


def test_a_gpus_clock_is_read_at_the_log(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = online.Clock(torch.device("cuda"))
    for _ in range(2):
        clock.steps += 1
        with clock("generate"):
            pass
        for _ in range(2):
            with clock("learn"), clock("score"):
                pass
    assert not any(event.waited for of in clock.spans.values() for span in of for event in span)
    seconds = clock.read()
    # of 3 ms a micro-batch the teacher's share is 1
    expected = {"generate": 1e-3, "learn": 2 * 2e-3, "score": 2 * 1e-3}
    assert seconds == pytest.approx(expected)
    assert clock.read() == {}


def _worker(rank, world, port, folder, teacher, student):
    ranks.join(rank, world, port)
    run = online_run(
        folder, teacher, student, lmbda=0.5, per_device_train_batch_size=2, max_steps=4,
        replay_size=4, replay_ratio=0.5, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    batches = Batches(run)
    replayed = replays(run)
    run.train()
    seen = [completions(batch) for batch in batches.seen]
    weights = [batch["expert_weight"].max() for batch in batches.seen]
    log = run.state.log_history[:4]
    told = seen, weights, parameters(run), log, data_pairs(run), replayed
    torch.save(told, folder / f"{rank}.pt")
    return run


def test_two_processes_answer_by_themselves(tmp_path, tiny_teacher, tiny_student):
    """What weighs and what is logged counts the answers of both."""
    ranks.start(_worker, tmp_path, tiny_teacher, tiny_student)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert same(one[2], two[2])
    data = one[4]
    assert one[5] == two[5]
    assert set(one[5]) == {True, False}
    # in steps without an answer of one of them too: they would wait for each other in the log
    assert all("time/prefill" in entry for entry in one[3])
    assert {"replay_0.pt", "replay_1.pt"} <= {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    for step, entry in enumerate(one[3]):
        pairs = [*one[0][step], *two[0][step]]
        own = sum(len(completion) for pair in pairs if pair not in data for completion in pair[1:])
        learned = sum(len(completion) for _, completion in pairs)
        assert entry["on_policy"] == pytest.approx(own / learned, abs=1e-4)
        heaviest = max(one[1][step], two[1][step])
        assert float(heaviest) == pytest.approx(learned / (learned - own) if own < learned else 0)


# What is learned from whom


def rows_of(n=12, seed=0):
    """Logits, tokens and weights of two responses of the teacher's and two of the student's."""
    torch.manual_seed(seed)
    student = torch.randn(n, 20, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(n, 20, dtype=torch.float64)
    tokens = torch.randint(3, 20, (n,))
    successor = torch.arange(1, n + 1)
    successor[[2, 5, 8, 11]] = torch.tensor([-1, -2, -1, -2])
    own = torch.arange(n) >= 6
    return student, teacher, tokens, successor, own


def weights(own):
    return torch.where(own, 0.0, own.numel() / (~own).sum().double())


OPTIONS = {"k": 20, "top_p": 1.0, "gamma": 0.9, "reduction": "sum"}


@pytest.mark.parametrize("phi", ["chi2", "js"])
def test_mixed_iq_learn_is_the_papers_online_form(phi):
    """-E_expert[phi(Q - gamma V')] + E_all[V - gamma V'], from full log-probabilities."""
    student, teacher, tokens, successor, own = rows_of()
    successor[5] = successor[11] = -1
    z = student.log_softmax(-1)
    value = 0 * z.sum(-1)  # sets hold all, so that V of log-probabilities is 0
    q = z[torch.arange(12), tokens]
    x = q - 0.9 * value
    phis = {"chi2": x - x**2 / 4, "js": torch.log(2 - torch.exp(-x))}
    if phi == "js":  # undefined below -log 2: there it is its tangent of slope 10
        knee = math.log(1.1 / 2)
        phis["js"] = torch.where(
            x < knee, math.log(2 - math.exp(-knee)) + 10 * (x - knee), phis[phi]
        )
    objective = IQLearn(phi, alpha=1.0, value="mixed")
    out = ops.td_loss(
        student, teacher, tokens, objective=objective, successor=successor,
        expert_weight=weights(own), **{**OPTIONS, "reduction": "mean"},
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-phis[phi][~own].mean().item(), rel=1e-9)
    # with smaller sets V is not 0, and every state has a say in it
    small = {**OPTIONS, "k": 4, "top_p": 0.8, "reduction": "mean"}
    out = ops.td_loss(
        student, teacher, tokens, objective=objective, successor=successor,
        expert_weight=weights(own), **small,
    )  # fmt: skip
    future = torch.where(successor >= 0, out.value[successor.clamp(min=0)], 0.0)
    phi_term = objective._phi(out.q - 0.9 * future)[~own].mean()
    expected = -phi_term + (out.value - 0.9 * future).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    (grad,) = torch.autograd.grad(out.loss, student)
    assert (grad[own].abs().sum(-1) > 0).all()


def loss_of(objective, given, **options):
    student, teacher, tokens, successor, _ = given
    out = ops.td_loss(
        student, teacher, tokens, objective=objective, successor=successor,
        **{**OPTIONS, "k": 5, "top_p": 0.8, **options},
    )  # fmt: skip
    return out.loss


@pytest.mark.parametrize(
    "objective",
    [
        IQLearn("js", alpha=1.0),
        IQLearn("js", alpha=1.0, expectation="teacher"),
        CrossEntropy(tail=True),
        0.3 * CrossEntropy() + IQLearn(alpha=2.0, stop_gradient="next"),
    ],
    ids=repr,
)
def test_what_imitates_leaves_the_students_rows_alone(objective):
    given = rows_of()
    own = given[-1]
    got = loss_of(objective, given, expert_weight=weights(own), reduction="none")
    plain = loss_of(objective, given, reduction="none")
    torch.testing.assert_close(got[~own], 2 * plain[~own])
    assert (got[own] == 0).all()
    (grad,) = torch.autograd.grad(got.sum(), given[0])
    assert (grad[own] == 0).all()


@pytest.mark.parametrize("objective", [ForwardKL(tail=True), ReverseKL(tail=True), JSD(0.3)])
def test_what_compares_laws_does_not_ask_whose_state_it_is(objective):
    given = rows_of()
    weighted = loss_of(objective, given, expert_weight=weights(given[-1]))
    assert weighted.item() == loss_of(objective, given).item()


@pytest.mark.parametrize(
    "objective",
    [IQLearn(alpha=1.0, value="mixed"), IQLearn(alpha=1.0, value="initial"), LSIQ(), SQIL()],
    ids=repr,
)
def test_weights_of_one_change_nothing(objective):
    given = rows_of()
    ones = torch.ones(12)
    assert loss_of(objective, given, expert_weight=ones).item() == pytest.approx(
        loss_of(objective, given).item(), rel=1e-12
    )
    if isinstance(objective, IQLearn) and objective.value == "mixed":
        expert = IQLearn(alpha=1.0)
        assert loss_of(objective, given).item() == loss_of(expert, given).item()


def test_sqil_rewards_the_teachers_rows_alone():
    given = rows_of()
    student, teacher, tokens, successor, own = given
    options = {**OPTIONS, "q": "logit", "reduction": "none"}
    out = ops.td_loss(
        student, teacher, tokens, objective=SQIL(), successor=successor,
        expert_weight=weights(own), **options,
    )  # fmt: skip
    expected = (out.td_error - (~own).double()).square()
    expected[successor == -2] = 0
    torch.testing.assert_close(out.loss, expected)


def test_lsiq_takes_the_teachers_half_from_the_teachers_rows():
    given = rows_of()
    own = given[-1]
    weighted = loss_of(LSIQ(0.5, clip=False), given, expert_weight=weights(own), reduction="none")
    student, teacher, tokens, successor, _ = given
    out = ops.td_loss(
        student, teacher, tokens, objective=LSIQ(0.5, clip=False), successor=successor,
        **{**OPTIONS, "k": 5, "top_p": 0.8},
    )  # fmt: skip
    future = 0.9 * torch.where(successor >= 0, out.value[successor.clamp(min=0)], 0.0)
    v, x = out.value - future, out.q - future
    students, teachers = v + v**2 / 4, x - x**2 / 4
    expected = torch.where(own, students, students - 2 * teachers)
    expected[successor == -2] = 0
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_linear_form_takes_the_same_weights(monkeypatch, chunked):
    """Also where gradients are made in forward, chunk by chunk."""
    from tdkd.kernels import head

    student, teacher, tokens, successor, own = rows_of()
    hidden = torch.randn(12, 6, requires_grad=True)
    weight = torch.randn(20, 6, requires_grad=True)
    given = {
        "objective": IQLearn("js", alpha=1.0, value="mixed"), "successor": successor,
        "expert_weight": weights(own), **OPTIONS,
    }  # fmt: skip
    dense = ops.td_loss(hidden @ weight.T, teacher.float(), tokens, **given)
    wanted = torch.autograd.grad(dense.loss, (hidden, weight))
    if chunked:
        monkeypatch.setattr(head, "chunk_rows", lambda *_: 6)
    actions = ops.select_actions(teacher.float(), 20, 1.0, include=tokens)
    linear = ops.linear_td_loss(hidden, weight, tokens, actions=actions, **given)
    assert linear.loss.item() == pytest.approx(dense.loss.item(), rel=1e-5)
    for got, expected in zip(
        torch.autograd.grad(linear.loss, (hidden, weight)), wanted, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_wrong_weights_are_named():
    student, teacher, tokens, successor, own = rows_of()
    with pytest.raises(ValueError, match=r"expert_weight: expected .*\(12,\)"):
        ops.td_loss(student, teacher, tokens, expert_weight=torch.ones(3))
    with pytest.raises(TypeError, match="expert_weight: expected"):
        ops.td_loss(student, teacher, tokens, expert_weight=~own)


def test_the_lm_loss_is_of_the_datas_tokens(tmp_path, tiny_teacher, tiny_student):
    """The mean over the data's tokens, whatever share of the step they are."""
    run = online_run(
        tmp_path, tiny_teacher, tiny_student, lmbda=0.5, lm_weight=1.0, max_steps=1,
        objective_text="0.0 * ForwardKL()",
    )  # fmt: skip
    batches = Batches(run)
    run.train()
    (batch,) = batches.seen
    student = load_model(tiny_student)
    forwarded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = student(**forwarded).logits[:, :-1]
    data = (batch["expert_weight"] > 0) & (batch["labels"] != -100)
    assert 0 < int(data.sum()) < int((batch["labels"] != -100).sum())
    expected = torch.nn.functional.cross_entropy(
        logits[data[:, 1:]], batch["labels"][:, 1:][data[:, 1:]]
    )
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)


GUIDE = Path(__file__).parent.parent / "docs" / "teachers.md"
RECIPES = [
    yaml.safe_load(block)
    for block in re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    if "lmbda" in block
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.get("objective")))
def test_the_recipes_of_the_guide_train(tmp_path, tiny_teacher, tiny_student, recipe):
    given = {**recipe, "max_completion_length": 4, "objective_text": recipe.get("objective")}
    given.pop("objective", None)
    run = trainer(tmp_path, tiny_teacher, tiny_student, **given)
    run.train()
    assert len(losses(run)) == 2
    assert all(math.isfinite(loss) for loss in losses(run))
    assert run.state.log_history[0]["on_policy"] > 0


# Refusals

REFUSED = [
    ({"lmbda": 1.5}, r"lmbda: expected a number in \[0, 1\], got 1.5"),
    ({"max_completion_length": 0}, "max_completion_length: expected a number >= 1, got 0"),
    ({"temperature": -1}, "temperature: expected a number >= 0, got -1"),
    ({"top_k": -1}, "top_k: expected a number >= 0, got -1"),
    ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
    ({"teacher_mixture": 2}, r"teacher_mixture: expected a number in \[0, 1\], got 2"),
    ({"replay_ratio": 1.0}, r"replay_ratio: expected a number in \[0, 1\), got 1.0"),
    ({"lmbda": 0.5, "replay_size": 9}, "replay_size: expected it together with replay_ratio"),
    ({"teacher_mixture": 0.5}, "teacher_mixture: expected it to be left out with lmbda: 0"),
    ({"use_vllm": True}, "use_vllm: expected it to be left out with lmbda: 0"),
    ({"generation_batch_size": 8}, "generation_batch_size: expected it to be left out with lm"),
    ({"generation_batch_size": 0}, "generation_batch_size: expected a number >= 1, got 0"),
    (
        {"lmbda": 0.5, "use_vllm": True, "teacher_mixture": 0.5},
        "use_vllm: expected False with teacher_mixture",
    ),
    ({"vllm_gpu_memory_utilization": 0}, r"vllm_gpu_memory_utilization: .*in \(0, 1\], got 0"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_wrong_fields_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TDConfig(output_dir=str(tmp_path), **options)


NOT_TOGETHER = [
    ({"objective_text": "ForwardKL() + 0.1 * IQLearn()"}, "lmbda: expected a number < 1"),
    ({"lm_weight": 0.1}, "lmbda: expected a number < 1 with lm_weight"),
    (
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
        "packing_strategy: expected 'bfd'.*got 'bfd_split'",
    ),
]


@pytest.mark.parametrize("options, message", NOT_TOGETHER)
def test_what_does_not_go_together_is_refused(
    tmp_path, tiny_teacher, tiny_student, options, message
):
    with pytest.raises(UserError, match=message):
        online_run(tmp_path, tiny_teacher, tiny_student, **options)


def test_what_a_trainer_cannot_hold_is_refused(run):
    args, collator = run.args, run.data_collator
    with pytest.raises(UserError, match="lmbda: expected 0 without a teacher"):
        online.check(args, None, collator, None, whole=True)
    with pytest.raises(UserError, match="lmbda: expected 0 with FSDP or DeepSpeed"):
        online.check(args, ForwardKL(), collator, run.teacher, whole=False)
    with pytest.raises(UserError, match="data_collator: expected TRL's .*got function"):
        online.check(args, ForwardKL(), lambda examples: {}, run.teacher, whole=True)
    two = SimpleNamespace(**{**vars(args), "generation_batch_size": 3, "world_size": 2})
    with pytest.raises(UserError, match="generation_batch_size: expected a multiple of the 2 pro"):
        online.check(two, ForwardKL(), collator, run.teacher, whole=True)
    # a function does not say whose tokens it learns from
    alone = SimpleNamespace(**{**vars(args), "lmbda": 1.0, "world_size": 1})
    for objective in (as_objective(lambda rows: rows.value), ForwardKL() + (lambda rows: rows.q)):
        online.check(alone, objective, collator, run.teacher, whole=True)


def test_a_checkpoint_with_a_cut_replay_is_refused(tmp_path, tiny_teacher, tiny_student):
    from tdkd import checkpoints

    run = online_run(
        tmp_path, tiny_teacher, tiny_student, save_strategy="steps", save_steps=2,
        replay_size=8, replay_ratio=0.5,
    )  # fmt: skip
    run.train()
    file = Path(tmp_path) / "checkpoint-2" / "replay_0.pt"
    checkpoints.check(file.parent)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"replay_0.pt that cannot be read"):
        checkpoints.check(file.parent)
