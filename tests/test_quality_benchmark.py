"""benchmarks/quality on tiny models: every method learns, and a killed run goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tdkd import ops, records
from tdkd.models import Head
from tdkd.objectives import IQLearn

pytest.importorskip("rouge_score")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"
WORDS = ["one two", "red", "a b c d e", "why?", "north by east", "0123", "tick tock", "zig"]
OPTIONS = [
    "--steps", "2", "--warm-steps", "2", "--batch", "3", "--examples", "8", "--dev", "4",
    "--prompts", "2", "--new-tokens", "6", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """The module benchmarks/quality/run.py, and its neighbours for as long as it is needed."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    import run

    yield run
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_teacher, tiny_student):
    root = tmp_path_factory.mktemp("quality")
    (root / "models").mkdir()
    (root / "models" / "teacher").symlink_to(tiny_teacher)
    (root / "models" / "student-init").symlink_to(tiny_student)
    for split in ("train", "dev"):
        records.append(root / "data" / f"{split}.jsonl", prompts(root / "data"))
    for name in ("dolly", "selfinst", "vicuna"):
        records.append(
            root / "data" / f"eval_{name}.jsonl",
            [{"prompt": words, "references": ["red", words]} for words in WORDS],
        )
    return root


def prompts(data):
    data.mkdir(exist_ok=True)
    return [{"prompt": words} for words in WORDS]


@pytest.fixture(scope="module")
def runs(script, folders):
    """Every method once, as the JSON tells it."""
    threads = torch.get_num_threads()
    try:
        script.main(arguments(folders))
    finally:
        torch.set_num_threads(threads)
    return json.loads((folders / "out" / "quality.json").read_text())["runs"]


def arguments(root):
    return [
        "--data", str(root / "data"), "--models", str(root / "models"), "--work",
        str(root / "work"), "--output", str(root / "out" / "quality"), *OPTIONS,
    ]  # fmt: skip


def test_every_method_learns_from_the_same_tokens(script, runs):
    by_name = {run["method"]: run for run in runs}
    from methods import METHODS

    assert set(by_name) == {*METHODS, "warm", "untrained", "teacher"}
    own = {name for name, method in METHODS.items() if method.lmbda}
    assert len({by_name[name]["tokens"] for name in METHODS if name not in own}) == 1
    assert all(by_name[name]["teacher"] == "live" for name in own)
    for name in METHODS:
        run = by_name[name]
        assert len(run["losses"]) == 2
        assert run["start"] == "warm"
        first, last = run["curve"]
        assert (first["step"], last["step"]) == (1, 2)
        assert first["tokens"] < last["tokens"] == run["tokens"]
        assert last["kl"] == pytest.approx(run["scores"]["kl"], rel=1e-5)
    assert by_name["warm"]["start"] == "cold"
    exact = by_name["teacher"]["scores"]
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert exact["own_acceptance"] == pytest.approx(1, abs=1e-4)
    assert exact["top1"] == 1
    assert by_name["untrained"]["scores"]["kl"] > 0.1


