"""TDTrainer: losses against plain PyTorch loops, accumulation, layouts, resume, LoRA, DDP."""

import json
import math
from pathlib import Path

import pytest
import ranks
import torch
from tiny import shuffled_tokenizer

from tdkd import ops, records
from tdkd import trainer as trainer_module
from tdkd.errors import UserError
from tdkd.kernels import routes
from tdkd.models import load_model, load_tokenizer
from tdkd.objectives import ForwardKL, IQLearn, parse
from tdkd.trainer import TDConfig, TDTrainer, response_rows

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

WORDS = ["one two", "red", "a b c d e", "why?", "north by east", "0123", "tick tock", "zig"]


def conversations(n=8):
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": WORDS[i % len(WORDS)]}],
                "completion": [{"role": "assistant", "content": WORDS[(3 * i + 1) % len(WORDS)]}],
            }
            for i in range(n)
        ]
    )


def config(path, **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "normaliser": "exact",
        "action_top_k": 8,
        "action_top_p": 0.9,
        "seed": 0,
        "optim": "sgd",
    }
    if options.get("objective") is None:
        defaults["td_weight"] = 0.1
    return TDConfig(output_dir=str(path), **{**defaults, **options})


def trainer(
    tmp_path,
    teacher,
    student,
    data=None,
    objective=None,
    objective_text=None,
    peft_config=None,
    **options,
):
    options["objective"] = objective_text
    return TDTrainer(
        load_model(student),
        None if teacher is None else str(teacher),
        config(tmp_path, **options),
        train_dataset=conversations() if data is None else data,
        processing_class=load_tokenizer(student),
        objective=objective,
        peft_config=peft_config,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class Batches:
    """Remembers the micro-batches that a trainer saw."""

    def __init__(self, run):
        self.seen = []
        inner = run.compute_loss

        def recording(model, inputs, *args, **kwargs):
            self.seen.append(
                {name: value.clone() for name, value in inputs.items() if hasattr(value, "clone")}
            )
            return inner(model, inputs, *args, **kwargs)

        run.compute_loss = recording


def plain_loss(student, teacher, batch, eos):
    """The default objective from full logits, by the formulas of the paper, row by row."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z = student(**inputs).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1].double().log_softmax(-1)
    tokens = batch["labels"][:, 1:]
    kls, sets, values = [], {}, {}
    for b, i in (tokens != -100).nonzero().tolist():
        order = sorted(range(t.shape[-1]), key=lambda a: (-t[b, i, a].item(), a))
        members, mass = [], 0.0
        for a in order[:8]:
            members.append(a)
            mass += math.exp(t[b, i, a].item())
            if mass >= 0.9:
                break
        token = tokens[b, i].item()
        if token not in members:
            members = members[:7] + [token] if len(members) == 8 else [*members, token]
        p, q = t[b, i, members], z[b, i, members]
        p_rest, q_rest = 1 - p.exp().sum(), 1 - q.exp().sum()
        kls.append((p.exp() * (p - q)).sum() + p_rest * (p_rest.log() - q_rest.log()))
        values[b, i] = q.logsumexp(0)
        sets[b, i] = token
    iq = []
    for (b, i), token in sets.items():
        if token == eos:
            future = 0.0
        elif (b, i + 1) in values:
            future = 0.99 * values[b, i + 1].detach()
        else:
            continue
        delta = z[b, i, token] - future
        iq.append(values[b, i] - future - (delta - delta**2 / 4))
    return (sum(kls) + 0.1 * sum(iq)) / len(kls)


def test_two_steps_match_a_plain_loop(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student)
    batches = Batches(run)
    run.train()
    student, teacher = load_model(tiny_student).double(), load_model(tiny_teacher).double()
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-2)
    eos = load_tokenizer(tiny_student).eos_token_id
    expected = []
    for batch in batches.seen:
        loss = plain_loss(student, teacher, batch, eos)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    assert len(expected) == 2
    assert losses(run) == pytest.approx(expected, rel=1e-4)
    for got, wanted in zip(run.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)


def test_logs_what_td_needs(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student, lm_weight=0.5)
    run.train()
    entry = run.state.log_history[0]
    for name in ("td_error", "q", "value", "set_size", "teacher_mass", "student_mass", "lm_loss"):
        assert math.isfinite(entry[name])
    assert 1 <= entry["set_size"] <= 8
    assert 0 < entry["student_mass"] <= 1
    json.dumps(run.state.log_history)


def test_mass_is_logged_wherever_the_loss_knows_it(tmp_path, tiny_teacher, tiny_student):
    for name, objective, known in (
        ("set", "IQLearn(alpha=1.0)", False),
        ("tail", "ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0)", True),
    ):
        options = {"objective_text": objective, "q_level": "logit", "max_steps": 1}
        run = trainer(tmp_path / name, tiny_teacher, tiny_student, **options)
        run.train()
        entry = run.state.log_history[0]
        assert ({"student_mass", "value_gap"} <= set(entry)) == known


def test_a_level_that_drifts_is_told_also_of_a_run_that_goes_on(
    tmp_path, tiny_teacher, tiny_student, monkeypatch, caplog
):
    monkeypatch.setattr("tdkd.diagnostics.DRIFT", 0.0)
    options = {"td_weight": 1.0, "q_level": "logit", "max_steps": 3, "learning_rate": 0.1}
    whole = trainer(
        tmp_path, tiny_teacher, tiny_student, save_strategy="steps", save_steps=2, **options
    )
    whole.train()
    first = whole.state.log_history[0]["value"]
    told = f"value: its mean went from {first:.1f} to"
    assert caplog.text.count(told) == 1
    caplog.clear()
    again = trainer(tmp_path, tiny_teacher, tiny_student, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert caplog.text.count(told) == 1
    caplog.clear()
    options["q_level"] = "log_prob"  # whose mean rises when a student learns
    trainer(tmp_path / "other", tiny_teacher, tiny_student, **options).train()
    assert "its mean went" not in caplog.text


def test_sets_of_one_token_are_told_of_a_better_objective(
    tmp_path, tiny_teacher, tiny_student, caplog
):
    told = "action_top_k: 1 makes the KL that of a coin"
    trainer(tmp_path, tiny_teacher, tiny_student, td_weight=0.0, action_top_k=1)
    assert caplog.text.count(told) == 1
    caplog.clear()
    given = "CrossEntropy(tail=True) + SoftTD(huber=1)"
    trainer(tmp_path, tiny_teacher, tiny_student, objective_text=given, action_top_k=1)
    trainer(tmp_path, tiny_teacher, tiny_student)
    assert told not in caplog.text


@pytest.mark.parametrize("normaliser", ["exact", "batch", "sampled"])
def test_accumulation_is_one_batch(tmp_path, tiny_teacher, tiny_student, normaliser, monkeypatch):
    """1 x 8 and 8 x 1 give the same parameters after a step; every column is held, or sampled."""
    steps = []
    if normaliser == "sampled":
        monkeypatch.setattr(routes, "samples", lambda *size: True)
    for size, accumulate in ((8, 1), (1, 8)):
        run = trainer(
            tmp_path,
            tiny_teacher,
            tiny_student,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            lm_weight=0.3,
            normaliser=normaliser,
            batch_vocabulary_extra=1000,
        )
        run.train()
        steps.append([p.detach().clone() for p in run.model.parameters()])
    for whole, parts in zip(*steps, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"td_weight": 0.0, "action_top_k": 1}])
def test_the_lm_loss_beside_an_exact_objective_is_a_term_of_it(
    tmp_path, tiny_teacher, tiny_student, monkeypatch, options
):
    """One pass over the head in place of two gives the same step, and the same entry in the log."""
    logs, steps = [], []
    for folded in (True, False):
        run = trainer(tmp_path, tiny_teacher, tiny_student, lm_weight=0.3, max_steps=1, **options)
        assert run._lm_is_folded()
        if folded:
            monkeypatch.setattr(trainer_module, "lm_cross_entropy", None)  # not called
        else:
            monkeypatch.undo()
            monkeypatch.setattr(run, "_lm_is_folded", lambda: False)
        run.train()
        run.evaluate(conversations(4))
        steps.append([p.detach().clone() for p in run.model.parameters()])
        logs.append(run.state.log_history)
    for got, expected in zip(*steps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for got, expected in zip(*logs, strict=True):
        for name in ("loss", "lm_loss", "eval_loss", "eval_lm_loss"):
            assert got.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"lm_weight": 0.0},
        {"normaliser": "batch"},
        {"q_level": "logit"},
        {"student_temperature": 2.0},
        {"vocab_size": 260},
        {"value_head": True},
        {"objective_text": "IQLearn(alpha=1.0)"},  # rows without a successor do not count
    ],
)
def test_where_the_lm_loss_is_another_sum(tmp_path, tiny_teacher, tiny_student, options):
    run = trainer(tmp_path, tiny_teacher, tiny_student, **{"lm_weight": 0.3, **options})
    assert not run._lm_is_folded()


def test_the_lm_loss_in_the_log_is_a_mean_over_tokens(tmp_path, tiny_teacher, tiny_student):
    """Micro-batches without a token of the data do not lower it."""
    run = trainer(tmp_path, tiny_teacher, tiny_student)
    run.model.train()
    recorded = run._metrics["train"]
    recorded["lm_loss"] = [torch.tensor([6.0, 3.0]), torch.tensor([0.0, 0.0])]
    recorded["value"] = [torch.tensor(1.0), torch.tensor(3.0)]
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["lm_loss"] == 2.0
    assert run.state.log_history[-1]["value"] == 2.0
    recorded["lm_loss"] = [torch.tensor([0.0, 0.0])]
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["lm_loss"] == 0.0


@pytest.mark.parametrize("bf16", [True, False])
def test_heads_run_in_the_mixed_precision_of_the_step(
    tmp_path, tiny_teacher, tiny_student, monkeypatch, bf16
):
    calls = []

    def noted(function):
        def call(*args, **kwargs):
            calls.append((function.__name__, torch.is_autocast_enabled("cpu")))
            return function(*args, **kwargs)

        return call

    options = {"lm_weight": 0.3, "normaliser": "batch", "target_network": "ema", "max_steps": 1}
    run = trainer(tmp_path, tiny_teacher, tiny_student, bf16=bf16, **options)
    for module, name in (
        (ops, "linear_td_loss"),
        (ops, "linear_select_actions"),
        (trainer_module, "lm_cross_entropy"),
    ):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    run.train()
    names = {name for name, _ in calls}
    assert names == {"linear_td_loss", "linear_select_actions", "lm_cross_entropy"}
    assert all(on == bf16 for _, on in calls)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in run.model.parameters())


def dialogues():
    """The same as whole conversations: every token is trained, several turns a sequence."""
    turns = conversations()
    return datasets.Dataset.from_list(
        [
            {"messages": [*a["prompt"], *a["completion"], *b["prompt"], *b["completion"]]}
            for a, b in zip(turns, reversed(list(turns)), strict=True)
        ]
    )


@pytest.mark.parametrize("data", [conversations, dialogues])
def test_packing_padding_free_and_padding_agree(tmp_path, tiny_teacher, tiny_student, data):
    results = {}
    layouts = {
        "padded": {},
        "padding_free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1},
    }
    for name, options in layouts.items():
        options = {"per_device_train_batch_size": 8, "max_steps": 1, **options}
        run = trainer(tmp_path, tiny_teacher, tiny_student, data(), lm_weight=0.2, **options)
        run.train()
        results[name] = losses(run)[0], [p.detach().clone() for p in run.model.parameters()]
    for name in ("padding_free", "packed"):
        assert results[name][0] == pytest.approx(results["padded"][0], rel=1e-4)
        for got, expected in zip(results[name][1], results["padded"][1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_response_rows_keep_responses_apart():
    tokens = torch.tensor([[-100, 5, 2, -100, 7, 8], [9, -100, -100, 4, 2, -100]])
    keep, successor = response_rows(tokens, [2])
    assert keep.tolist() == [1, 2, 4, 5, 6, 9, 10]
    assert successor.tolist() == [1, -1, 3, -2, -2, 6, -1]
    nothing, none = response_rows(torch.full((2, 3), -100), [2])
    assert nothing.numel() == none.numel() == 0


def test_resume_ends_where_an_undisturbed_run_ends(tmp_path, tiny_teacher, tiny_student):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    options["per_device_train_batch_size"] = 2
    whole = trainer(tmp_path / "whole", tiny_teacher, tiny_student, **options)
    whole.train()
    again = trainer(tmp_path / "again", tiny_teacher, tiny_student, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[2:] == pytest.approx(losses(whole)[2:], rel=1e-5)
    for got, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("worst", [False, True])
def test_the_best_checkpoint_is_named_where_it_is(tmp_path, tiny_teacher, tiny_student, worst):
    """Checkpoints are written aside: what names them must not name that place."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": worst}
    run = TDTrainer(
        load_model(tiny_student),
        str(tiny_teacher),
        config(tmp_path, prediction_loss_only=True, **options),
        train_dataset=conversations(),
        eval_dataset=conversations(4),
        processing_class=load_tokenizer(tiny_student),
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = tmp_path / f"checkpoint-{evaluated.index((max if worst else min)(evaluated)) + 1}"
    assert best.name == ("checkpoint-1" if worst else "checkpoint-3")
    assert run.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [best]


def test_the_model_card_appears_alone(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student)
    run.create_model_card(model_name="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "mine" in (tmp_path / "README.md").read_text()
    assert run.args.output_dir == str(tmp_path)


def test_lora_trains_adapters_alone(tmp_path, tiny_teacher, tiny_student):
    peft = pytest.importorskip("peft")
    run = trainer(
        tmp_path,
        tiny_teacher,
        tiny_student,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        max_steps=20,
        optim="adamw_torch",
        per_device_train_batch_size=8,
    )
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name), name
    assert losses(run)[-1] < losses(run)[0]


def test_warm_start_needs_no_teacher_and_is_sft(tmp_path, tiny_student):
    from trl import SFTConfig, SFTTrainer

    options = {"imitation": "none", "td_weight": 0.0, "lm_weight": 1.0}
    run = trainer(tmp_path, None, tiny_student, **options)
    assert run.teacher is None
    run.train()
    shared = {
        name: getattr(run.args, name)
        for name in (
            "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type",
            "max_grad_norm", "logging_steps", "gradient_checkpointing", "use_cpu", "seed", "optim",
            "disable_tqdm", "bf16",
        )
    }  # fmt: skip
    sft = SFTTrainer(
        load_model(tiny_student),
        SFTConfig(output_dir=str(tmp_path), save_strategy="no", report_to="none", **shared),
        train_dataset=conversations(),
        processing_class=load_tokenizer(tiny_student),
    )
    sft.train()
    assert losses(run) == pytest.approx(losses(sft), rel=1e-4)


def test_a_users_objective_and_evaluation(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student, objective=ForwardKL(tail=True))
    run.train()
    evaluated = run.evaluate(conversations(4))
    assert math.isfinite(evaluated["eval_loss"])
    assert evaluated["eval_loss"] > 0
    with pytest.raises(NotImplementedError, match="return_outputs"):
        run.compute_loss(run.model, {}, return_outputs=True)


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_teacher, tiny_student):
    plain = trainer(tmp_path, tiny_teacher, tiny_student)
    plain.train()
    checkpointed = trainer(
        tmp_path,
        tiny_teacher,
        tiny_student,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    seen = []
    checkpointed.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    checkpointed.train()
    # two steps, each with a forward and its repetition in backward
    assert len(seen) == 4
    pairs = zip(checkpointed.model.parameters(), plain.model.parameters(), strict=True)
    for got, expected in pairs:
        # the same operations on the same numbers
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("whose", ["ours", "user's"])
def test_a_compiled_body_takes_the_same_step(
    tmp_path, tiny_teacher, tiny_student, monkeypatch, whose
):
    from torch._dynamo.utils import counters

    # TrainingArguments writes it; the next trainer must not read it
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    plain = trainer(tmp_path, tiny_teacher, tiny_student, max_steps=1)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    options = {"torch_compile": True, "torch_compile_backend": "eager"} if whose == "ours" else {}
    run = trainer(tmp_path, tiny_teacher, tiny_student, max_steps=1, **options)
    if whose == "ours":
        bodies = [run.model.model, run.teacher.base_model]
        assert all(body._compiled_call_impl is not None for body in bodies)
    else:
        run.model.model.compile(backend=backend)
    loss, traced = run._loss, []

    def untraced(*args):
        traced.append(torch.compiler.is_compiling())
        return loss(*args)

    run._loss = untraced
    run.train()
    assert traced == [False]
    assert counters["stats"]["unique_graphs"] >= (2 if whose == "ours" else 1)
    assert bool(graphs) == (whose == "user's")
    for got, expected in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    run.save_model(str(tmp_path / "saved"))
    for got, expected in zip(
        load_model(tmp_path / "saved").parameters(), run.model.parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=0)


def test_a_batch_without_responses_is_a_zero(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student, lm_weight=1.0)
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "labels": torch.full((2, 5), -100),
    }
    for items in (torch.tensor(7), torch.tensor(0), 0):
        loss = run.compute_loss(run.model, inputs, num_items_in_batch=items)
        loss.backward()
        assert loss.item() == 0
        assert all((p.grad is None or (p.grad == 0).all()) for p in run.model.parameters())


