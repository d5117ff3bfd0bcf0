"""A target network and a value head in TDTrainer, against plain loops and undisturbed runs."""

import copy
import json

import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_trainer import Batches, config, conversations, losses, trainer

from tdkd import bootstrap, checkpoints
from tdkd.bootstrap import NAME, TARGET, VALUE_HEAD, TargetNetwork
from tdkd.cli import distill
from tdkd.errors import UserError
from tdkd.models import load_model, load_tokenizer
from tdkd.objectives import ForwardKL, IQLearn, as_objective
from tdkd.trainer import TDConfig, TDTrainer

EMA = {"target_network": "ema", "target_decay": 0.9}
BOTH = {**EMA, "value_head": True}
# what V' has much to say in
TD = {"td_weight": 1.0, "td_alpha": 1.0}


def same(one, other, **tolerances):
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), **tolerances)


def head_of(run):
    return getattr(run.model, NAME).detach()


def td_by_hand(student, teacher, slow, heads, batch, eos):
    """``V - gamma V' - phi(Q(a) - gamma V')`` with V' of ``slow``, and both with a value head,
    from full logits, row by row; the default imitation term beside it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def seen(model, vector):
        given = model(**inputs, output_hidden_states=True)
        level = given.hidden_states[-1][:, :-1] @ vector
        return given.logits[:, :-1].log_softmax(-1), level

    z, v = seen(student, heads[0])
    with torch.no_grad():
        t, _ = seen(teacher, torch.zeros_like(heads[1]))
        slow_z, slow_v = seen(slow, heads[1])
    tokens = batch["labels"][:, 1:]
    total, count, kept = 0.0, 0, {}
    for b, i in (tokens != -100).nonzero().tolist():
        order = t[b, i].argsort(descending=True, stable=True).tolist()
        members = []
        for a in order[:8]:
            members.append(a)
            if t[b, i, members].exp().sum() >= 0.9:
                break
        token = tokens[b, i].item()
        if token not in members:
            members = [*members[:7], token] if len(members) == 8 else [*members, token]
        kept[b, i] = members, token
    for (b, i), (members, token) in kept.items():
        p, q = t[b, i, members], z[b, i, members]
        p_rest, q_rest = 1 - p.exp().sum(), 1 - q.exp().sum()
        total = total + (p.exp() * (p - q)).sum() + p_rest * (p_rest.log() - q_rest.log())
        count += 1
        if token == eos:
            ahead = 0.0
        elif (b, i + 1) in kept:
            after = kept[b, i + 1][0]
            ahead = 0.99 * (slow_z[b, i + 1, after].logsumexp(0) + slow_v[b, i + 1])
        else:
            continue
        x = z[b, i, token] + v[b, i] - ahead
        total = total + q.logsumexp(0) + v[b, i] - ahead - (x - x**2 / 4)
    return total / count


@pytest.mark.parametrize("whose", ["target", "head", "both"])
def test_steps_match_a_plain_loop(tmp_path, tiny_teacher, tiny_student, whose):
    options = {"target": EMA, "head": {"value_head": True}, "both": BOTH}[whose]
    run = trainer(tmp_path, tiny_teacher, tiny_student, max_steps=3, **TD, **options)
    batches = Batches(run)
    run.train()
    student, teacher = load_model(tiny_student).double(), load_model(tiny_teacher).double()
    slow = copy.deepcopy(student) if run.target else student
    vector = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    slow_vector = torch.zeros(16, dtype=torch.float64) if run.target else vector
    learned = [*student.parameters(), *([vector] if run.args.value_head else [])]
    followers = [*slow.parameters(), slow_vector]
    optimiser = torch.optim.SGD(learned, lr=1e-2)
    eos = load_tokenizer(tiny_student).eos_token_id
    expected = []
    for batch in batches.seen:
        loss = td_by_hand(student, teacher, slow, (vector, slow_vector), batch, eos)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if run.target:
            with torch.no_grad():
                for mine, theirs in zip(followers, [*student.parameters(), vector], strict=True):
                    mine.copy_(0.9 * mine + 0.1 * theirs)
        expected.append(loss.item())
    assert len(expected) == 3
    assert losses(run) == pytest.approx(expected, rel=1e-4)
    plain = [p for n, p in run.model.named_parameters() if n != NAME]
    same([p.double() for p in plain], student.parameters(), rtol=1e-3, atol=1e-5)
    if run.args.value_head:
        assert vector.abs().max() > 1e-3
        torch.testing.assert_close(head_of(run).double(), vector.detach(), rtol=1e-3, atol=1e-5)
    if run.target:
        kept = [p.double() for n, p in run.target.network.named_parameters() if n != NAME]
        same(kept, slow.parameters(), rtol=1e-3, atol=1e-5)
        assert all(p.grad is None for p in run.target.network.parameters())


def test_a_copy_after_every_step_is_the_student_s_own_value(tmp_path, tiny_teacher, tiny_student):
    given = {**TD, "max_steps": 3, "td_stop_gradient": True}
    own = trainer(tmp_path, tiny_teacher, tiny_student, **given)
    copied = trainer(
        tmp_path, tiny_teacher, tiny_student, target_network="ema", target_decay=0.0, **given
    )
    slow = trainer(tmp_path, tiny_teacher, tiny_student, **EMA, **given)
    for run in (own, copied, slow):
        run.train()
    assert losses(copied) == pytest.approx(losses(own), rel=1e-5)
    same(copied.model.parameters(), own.model.parameters(), rtol=1e-4, atol=1e-6)
    same(copied.target.network.parameters(), copied.model.parameters(), rtol=0, atol=0)
    assert losses(slow)[0] == pytest.approx(losses(own)[0], rel=1e-5)
    assert losses(slow)[2] != pytest.approx(losses(own)[2], rel=1e-3)


def test_a_target_moves_once_an_optimizer_step(tmp_path, tiny_teacher, tiny_student):
    steps = []
    for size, accumulate in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path, tiny_teacher, tiny_student, **TD, **BOTH, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        run.train()
        steps.append([*run.model.parameters(), *run.target.network.parameters()])
    same(*steps, rtol=1e-3, atol=1e-5)


def test_a_target_moves_every_so_many_steps():
    student = torch.nn.Linear(2, 1)
    first = student.weight.detach().clone()
    target = TargetNetwork(student, 0.0, every=3)

    class State:
        global_step = 0

    for step, moved in enumerate([False, False, True, False]):
        State.global_step = step
        with torch.no_grad():
            student.weight += 1
        target.on_optimizer_step(None, State, None)
        if moved:
            first = student.weight.detach().clone()
        assert torch.equal(target.network.weight, first)


def test_low_precision_is_averaged_in_float32(tmp_path):
    """An update of 2^-10 of a weight of 1 would be lost in bfloat16, a hundred times over."""
    student = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(student.weight)
    target = TargetNetwork(student, 1 - 2.0**-10)
    torch.nn.init.constant_(student.weight, 2.0)

    class State:
        global_step = 0

    for _ in range(100):
        target.on_optimizer_step(None, State, None)
    expected = 2 - (1 - 2.0**-10) ** 100
    assert target.network.weight.dtype == torch.bfloat16
    assert target.network.weight.item() == pytest.approx(expected, abs=2.0**-8)
    assert target.network.weight.item() > 1
    target.save(tmp_path)
    (kept,) = load_file(tmp_path / TARGET).values()
    assert kept.item() == pytest.approx(expected, rel=1e-5)
    other = TargetNetwork(student, 0.5)
    other.load(tmp_path)
    assert torch.equal(other.network.weight, target.network.weight)


RESUMED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def test_resume_ends_where_an_undisturbed_run_ends(tmp_path, tiny_teacher, tiny_student):
    given = {**RESUMED, **TD, **BOTH, "per_device_train_batch_size": 2}
    whole = trainer(tmp_path / "whole", tiny_teacher, tiny_student, **given)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    checkpoints.check(checkpoint)
    assert NAME not in load_file(checkpoint / "model.safetensors")
    again = trainer(tmp_path / "again", tiny_teacher, tiny_student, **given)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[2:] == pytest.approx(losses(whole)[2:], rel=1e-5)
    same(again.model.parameters(), whole.model.parameters())
    same(again.target.network.parameters(), whole.target.network.parameters())
    assert head_of(again).abs().max() > 0
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"got no \*model\*.safetensors"):
        checkpoints.check(checkpoint)


@pytest.mark.parametrize(
    "options, name, file",
    [(EMA, "target_network", TARGET), ({"value_head": True}, "value_head", VALUE_HEAD)],
)
def test_what_was_saved_without_them_is_refused(
    tmp_path, tiny_teacher, tiny_student, options, name, file
):
    given = {**RESUMED, **TD, "max_steps": 2}
    trainer(tmp_path, tiny_teacher, tiny_student, **given).train()
    run = trainer(tmp_path, tiny_teacher, tiny_student, **given, **options)
    with pytest.raises(UserError, match=f"{name}: expected {file} in .*checkpoint-2, got none"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_s_value_head_comes_back(tmp_path, tiny_teacher, tiny_student):
    options = {**RESUMED, **TD, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = TDTrainer(
        load_model(tiny_student),
        str(tiny_teacher),
        config(
            tmp_path, value_head=True, greater_is_better=True, prediction_loss_only=True, **options
        ),
        train_dataset=conversations(),
        eval_dataset=conversations(4),
        processing_class=load_tokenizer(tiny_student),
    )
    run.train()
    best = tmp_path / "checkpoint-2"
    assert run.state.best_model_checkpoint == str(best)
    saved = load_file(best / VALUE_HEAD)["weight"]
    last = load_file(tmp_path / "checkpoint-4" / VALUE_HEAD)["weight"]
    assert torch.equal(head_of(run), saved)
    assert not torch.equal(saved, last)


def test_lora_has_averages_of_its_adapters_alone(tmp_path, tiny_teacher, tiny_student):
    peft = pytest.importorskip("peft")
    runs = []
    for name in ("whole", "again"):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        run = trainer(
            tmp_path / name, tiny_teacher, tiny_student, peft_config=lora, **RESUMED, **TD, **BOTH
        )
        live = dict(run.model.named_parameters())
        for key, p in run.target.network.named_parameters():
            assert (p is live[key]) == ("lora_" not in key and key != NAME), key
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if runs else None)
        runs.append(run)
    whole, again = runs
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    averages = load_file(checkpoint / TARGET)
    assert all("lora_" in key or key == NAME for key in averages)
    assert len(averages) == 2 * 2 * 3 + 1
    assert all("lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    live = dict(whole.model.named_parameters())
    assert any(not torch.equal(averages[key], live[key]) for key in averages)
    same(again.model.parameters(), whole.model.parameters())
    same(again.target.network.parameters(), whole.target.network.parameters())


def test_cloning_does_not_see_a_value_head(tmp_path, tiny_teacher, tiny_student):
    """gamma = 0 and phi the identity: v(s) of V and of Q(a) cancel, and it stays at zero."""
    given = {"gamma": 0.0, "td_phi": "identity", "td_weight": 1.0, "max_steps": 2}
    runs = [
        trainer(tmp_path, tiny_teacher, tiny_student, value_head=head, **given)
        for head in (False, True)
    ]
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    plain = [p for name, p in runs[1].model.named_parameters() if name != NAME]
    same(plain, runs[0].model.parameters(), rtol=1e-4, atol=1e-6)
    # probabilities add up to 1 within their rounding: twice that, times the learning rate
    assert head_of(runs[1]).abs().max() < 4 * torch.finfo(torch.float32).eps * 1e-2


def test_a_batch_without_responses_is_a_zero(tmp_path, tiny_teacher, tiny_student):
    run = trainer(tmp_path, tiny_teacher, tiny_student, **BOTH)
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "labels": torch.full((2, 5), -100),
    }
    loss = run.compute_loss(run.model, inputs, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    # or DDP would wait for it
    assert torch.equal(getattr(run.model, NAME).grad, torch.zeros(16))


@pytest.mark.parametrize("options", [{"normaliser": "batch"}, {"q_level": "logit"}])
def test_the_batch_vocabulary_and_other_levels(tmp_path, tiny_teacher, tiny_student, options):
    run = trainer(tmp_path, tiny_teacher, tiny_student, **TD, **BOTH, **options, lm_weight=0.2)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert VALUE_HEAD in files
    assert not {TARGET, f"{VALUE_HEAD}.partial"} & files
    assert NAME not in load_file(tmp_path / "saved" / "model.safetensors")
    load_model(tmp_path / "saved")
    json.dumps(run.state.log_history)
    entries = [entry["state_value"] for entry in run.state.log_history if "state_value" in entry]
    assert entries[0] == 0 != entries[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_network": "polyak"}, "target_network: expected one of none, ema, got 'polyak'"),
        ({"target_decay": 1.0}, r"target_decay: expected a number in \[0, 1\), got 1.0"),
        ({"target_every": 0}, "target_every: expected a number >= 1, got 0"),
    ],
)
def test_wrong_fields_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TDConfig(output_dir=str(tmp_path), **options)


def test_what_would_cost_without_a_say_is_refused(tmp_path, tiny_teacher, tiny_student):
    with pytest.raises(UserError, match="target_network: expected an objective that .*ForwardKL"):
        trainer(tmp_path, tiny_teacher, tiny_student, td_weight=0.0, **EMA)
    with pytest.raises(UserError, match="target_network: .* and gamma > 0, .*and gamma 0"):
        trainer(tmp_path, tiny_teacher, tiny_student, gamma=0.0, **EMA)
    with pytest.raises(UserError, match="value_head: expected an objective that looks ahead"):
        trainer(tmp_path, tiny_teacher, tiny_student, objective=ForwardKL(), value_head=True)
    with pytest.raises(UserError, match="value_head: .*, got none"):
        trainer(
            tmp_path, None, tiny_student, imitation="none", td_weight=0.0, lm_weight=1.0,
            value_head=True,
        )  # fmt: skip
    with pytest.raises(UserError, match="target_network: expected none with an objective that cou"):
        trainer(
            tmp_path, tiny_teacher, tiny_student, objective_text="JSD + IQLearn(value='initial')",
            td_weight=0.0, **EMA,
        )  # fmt: skip
    # a function tells nothing of itself, and a sum may have one term that looks ahead
    function = as_objective(lambda rows: rows.value)
    for objective in (function, ForwardKL() + function, ForwardKL() + 0.1 * IQLearn()):
        bootstrap.check_of_use(objective, gamma=0.9, target_network="ema", value_head=True)


@pytest.mark.parametrize("name, value", [("target_network", "ema"), ("value_head", True)])
def test_a_student_in_shards_is_refused(name, value):
    options = {"target_network": "none", "value_head": False, name: value}
    with pytest.raises(UserError, match=f"{name}: expected a student that is whole, got FSDP"):
        bootstrap.check_whole(False, **options)
    bootstrap.check_whole(True, **options)


def _ddp_worker(rank, world, port, folder, teacher, student):
    ranks.join(rank, world, port)
    run = trainer(
        folder, teacher, student, per_device_train_batch_size=8 // world, max_steps=2, **TD, **BOTH
    )
    run.train()
    everything = [*run.model.parameters(), *run.target.network.parameters()]
    torch.save([p.detach() for p in everything], folder / f"rank{rank}.pt")
    return run


def test_two_processes_equal_one(tmp_path, tiny_teacher, tiny_student):
    ranks.start(_ddp_worker, tmp_path, tiny_teacher, tiny_student)
    run = trainer(
        tmp_path, tiny_teacher, tiny_student, per_device_train_batch_size=8, max_steps=2, **TD,
        **BOTH,
    )  # fmt: skip
    run.train()
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    same(*both, rtol=0, atol=0)
    same(both[0], [*run.model.parameters(), *run.target.network.parameters()], rtol=1e-3, atol=1e-5)


def test_distill_goes_on_with_both(tmp_path, tiny_teacher, tiny_student):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in conversations()))
    arguments = [
        "--model_name_or_path", tiny_student, "--teacher_model_name_or_path",
        tiny_teacher, "--train_file", data, "--output_dir", tmp_path / "out", "--save_steps", "1",
        "--td_weight", "0.1", "--target_network", "ema", "--value_head", "true", "--report_to",
        "none", "--use_cpu", "--per_device_train_batch_size", "2", "--max_steps",
    ]  # fmt: skip
    for steps in ("1", "2"):
        distill.run([str(a) for a in [*arguments, steps]])
    out = tmp_path / "out"
    assert {VALUE_HEAD, TARGET} <= {p.name for p in (out / "checkpoint-2").iterdir()}
    assert TARGET not in {p.name for p in (out / "final").iterdir()}
    assert (out / "final" / VALUE_HEAD).is_file()


def test_config_passes_them_on(tmp_path):
    given = config(tmp_path, **BOTH, target_every=5)
    assert (given.target_network, given.target_decay, given.target_every) == ("ema", 0.9, 5)
    assert given.value_head


def test_a_second_trainer_keeps_or_drops_the_value_head(tmp_path, tiny_teacher, tiny_student):
    """Of one student in one process, as in a notebook."""
    student = load_model(tiny_student)

    def made(name, **options):
        return TDTrainer(
            student,
            str(tiny_teacher),
            config(tmp_path / name, save_strategy="steps", save_steps=2, **{**TD, **options}),
            train_dataset=conversations(),
            processing_class=load_tokenizer(tiny_student),
        )

    first = made("first", value_head=True)
    first.train()
    learned = head_of(first).clone()
    assert learned.abs().max() > 0
    again = made("again", value_head=True)
    assert torch.equal(head_of(again), learned)
    without = made("without")
    assert not hasattr(student, NAME)
    without.train()
    assert not (tmp_path / "without" / "checkpoint-2" / VALUE_HEAD).exists()
    made("resumed").train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-2"))