def test_what_is_done_is_not_done_again(script, folders, runs, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(script, "train", never)
    script.main(arguments(folders))
    again = json.loads((folders / "out" / "quality.json").read_text())["runs"]
    assert again == runs
    assert (folders / "out" / "quality.png").stat().st_size > 1000


def test_a_run_that_diverges_ends_and_is_told(script, folders, runs, capsys):
    given = ["--methods", "kl-full", "--rates", "1e30", "--steps", "4"]
    script.main([*arguments(folders), *given])
    told = json.loads((folders / "out" / "quality.json").read_text())["runs"]
    (run,) = [run for run in told if run["rate"] == 1e30]
    assert run["scores"] is None
    assert len(run["losses"]) < run["steps"]
    assert "diverged |" in capsys.readouterr().out
    assert not list((folders / "work" / "runs").glob("kl-full-live-1e+30*/model"))


def test_equal_minutes(script, folders, runs):
    """Each method takes the steps that its measured time allows."""
    names = ["sft", "kl-full", "kl-p1"]
    times = {"threads": 1, "batch": 3, "seconds": {}}
    records.write_whole(folders / "work" / "times.json", times)
    with pytest.raises(SystemExit, match="minutes: expected the time of a step of jsd-p1; run"):
        script.main([*arguments(folders), "--minutes", "1", "--methods", "jsd-p1"])
    script.main([*arguments(folders), "--time", "--methods", *names])
    seconds = json.loads((folders / "work" / "times.json").read_text())["seconds"]
    assert set(seconds) == set(names)
    assert set(seconds["sft"]) == set(seconds["kl-full"]) == {"live"}
    assert 0 < seconds["kl-p1"]["cache"] < seconds["kl-p1"]["live"]
    minutes = 5 * seconds["kl-full"]["live"] / 60
    for teacher in ("cache", "live"):
        given = ["--minutes", str(minutes), "--teacher", teacher, "--methods", *names]
        script.main([*arguments(folders), *given])
    told = json.loads((folders / "out" / "quality.json").read_text())
    assert told["times"]["seconds"] == seconds
    steps = {(r["method"], r["teacher"]): r["steps"] for r in told["runs"] if r["minutes"]}
    assert steps.pop(("kl-full", "live")) == 5
    for (name, teacher), taken in steps.items():
        way = "cache" if teacher == "cache" else "live"
        assert taken == round(60 * minutes / seconds[name][way])
    assert ("sft", "none") in steps


def test_the_picture_shows_each_method_at_its_best_rate(script):
    import report

    def run(method, rate, kl, seed=1, minutes=3.0, start="warm"):
        return {
            "method": method, "rate": rate, "seed": seed, "minutes": minutes, "start": start,
            "teacher": "live", "scores": {"kl": kl},
        }  # fmt: skip

    runs = [
        run("warm", 1e-3, 3.0, seed=0, minutes=None, start="cold"),
        run("a", 1e-3, 2.0), run("a", 1e-4, 1.0), run("a", 1e-4, 0.5, seed=2),
        run("b", 1e-3, 1.5), run("c", 1e-3, 0.1, minutes=None),
    ]  # fmt: skip
    assert [(r["method"], r["rate"]) for r in report.of_interest(runs)] == [
        ("warm", 1e-3), ("a", 1e-4), ("b", 1e-3),
    ]  # fmt: skip


def test_earlier_results_stand_beside_these(script, folders, runs, tmp_path):
    """With --merge: each run once, however often, and the times of the file where it has them."""
    mine = json.loads((folders / "out" / "quality.json").read_text())
    (tmp_path / "runs" / "a").mkdir(parents=True)
    other = {**next(run for run in runs if run["method"] == "kl-p1"), "seed": 9}
    records.write_whole(tmp_path / "runs" / "a" / "result.json", other)
    merged = tmp_path / "out" / "quality"
    given = [*arguments(folders), "--work", str(tmp_path), "--output", str(merged), "--report"]
    for earlier in (folders / "out" / "quality.json", merged.with_suffix(".json")):
        script.main([*given, "--merge", str(earlier)])
        told = json.loads(merged.with_suffix(".json").read_text())
        assert len(told["runs"]) == len(mine["runs"]) + 1
        assert all(run in told["runs"] for run in [other, *mine["runs"]])
        assert told["times"] == mine["times"]
        group = next(each for each in told["over_seeds"] if each["method"] == "kl-p1")
        assert group["seeds"] == [1, 9]


def test_seeds_together(script, capsys):
    import report

    def run(seed, kl, method="a", steps=100, minutes=3.6):
        scores = {**dict.fromkeys(report.SHOWN, 1.0), "kl": kl, "rouge_l": {"mean": kl / 10}}
        return {
            "method": method, "teacher": "cache", "start": "warm", "rate": 1e-3, "seed": seed,
            "minutes": minutes, "steps": steps, "scores": scores,
        }  # fmt: skip

    runs = [run(1, 2.0), run(2, 3.0, steps=103), run(1, 9.0, minutes=None), run(1, 5.0, "b")]
    (group,) = report.over_seeds([*runs, {**run(2, 5.0, "b"), "scores": None}])
    assert group["seeds"] == [1, 2]
    assert group["kl"] == {"mean": 2.5, "sd": pytest.approx(0.5**0.5)}
    assert group["rouge_l"]["mean"] == pytest.approx(0.25)
    report.table_over_seeds([group])
    assert "| a | cache | warm | 0.001 | 3.6 | [1, 2] | 2.500 ± 0.707 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kl-tail+iq+lm", "kl-tail+soft+ema"])