REFUSED = {
    "q_level": ("value", "q_level: expected one of log_prob, logit, shifted, got 'value'"),
    "normaliser": ("none", "normaliser: expected one of exact, batch, sampled, got 'none'"),
    "imitation": ("kl", "imitation: expected one of forward_kl, .*got 'kl'"),
    "td_phi": ("x", "td_phi: .*got 'x'"),
    "action_top_k": (0, "action_top_k: expected a number >= 1, got 0"),
    "action_top_p": (1.5, r"action_top_p: expected a number in \(0, 1\], got 1.5"),
    "gamma": (-1, r"gamma: expected a number in \[0, 1\], got -1"),
    "td_alpha": (0, "td_alpha: expected a number > 0 and finite, got 0"),
    "td_weight": (-0.1, "td_weight: expected a number >= 0 and finite, got -0.1"),
    "teacher_temperature": (0, "teacher_temperature: expected a number > 0 and finite, got 0"),
    "student_temperature": (float("inf"), "student_temperature: .* > 0 and finite, got inf"),
    "td_stop_gradient": ("false", "td_stop_gradient: expected true or false, got 'false'"),
    "learning_rate": (-1, "learning_rate: expected a number >= 0 and finite, got -1"),
    "weight_decay": (math.nan, "weight_decay: expected a number >= 0 and finite, got nan"),
    "adam_beta1": (2, r"adam_beta1: expected a number in \[0, 1\), got 2"),
    "adam_beta2": (1, r"adam_beta2: expected a number in \[0, 1\), got 1"),
    "adam_epsilon": (-1, "adam_epsilon: expected a number >= 0 and finite, got -1"),
    "per_device_train_batch_size": (0, "per_device_train_batch_size: .* >= 1, got 0"),
    "per_device_eval_batch_size": (-1, "per_device_eval_batch_size: .* >= 1, got -1"),
    "gradient_accumulation_steps": (0, "gradient_accumulation_steps: .* >= 1, got 0"),
    "dataloader_num_workers": (-1, "dataloader_num_workers: expected a number >= 0, got -1"),
    "num_train_epochs": (0, "num_train_epochs: expected a number > 0 and finite, got 0"),
    "neftune_noise_alpha": (-1, "neftune_noise_alpha: expected a number >= 0 and finite, got -1"),
    "chat_template_path": ("some/model", r"chat_template_path: expected a .jinja .*got some/model"),
}


WRONG_KINDS = {
    "action_top_k": ("64", "action_top_k: expected an integer >= 1, got '64'"),
    "target_every": (1.5, "target_every: expected an integer >= 1, got 1.5"),
    "replay_size": (1.5, "replay_size: expected an integer >= 0, got 1.5"),
    "action_top_p": (True, r"action_top_p: expected a number in \(0, 1\], got True"),
    "gamma": ("x", r"gamma: expected a number in \[0, 1\], got 'x'"),
    "lmbda": (None, r"lmbda: expected a number in \[0, 1\], got None"),
    "vocab_size": (-1, "vocab_size: expected a number >= 1, got -1"),
    "objective": (5, "objective: expected the text of a sum, got 5"),
    "learning_rate": ("1e-3", "learning_rate: expected a number >= 0 and finite, got '1e-3'"),
    "per_device_train_batch_size": (0.5, "per_device_train_batch_size: expected an integer >= 1"),
}


@pytest.mark.parametrize("refused", [REFUSED, WRONG_KINDS], ids=["range", "kind"])
def test_wrong_fields_are_named(tmp_path, refused):
    for name, (value, message) in refused.items():
        with pytest.raises(UserError, match=message):
            TDConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", ["use_liger_kernel", "activation_offloading"])
def test_what_needs_an_accelerator_is_refused_without_one(tmp_path, monkeypatch, name):
    message = f"^{name}: expected False without an accelerator, got True"
    with pytest.raises(UserError, match=message):
        config(tmp_path, **{name: True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        TDConfig(output_dir=str(tmp_path), **{name: True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("tdkd.config.is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="use_liger_kernel: expected False without liger-kernel"):
        TDConfig(output_dir=str(tmp_path), use_liger_kernel=True)


def test_an_unknown_metric_is_named(tmp_path, tiny_teacher, tiny_student):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_zzz"}
    run = evaluated(tmp_path, tiny_teacher, tiny_student, **options)
    message = "^metric_for_best_model: expected one of .*loss, .*value_gap, got 'eval_zzz'$"
    with pytest.raises(UserError, match=message):
        run.train()


def test_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(UserError, match="lm_weight: expected a number > 0"):
        TDConfig(output_dir=str(tmp_path), imitation="none", td_weight=0.0)


def test_a_sample_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_vocabulary_extra: expected a number >= 1 with"):
        TDConfig(output_dir=str(tmp_path), normaliser="sampled", batch_vocabulary_extra=0)


def test_missing_teacher_and_other_vocabulary_are_refused(tmp_path, tiny_teacher, tiny_student):
    with pytest.raises(UserError, match="teacher_model: expected a teacher"):
        trainer(tmp_path, None, tiny_student)
    teacher = load_model(tiny_teacher)
    teacher.resize_token_embeddings(300)
    with pytest.raises(UserError, match="student's vocabulary of 264, got 300"):
        TDTrainer(
            load_model(tiny_student),
            teacher,
            config(tmp_path),
            train_dataset=conversations(),
            processing_class=load_tokenizer(tiny_student),
        )


def test_what_the_trainer_has_no_use_for_is_refused(tmp_path, tiny_teacher, tiny_student):
    student, teacher = load_model(tiny_student), load_model(tiny_teacher)
    sharing = load_model(tiny_student)
    sharing.model.norm = student.model.norm
    options = {
        "train_dataset": conversations(), "processing_class": load_tokenizer(tiny_student),
    }  # fmt: skip
    for message, given in (
        ("teacher_model: expected weights of its own", {"teacher_model": sharing}),
        ("compute_metrics: expected None", {"compute_metrics": lambda prediction: {}}),
        ("compute_loss_func: expected None", {"compute_loss_func": lambda *given: 0}),
        ("teacher_model: expected another model", {"teacher_model": student}),
        ("args: expected a TDConfig, got SFTConfig", {"args": trl.SFTConfig(bf16=False)}),
        ("vocab_size: expected at most 264", {"args": config(tmp_path, vocab_size=265)}),
    ):
        defaults = {"teacher_model": teacher, "args": config(tmp_path)}
        with pytest.raises(UserError, match=message):
            TDTrainer(student, **{**options, **defaults, **given})
    for objective in (ForwardKL, "ForwardKL", 5):
        with pytest.raises(TypeError, match="objective: expected an objective or a function of"):
            TDTrainer(student, teacher, config(tmp_path), objective=objective, **options)


def gpt2(**options):
    """A random GPT-2, whose embeddings and positions are tables."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "n_positions": 512, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **options}))


def test_data_that_models_cannot_be_given_is_refused(tmp_path, tiny_student):
    def made(train=None, student=None, teacher=None, evaluated=None, **options):
        return TDTrainer(
            gpt2(**(student or {})), gpt2(**(teacher or {})), config(tmp_path, **options),
            train_dataset=conversations() if train is None else train, eval_dataset=evaluated,
            processing_class=load_tokenizer(tiny_student),
        )  # fmt: skip

    short = {"n_positions": 32}
    long = r"^max_length: expected sequences of at most 32 tokens, .*got one of \d"
    few = "^train_dataset: expected tokens below 80, the vocabulary of the model, got 2"
    both = {"student": {"vocab_size": 80}, "teacher": {"vocab_size": 80}}
    given = datasets.Dataset.from_list([{"input_ids": [1, 70, 71], "labels": [-100, 70, 71]}])
    for options, message in (
        ({"student": short}, long),
        ({"teacher": short}, long),
        ({"train": given, "evaluated": conversations(), "student": short}, long),
        ({"train": given, "evaluated": {"one": given, "two": conversations()}, **both},
         few.replace("train", "eval")),
        (both, few),
        ({"vocab_size": 80}, "^vocab_size: expected more than 2.., the largest token of train_d"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            made(**options)
    packing = {"packing": True, "max_length": 512, "per_device_train_batch_size": 1}
    made(student={"n_positions": 80}, **packing)  # each sequence has positions of its own
    with pytest.raises(UserError, match="^max_length: expected sequences of at most 80 tokens"):
        made(student={"n_positions": 80}, packing_strategy="wrapped", **packing)
    made(given, student=short)
    made(conversations().to_iterable_dataset(), student=short)


def test_data_with_nothing_to_learn_is_refused(tmp_path, tiny_teacher, tiny_student):
    none = datasets.Dataset.from_list([{"input_ids": [1, 70], "labels": [1, -100]}] * 4)
    message = "^{}_dataset: expected a token to learn that has others before it, got none: every"
    with pytest.raises(UserError, match=message.format("train")):
        trainer(tmp_path, tiny_teacher, tiny_student, none)
    with pytest.raises(UserError, match=message.format("train")):
        trainer(tmp_path, tiny_teacher, tiny_student, packing=True, data=none)
    with pytest.raises(UserError, match=message.format("eval")):
        TDTrainer(
            load_model(tiny_student), str(tiny_teacher), config(tmp_path),
            train_dataset=conversations(), eval_dataset=none,
            processing_class=load_tokenizer(tiny_student),
        )  # fmt: skip
    some = datasets.concatenate_datasets([none, none.map(lambda x: {"labels": x["input_ids"]})])
    trainer(tmp_path, tiny_teacher, tiny_student, some)


@pytest.mark.parametrize("target", ["none", "ema"])
def test_a_set_takes_no_more_memory_than_the_vocabulary(
    tmp_path, tiny_teacher, tiny_student, target
):
    options = {"target_network": target, "action_top_p": 1.0, "max_steps": 1}
    runs = [
        trainer(tmp_path, tiny_teacher, tiny_student, action_top_k=k, **options)
        for k in (264, 2**31)
    ]
    for run in runs:
        run.train()
    assert runs[1].args.action_top_k == 2**31
    assert losses(runs[1]) == losses(runs[0])


def test_models_by_path(tmp_path, tiny_teacher, tiny_student):
    run = TDTrainer(
        Path(tiny_student), Path(tiny_teacher), config(tmp_path), train_dataset=conversations(),
        processing_class=load_tokenizer(tiny_student),
    )  # fmt: skip
    assert run.teacher.config.num_hidden_layers > 0


def test_a_mixture_of_experts_learns_without_its_load_balance_or_not_at_all(tmp_path, tiny_student):
    def experts():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
            )
        )  # fmt: skip

    def made(**options):
        return TDTrainer(
            experts(), experts(), config(tmp_path, max_steps=1, **options),
            train_dataset=conversations(), processing_class=load_tokenizer(tiny_student),
        )  # fmt: skip

    with pytest.raises(UserError, match="router_aux_loss_coef: expected 0 with a mixture"):
        made()
    made(router_aux_loss_coef=0.0).train()


def _ddp_worker(rank, world, port, folder, teacher, student):
    ranks.join(rank, world, port)
    run = trainer(
        folder, teacher, student, per_device_train_batch_size=8 // world, max_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    run.train()
    if rank == 0:
        torch.save([p.detach() for p in run.model.parameters()], folder / f"world{world}.pt")
    return run


def test_two_processes_equal_one(tmp_path, tiny_teacher, tiny_student):
    ranks.start(_ddp_worker, tmp_path, tiny_teacher, tiny_student)
    run = trainer(tmp_path, tiny_teacher, tiny_student, per_device_train_batch_size=8, max_steps=1)
    run.train()
    shared = torch.load(tmp_path / "world2.pt")
    for got, expected in zip(shared, run.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-6)
    saved = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "optimizer.pt"} <= saved
    assert not (tmp_path / ".tdkd-unfinished").exists()


def test_objective_of_the_config(tmp_path):
    objective = config(tmp_path).build_objective()
    expected = 1.0 * ForwardKL(tail=True) + 0.1 * IQLearn(alpha=1.0, stop_gradient="next")
    assert repr(objective) == repr(expected)


def test_objective_by_name(tmp_path, tiny_teacher, tiny_student):
    text = "0.5 * JSD(0.3, tail=True) + SoftTD(lam=0.8) + 0.1 * IQLearn('js', value='initial')"
    assert repr(config(tmp_path, objective=text).build_objective()) == repr(parse(text))
    named = trainer(tmp_path, tiny_teacher, tiny_student, objective_text=text)
    given = trainer(tmp_path, tiny_teacher, tiny_student, objective=parse(text))
    for run in (named, given):
        run.train()
    assert losses(named) == losses(given)
    assert losses(named)[0] != losses(named)[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "KL()"}, "objective: expected one of ForwardKL, .*got KL"),
        ({"objective": "IQLearn(alpha=0)"}, "alpha: expected a finite number > 0, got 0"),
        (
            {"objective": "JSD", "td_weight": 0.5},
            "td_weight: expected it to be left out beside objective, got 0.5",
        ),
    ],
)
def test_a_wrong_objective_is_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TDConfig(output_dir=str(tmp_path), **options)


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + END + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cut_and_whole():
    first = conversations(1)[0]
    return datasets.Dataset.from_list([{**first, "truncated": cut} for cut in (True, False)])


def learned(run, tokenizer):
    """What each example of a trainer is to learn, as text."""
    return [
        tokenizer.decode([token for token in row["labels"] if token != -100])
        for row in run.train_dataset
    ]


@pytest.mark.parametrize("form", ["json", "torch", "numpy", "streamed"])
def test_an_answer_that_was_cut_has_no_end(tmp_path, tiny_teacher, tiny_student, form):
    data = cut_and_whole()
    if form == "streamed":
        data = data.to_iterable_dataset()
    elif form != "json":
        data = data.with_format(form)
    options = {"shuffle_dataset": False, "lm_weight": 0.5, "max_steps": 1}
    run = trainer(tmp_path, tiny_teacher, tiny_student, data, **options)
    tokenizer = load_tokenizer(tiny_student)
    assert learned(run, tokenizer) == ["red", "red<|im_end|>"]
    assert all(math.isfinite(loss) for loss in losses(run))
    again = trainer(tmp_path, tiny_teacher, tiny_student, conversations(2), **options)
    assert learned(again, tokenizer)[0] == "red<|im_end|>\n"  # as TRL has it


def test_answers_that_were_cut_follow_the_options_of_trl(tmp_path, tiny_teacher, tiny_student):
    tokenizer = load_tokenizer(tiny_student)
    prompt = "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"

    def texts(**options):
        run = trainer(
            tmp_path, tiny_teacher, tiny_student, cut_and_whole(), shuffle_dataset=False, **options
        )
        return learned(run, tokenizer)

    assert texts(completion_only_loss=False) == [prompt + "red", prompt + "red<|im_end|>"]
    kept = texts(max_length=8, truncation_mode="keep_end", completion_only_loss=False)
    assert kept == [(prompt + "red")[-8:], "ant\nred<|im_end|>"]
    assert texts(max_length=28) == ["re", "re"]
    packed = texts(packing=True, packing_strategy="wrapped", max_length=20)
    assert "".join(packed) == "redred<|im_end|>"
    template = tmp_path / "other.jinja"
    template.write_text(TURNS.replace("END", "'<|endoftext|>'"))
    assert texts(chat_template_path=str(template)) == ["red", "red<|endoftext|>"]


def test_an_answer_ends_as_its_template_ends_it(tmp_path, tiny_student):
    """Gemma's and Phi's templates end a turn with another token than the tokenizer's EOS."""
    tokenizer = load_tokenizer(tiny_student)
    record = conversations(1)[0]
    for end, expected in (
        ("'<|endoftext|>'", [0]),
        ("' ' + eos_token", [tokenizer.convert_tokens_to_ids("Ġ"), 2]),
        ("''", [2]),
    ):
        tokenizer.chat_template = TURNS.replace("END", end)
        chat = records.Chat(tokenizer)
        assert chat.end == expected[-1]
        assert chat.encode(record).completion[3:] == expected
    tokenizer.chat_template = TURNS.replace("END", "'<|endoftext|>'")
    run = TDTrainer(
        load_model(tiny_student),
        args=config(tmp_path, lm_weight=1.0, imitation="none", td_weight=0.0),
        train_dataset=cut_and_whole(),
        processing_class=tokenizer,
    )
    assert run._eos == [0, 2]


def test_what_a_template_is_told_beside_the_messages(tiny_student):
    tokenizer = load_tokenizer(tiny_student)
    tokenizer.chat_template = "{{ tools[0].name if tools else 'none' }} {{ mood }}" + TURNS
    tokenizer.chat_template = tokenizer.chat_template.replace("END", "eos_token")
    told = {"chat_template_kwargs": {"mood": "calm"}}
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        ids = records.Chat(tokenizer).prompt({"prompt": "hi", "tools": tools, **told})
        assert tokenizer.decode(ids).startswith("f calm<|im_start|>user")
    plain = records.Chat(tokenizer).prompt({"prompt": "hi"})
    assert tokenizer.decode(plain).startswith("none <")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="^prompt: expected messages .* roles must alternate$"):
        records.Chat(tokenizer).prompt({"prompt": "hi"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"truncated": "false"}, "^train_dataset: truncated: expected true or false, got 'false'$"),
        ({"prompt": "hi", "completion": "you"}, "^train_dataset: .* drop truncated where no"),
        (
            {"completion": [{"role": "assistant", "content": "a"}] * 2},
            "^train_dataset: completion: expected one message, got 2;",
        ),
    ],
    ids=["text", "no_chat", "several"],
)
def test_records_that_cannot_be_cut(tmp_path, tiny_teacher, tiny_student, change, message):
    data = datasets.Dataset.from_list([{**conversations(1)[0], "truncated": True, **change}])
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, tiny_teacher, tiny_student, data)


def test_no_records_that_say_truncated(tiny_student):
    empty = datasets.Dataset.from_dict({"prompt": [], "completion": [], "truncated": []})
    encoded = records.encode_truncated(empty, load_tokenizer(tiny_student), "eval_dataset")
    assert len(encoded) == 0


def test_what_a_template_refuses_is_one_line(tmp_path, tiny_teacher, tiny_student):
    tokenizer = load_tokenizer(tiny_student)
    refuse = "{% if messages|length > 2 %}{{ raise_exception('two turns') }}{% endif %}"
    tokenizer.chat_template = refuse + TURNS.replace("END", "eos_token")
    record = conversations(1)[0]
    long = {**record, "prompt": record["prompt"] * 2}
    refused = "^train_dataset: .* template takes in example 1, got TemplateError: two turns$"
    with pytest.raises(UserError, match=refused):
        TDTrainer(
            load_model(tiny_student),
            str(tiny_teacher),
            config(tmp_path),
            train_dataset=datasets.Dataset.from_list([record, long]),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}], None])