def test_a_killed_run_goes_on_where_it_was(script, folders, runs, monkeypatch, tmp_path, name):
    import learn
    from methods import with_extras

    bench = script.Bench(script.options_of("").parse_args(arguments(folders)))
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    logs = []
    monkeypatch.setattr(learn, "CHECKPOINT_SECONDS", -1.0)
    for folder, stops in ((whole, None), (cut, 3)):
        folder.mkdir()
        save, saved = learn._save, []

        def killed(*args, stops=stops, saved=saved, save=save):
            save(*args)
            saved.append(args)
            if len(saved) == stops:
                raise KeyboardInterrupt

        monkeypatch.setattr(learn, "_save", killed)
        how = {"steps": 5, "size": 3, "rate": 1e-2, "seed": 4, "look": bench.look}
        given = bench.teacher, bench.train, with_extras(name), folder
        if stops:
            with pytest.raises(KeyboardInterrupt):
                learn.train(bench.student("cold"), *given, **how)
            assert (folder / "checkpoint.safetensors").exists()
        monkeypatch.setattr(learn, "_save", save)
        student = bench.student("cold")
        log = learn.train(student, *given, **how)
        logs.append(([x["loss"] for x in log], [p.detach() for p in student.parameters()]))
        assert not list(folder.glob("checkpoint*"))
    assert logs[0][0] == logs[1][0]
    for whole_part, cut_part in zip(logs[0][1], logs[1][1], strict=True):
        assert torch.equal(whole_part, cut_part)


def test_own_answers_are_the_students_and_the_teacher_scores_them(script, folders, runs):
    import learn
    from methods import METHODS

    bench = script.Bench(script.options_of("").parse_args(arguments(folders)))
    student = bench.student("cold")
    chosen = [0, 3, 5]
    given = student, bench.teacher, bench.train, chosen
    batch = learn.drawn(*given, METHODS["opd"], seed=1)
    again = learn.drawn(*given, METHODS["opd"], seed=1)
    other = learn.drawn(*given, METHODS["opd"], seed=2)
    data = learn.drawn(*given, METHODS["kl-p1"], seed=1)
    assert torch.equal(batch.ids, again.ids)
    assert batch.ids.shape != other.ids.shape or not torch.equal(batch.ids, other.ids)
    hidden = learn.last_hidden_state(bench.teacher, input_ids=batch.ids, attention_mask=batch.mask)[
        batch.states
    ]
    torch.testing.assert_close(batch.teacher_hidden, hidden, rtol=0, atol=0)
    for at, i in enumerate(chosen):
        prompt = bench.train.encoded[i].prompt
        assert batch.ids[at, : len(prompt)].tolist() == prompt
    assert data.tokens.tolist() == sum((bench.train.encoded[i].completion for i in chosen), [])
    assert (batch.successor[batch.tokens == bench.train.eos] == -1).all()


def test_settings_that_runs_share_must_not_change(script, folders, runs):
    with pytest.raises(SystemExit, match="batch: expected 3 as in .*settings.json, got 4"):
        script.main([*arguments(folders), "--batch", "4"])