def test_columns_that_are_missing_are_named(tmp_path, tiny_teacher, tiny_student, prompt, streamed):
    data = datasets.Dataset.from_list([{"question": "a"} if prompt is None else {"prompt": prompt}])
    got = "question" if prompt is None else "prompt"
    refused = f"^train_dataset: expected columns prompt and completion, .* input_ids, got {got}$"
    with pytest.raises(UserError, match=refused):
        trainer(
            tmp_path, tiny_teacher, tiny_student, data.to_iterable_dataset() if streamed else data
        )


def test_cut_answers_have_no_marks_of_the_assistant(tmp_path, tiny_teacher, tiny_student):
    tokenizer = load_tokenizer(tiny_student)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == "
        "'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(UserError, match="assistant_only_loss: expected False where records of"):
        TDTrainer(
            load_model(tiny_student),
            str(tiny_teacher),
            config(tmp_path, assistant_only_loss=True),
            train_dataset=cut_and_whole(),
            processing_class=tokenizer,
        )


def lora_student(path):
    """A student with transformers' own adapters, one of them on the head."""
    peft = pytest.importorskip("peft")
    student = load_model(path)
    torch.manual_seed(5)
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    return student


@pytest.mark.parametrize("worst", [False, True])
def test_added_adapters_are_resumed_and_the_best_come_back(
    tmp_path, tiny_teacher, tiny_student, worst
):
    def made(name, **options):
        return TDTrainer(
            lora_student(tiny_student),
            str(tiny_teacher),
            config(
                tmp_path / name,
                max_steps=4,
                save_strategy="steps",
                save_steps=1,
                optim="adamw_torch",
                per_device_train_batch_size=2,
                **options,
            ),
            train_dataset=conversations(),
            eval_dataset=conversations(4),
            processing_class=load_tokenizer(tiny_student),
        )

    whole = made("whole")
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[2:] == pytest.approx(losses(whole)[2:], rel=1e-5)
    for got, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    best = made(
        "best",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=worst,
    )
    best.train()
    scores = {e["step"]: e["eval_loss"] for e in best.state.log_history if "eval_loss" in e}
    assert (max if worst else min)(scores, key=scores.get) == (1 if worst else 4)
    assert best.evaluate()["eval_loss"] == pytest.approx(scores[1 if worst else 4], rel=1e-5)