def test_methods_by_name_and_by_text(script):
    from methods import METHODS, with_extras

    with pytest.raises(SystemExit, match="method: expected one of sft, .*got magic"):
        with_extras("magic")
    assert with_extras("kl-tail") == METHODS["kl-tail"]
    assert with_extras("kl-tail+lm").lm_weight == 1
    few = with_extras("kl-p1+top5")
    assert few.words == "forward KL, top 5 and tail bucket"
    assert dict(few.options) == dict(METHODS["kl-p1"].options) | {"k": 5}
    whole = with_extras("kl-p1+top5+gamma0")
    assert whole.words == "forward KL, top 5 and tail bucket, gamma 0"
    assert whole.options == (*few.options, ("gamma", 0.0))
    method = with_extras("ForwardKL(tail=True) + 0.1 * LSIQ()+value+lm")
    assert repr(method.objective).startswith("1 * ForwardKL(tail=True) + 0.1 * LSIQ(")
    assert (method.value_head, method.lm_weight, method.options) == (
        True,
        1.0,
        METHODS["kl-p1"].options,
    )


def test_iq_learn_over_the_whole_vocabulary(script):
    """It is the objective on sets that leave nothing out."""
    from methods import GAMMA, METHODS

    logits = torch.randn(2, 4, 30, dtype=torch.double)
    tokens, successor = torch.tensor([3, 29, 0, 3]), torch.tensor([1, -1, 3, -1])
    given = {"k": 30, "top_p": 1.0, "q": "logit", "gamma": GAMMA, "successor": successor}
    wanted = ops.td_loss(*logits, tokens, objective=IQLearn(alpha=10.0), **given)
    got = METHODS["iq-whole"].dense(*logits, tokens, successor)
    torch.testing.assert_close(got, wanted.loss)


def test_a_set_of_the_taken_token_alone(script):
    """Its soft TD error is that over the whole vocabulary: log pi(a) - log pi*(a)."""
    from methods import with_extras

    method = with_extras("CrossEntropy(tail=True) + 0.5 * SoftTD()+taken")
    hidden, weight = torch.randn(4, 8, dtype=torch.double), torch.randn(30, 8, dtype=torch.double)
    theirs, theirs_weight = torch.randn_like(hidden), torch.randn_like(weight)
    tokens, successor = torch.tensor([3, 29, 0, 3]), torch.tensor([1, 2, -1, -2])
    plain = None, None, 1.0
    loss, told = method.loss(
        hidden, Head(weight, *plain), theirs, Head(theirs_weight, *plain), tokens, successor
    )
    q, p = (
        (h @ w.T).log_softmax(-1)[torch.arange(4), tokens]
        for h, w in ((hidden, weight), (theirs, theirs_weight))
    )
    torch.testing.assert_close(loss, (0.5 * (q - p).square() - q).mean())
    assert told["set_size"] == 1


def test_the_value_head_learns(script, folders, runs, tmp_path):
    """It moves, its level is told, and the run's model is without it."""
    import learn
    from methods import with_extras
    from safetensors import safe_open

    bench = script.Bench(script.options_of("").parse_args(arguments(folders)))
    method = with_extras("ForwardKL(tail=True) + IQLearn(alpha=1.0)+value")
    how = {"steps": 3, "size": 3, "rate": 1e-2, "seed": 4, "look": bench.look, "looks": 1}
    student = bench.student("cold")
    log = learn.train(student, bench.teacher, bench.train, method, tmp_path, **how)
    assert [entry["state_value"] for entry in log][0] == 0
    assert log[-1]["state_value"] != 0
    assert ["scores" in entry for entry in log] == [False, False, True]
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "value" in name]  # noqa: SIM118