def test_a_teacher_with_other_tokens_is_refused(tmp_path, tiny_teacher, tiny_student):
    other = shuffled_tokenizer(tiny_teacher, tmp_path / "other")
    with pytest.raises(UserError, match="^teacher_model: expected the student's tokenizer"):
        trainer(tmp_path, other, tiny_student)
    with pytest.raises(UserError, match="^teacher_model: expected .* got /nowhere, which does not"):
        trainer(tmp_path, "/nowhere", tiny_student)
    with pytest.raises(UserError, match="^teacher_model_name_or_path: expected .* got /nowhere,"):
        trainer(tmp_path, None, tiny_student, teacher_model_name_or_path="/nowhere")


def test_the_card_of_a_run_after_one_that_was_killed(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student)
    left = tmp_path / ".tdkd-unfinished" / "checkpoint-1"
    left.mkdir(parents=True)
    run.create_model_card()
    assert (tmp_path / "README.md").stat().st_size
    assert not left.parent.exists()


def evaluated(tmp_path, teacher, student, **options):
    return TDTrainer(
        load_model(student),
        str(teacher),
        config(
            tmp_path,
            normaliser="batch",
            batch_vocabulary_extra=4,
            batch_vocabulary_law="uniform",
            action_top_k=2,
            per_device_eval_batch_size=2,
            **options,
        ),
        train_dataset=conversations(),
        eval_dataset=conversations(5),
        processing_class=load_tokenizer(student),
    )


def test_evaluation_takes_nothing_from_training_and_repeats_itself(
    tmp_path, tiny_teacher, tiny_student, monkeypatch
):
    """The batch vocabulary samples columns; `predict` leaves nothing in the log."""
    monkeypatch.setattr("tdkd.kernels.routes.BATCH_BELOW", 0.9)
    monkeypatch.setitem(routes.BATCH_ROWS, "cpu", 0)
    options = {"max_steps": 4, "per_device_train_batch_size": 2}
    alone = evaluated(tmp_path / "alone", tiny_teacher, tiny_student, **options)
    alone.train()
    watched = evaluated(
        tmp_path / "watched", tiny_teacher, tiny_student,
        eval_strategy="steps", eval_steps=1, **options,
    )  # fmt: skip
    watched.train()
    assert losses(watched) == losses(alone)
    first = alone.evaluate()
    assert alone.evaluate()["eval_loss"] == first["eval_loss"]
    alone.predict(alone.train_dataset)
    again = alone.evaluate()
    same = {name for name in first if "runtime" not in name and "per_second" not in name}
    assert {name: again[name] for name in same} == {name: first[name] for name in same}


def test_an_objective_that_bootstraps_has_one_scale(tmp_path, tiny_teacher, tiny_student):
    """Rows whose V' is unknown stay in the divisor, in evaluation as in training."""
    data = [{**row, "truncated": i % 2 == 0} for i, row in enumerate(conversations(4))]
    run = TDTrainer(
        load_model(tiny_student),
        str(tiny_teacher),
        config(
            tmp_path, objective="IQLearn('js', alpha=1.0)", learning_rate=0.0, max_steps=1,
            per_device_eval_batch_size=4,
        ),
        train_dataset=datasets.Dataset.from_list(data),
        eval_dataset=datasets.Dataset.from_list(data),
        processing_class=load_tokenizer(tiny_student),
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(losses(run)[0], rel=1e-5)


def test_a_micro_batch_without_rows_leaves_the_means_alone(tmp_path, tiny_teacher, tiny_student):
    full = [
        {"input_ids": [1, 70 + i, 71, 72, 2], "labels": [-100, -100, 71, 72, 2]} for i in (0, 1)
    ]
    empty = {"input_ids": [1, 70, 71], "labels": [-100] * 3}
    means = []
    for rows in (full, [full[0], empty, full[1], empty]):
        run = trainer(
            tmp_path, tiny_teacher, tiny_student, datasets.Dataset.from_list(rows),
            shuffle_dataset=False, max_length=None, max_steps=1, learning_rate=0.0,
            per_device_train_batch_size=1, gradient_accumulation_steps=len(rows),
        )  # fmt: skip
        run._get_train_sampler = lambda *_: None
        run.train()
        means.append(run.state.log_history[0])
    for name in ("set_size", "teacher_mass", "q", "value", "td_error", "td_error_p50", "kappa"):
        assert means[1][name] == pytest.approx(means[0][name], rel=1e-5), name


def test_a_warm_start_takes_no_teacher(tmp_path, tiny_teacher, tiny_student):
    with pytest.raises(UserError, match="^teacher_model: expected none without an objective"):
        trainer(
            tmp_path, tiny_teacher, tiny_student, imitation="none", td_weight=0.0, lm_weight=1.0
        )


UNUSED = {
    "temperature": (2.0, "lmbda: 0, .*see student_temperature"),
    "top_p": (0.5, "lmbda: 0, .*see action_top_p"),
    "max_completion_length": (9, "lmbda: 0"),
    "td_phi": ("js", "td_weight: 0"),
    "td_stop_gradient": (False, "td_weight: 0"),
    "target_decay": (0.5, "without target_network"),
    "imitation_tail": (False, "imitation: none"),
    "imitation_weight": (math.inf, None),
}


@pytest.mark.parametrize("name", UNUSED)
def test_fields_without_a_say_are_refused(tmp_path, name):
    given, why = UNUSED[name]
    options = {"imitation": "none", "lm_weight": 1.0} if name == "imitation_tail" else {}
    message = f"{name}: expected it to be left out .*{why}" if why else f"{name}: expected a number"
    with pytest.raises(UserError, match=message):
        TDConfig(output_dir=str(tmp_path), **{name: given}, **options)


def test_what_asks_for_a_free_level_is_told_where_there_is_none(
    tmp_path, tiny_teacher, tiny_student, caplog
):
    for objective, options, told in (
        ("ForwardKL(tail=True) + 0.1 * LSIQ()", {}, True),
        ("LSIQ()", {"q_level": "logit"}, False),
        ("SQIL()", {"value_head": True}, False),
        ("ForwardKL(tail=True)", {}, False),
    ):
        caplog.clear()
        trainer(tmp_path, tiny_teacher, tiny_student, objective_text=objective, **options)
        assert ("asks for a level of Q that log_prob has not" in caplog.text) == told