def test_a_target_network_follows_behind(script, folders, runs, tmp_path):
    """The first step has the student's own V', the later ones that of its past."""
    import learn
    from methods import METHODS, TARGET_DECAY, with_extras

    assert with_extras("soft-td+value+ema+lm").target_decay == TARGET_DECAY
    bench = script.Bench(script.options_of("").parse_args(arguments(folders)))
    how = {"steps": 3, "size": 3, "rate": 1e-2, "seed": 4, "look": bench.look, "looks": 0}
    own, slow = (
        learn.train(bench.student("cold"), bench.teacher, bench.train, method, tmp_path, **how)
        for method in (METHODS["soft-td"], with_extras("soft-td+ema"))
    )
    assert slow[0]["loss"] == pytest.approx(own[0]["loss"], rel=1e-6)
    assert slow[0]["grad_norm"] == pytest.approx(own[0]["grad_norm"], rel=1e-5)
    # one step later the students are the same, and the network is not
    assert slow[1]["loss"] != pytest.approx(own[1]["loss"], rel=1e-4)


def test_the_lm_loss_is_of_the_datas_rows(script, folders, runs):
    import learn
    from methods import METHODS, with_extras

    from tdkd.models import lm_head

    bench = script.Bench(script.options_of("").parse_args(arguments(folders)))
    student = bench.student("cold")
    batch = learn.drawn(student, bench.teacher, bench.train, [0, 1, 2, 3], METHODS["gkd"], seed=3)
    assert 0 < batch.own.sum() < batch.own.numel()
    heads = lm_head(student), lm_head(bench.teacher)
    with torch.no_grad():
        both = learn.forward(student, *heads, batch, with_extras("gkd+lm"))[0]
        alone = learn.forward(student, *heads, batch, METHODS["gkd"])[0]
        hidden = learn.last_hidden_state(student, input_ids=batch.ids, attention_mask=batch.mask)
        rows = hidden[batch.states][~batch.own]
        wanted = torch.nn.functional.cross_entropy(
            rows @ heads[0].weight.T, batch.tokens[~batch.own]
        )
    assert (both - alone).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_what_comes_after_a_state(script):
    """Ahead, by hand: an answer of three tokens that ended, and one of two that was cut off."""
    from methods import Ahead

    from tdkd import ops

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator).double() for _ in range(2))
    tokens = torch.tensor([1, 2, 3, 4, 5])
    successor = torch.tensor([1, 2, -1, 4, -2])
    student.requires_grad_()
    out = ops.td_loss(
        student, teacher, tokens, objective=Ahead(), k=7, top_p=1.0, successor=successor,
        reduction="none",
    )  # fmt: skip
    log_q, log_p = (
        x.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1) for x in (student, teacher)
    )
    ratio = (log_p - log_q).detach()
    ahead = torch.tensor([(ratio[1] + ratio[2]) / 2, ratio[2], 0, 0, 0])
    torch.testing.assert_close(out.loss, -ahead * log_q, check_dtype=False, rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(out.loss.sum(), student)
    (wanted,) = torch.autograd.grad((-ahead * log_q).sum(), student)
    torch.testing.assert_close(found, wanted, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_gradients_beside_those_of_the_kl(script, folders, runs):
    import gradients
    from methods import FAMILY

    gradients.main([*arguments(folders), "--methods", "kl-full", "sft", "published", *FAMILY])
    rows = json.loads((folders / "out" / "gradients.json").read_text())["rows"]
    assert {row["start"] for row in rows} == {"cold", "warm"}
    for start in ("cold", "warm"):
        found = {row["method"]: row for row in rows if row["start"] == start}
        assert found["kl-full"]["kl"] == pytest.approx(1, abs=1e-5)
        assert found["kl-full"]["length"] == pytest.approx(1, rel=1e-5)
        assert found["sft"]["cross_entropy"] == pytest.approx(1, abs=1e-5)
        assert found["entropy (reference)"]["entropy"] == pytest.approx(1, abs=1e-5)
        # what lowers the KL brings mass to the set
        assert found["kl-full"]["mass"] > 0
        assert set(FAMILY) < set(found)
    # through V' it is another gradient
    flow, stop = (found[f"iq-logit-0.1-token-{way}"] for way in ("flow", "stop"))
    assert flow["kl"] != pytest.approx(stop["kl"])
