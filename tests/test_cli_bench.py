"""tdkd bench: what it writes, what it refuses, how it measures. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tdkd import ops, records
from tdkd.benchmark import report
from tdkd.benchmark.cases import MAX_COPIES, SUITES, Case, choose, make_inputs
from tdkd.benchmark.linear import action_sets
from tdkd.benchmark.measure import allocations, compared, measure, order, peak_extra_bytes
from tdkd.benchmark.rivals import ANCHORS, Rival, Skip, nucleus, rivals_of
from tdkd.benchmark.run import Options, closing, run
from tdkd.cli import app
from tdkd.errors import UserError
from tdkd.kernels import head, routes
from tdkd.kernels.batch_vocabulary.reference import LAW_ROWS
from tdkd.testing import LOGITS, make_logits

ROOT = Path(__file__).resolve().parents[1]
TINY = Case("select_actions", rows=8, vocab=512, k=4)
SMALL = ["--rows", "8", "--vocab", "512", "--k", "4", "--rounds", "2", "--no-compile"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Directory of a tiny run of the quick suite, and the JSON in it."""
    output = tmp_path_factory.mktemp("bench")
    done = CliRunner().invoke(app, ["bench", *SMALL, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "quick-part.json" in done.output
    return output, json.loads((output / "quick-part.json").read_text())


def rival(name, run=None, **options):
    """A rival that calls ``run`` with the inputs."""
    return Rival(name, lambda case: run or (lambda inputs: inputs.main.amax(-1)), **options)


def test_the_json_says_on_what_and_with_what(bench):
    output, written = bench
    assert written["schema"] == report.SCHEMA
    assert written["date"].endswith("+00:00")
    assert (written["suite"], written["rounds"]) == ("quick", 2)
    assert (written["device"], written["anchor"], written["left_out"]) == ("cpu", "amax", [])
    assert written["threads"] == torch.get_num_threads()
    assert set(written["machine"]) == {"cpu", "cores", "capability", "memory_bytes", "system"}
    assert set(written["versions"]) == {"python", "torch", "tdkd", "triton", "liger_kernel"}
    assert written["versions"]["torch"] == torch.__version__
    assert written["git"] is None or set(written["git"]) == {"commit", "dirty"}
    text = json.dumps(written)
    assert str(output) not in text
    assert os.getcwd() not in text


def test_every_rival_is_measured_or_has_a_reason(bench):
    _, written = bench
    assert [(c["op"], c["dtype"]) for c in written["cases"]] == [
        ("select_actions", "float32"),
        ("select_actions", "bfloat16"),
        ("td_loss", "float32"),
    ]
    for index, case in enumerate(written["cases"]):
        assert (case["rows"], case["vocab"], case["k"]) == (8, 512, 4)
        assert [r["rival"] for r in case["rivals"]] == [
            r.name for r in rivals_of(SUITES["quick"][index])
        ]
        for result in case["rivals"]:
            if result["skipped"] is not None:
                assert result["skipped"]
                assert result["median_s"] is None
                continue
            times = result["times_s"]
            assert len(times) == 2
            low, high = result["quartiles_s"]
            assert min(times) <= low <= result["median_s"] <= high <= max(times)
        by_name = {r["rival"]: r for r in case["rivals"]}
        assert by_name["torch.compile"]["skipped"] == "left out by --no-compile"
        assert by_name["tdkd reference"]["skipped"] is None
        size = 8 * 512 * (2 if case["dtype"] == "bfloat16" else 4)
        passes = (2, 4) if case["op"] == "td_loss" else (1, 1)
        assert by_name["amax"]["bytes_moved"] == passes[0] * size
        assert by_name["tdkd reference"]["bytes_moved"] == passes[1] * size
        assert by_name["amax"]["share"] == 1.0
    # bandwidth is not what bounds products of matrices
    assert by_name["tdkd linear"]["gb_per_s"] is None
    assert by_name["tdkd linear"]["ratio"] == 1.0


def test_the_picture_opens(bench):
    image = pytest.importorskip("matplotlib.image")
    height, width, _ = image.imread(bench[0] / "quick-part.png").shape
    assert height > 100
    assert width > 100


def test_without_matplotlib_the_json_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = [*SMALL, "--op", "select_actions", "--name", "mine", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", *args])
    assert done.exit_code == 0, done.output
    assert 'matplotlib is missing: pip install "tdkd[train]"' in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    "args,says",
    [
        (["--suite", "slow"], "suite: expected one of quick, cpu"),
        (["--op", "softmax"], "op: expected one of select_actions, td_loss, gather_q"),
        (["--op", "soft_value"], "op: expected one of suite quick, got soft_value"),
        (["--device", "tpu"], "device: expected one of cpu, cuda, got tpu"),
        (["--budget", "0"], "budget: expected seconds > 0, got 0"),
        (["--suite", "adversarial", "--op", "td_loss"], "op: expected one of suite adversarial"),
        (["--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16, got int8"),
        (["--logits", "flat"], "logits: expected one of random, peaked"),
        (["--rows", "0"], "rows: expected a number >= 1, got 0"),
        (["--vocab", "1"], "vocab: expected a number >= 2, got 1"),
        (["--k", "0"], "k: expected a number >= 1, got 0"),
        (["--suite", "linear", "--sets", "some.npz"], "sets: expected real, random, or an npz"),
        (["--suite", "linear", "--sets", __file__], "sets: expected real, random, or an npz"),
        (["--rounds", "0"], "rounds: expected a number >= 1, got 0"),
        (["--threads", "0"], "threads: expected a number >= 1, got 0"),
        (["--name", "a/b"], "name: expected a file name"),
    ],
)
def test_what_it_refuses(tmp_path, args, says):
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "out"), *args])
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_here_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: expected cpu, for torch sees no GPU here"):
        run(Options(device="cuda", output=str(tmp_path / "out")), lambda *told: None)


def test_a_budget_ends_a_run_and_says_what_it_left_out(monkeypatch, tmp_path):
    clock = iter([0.0, 0.0, 5.0])  # begin; before the first case; before the second
    monkeypatch.setattr("tdkd.benchmark.run.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("tdkd.benchmark.run.measure", lambda case, rivals, **options: [])
    options = Options(rows=8, vocab=[512], budget=4.0, output=str(tmp_path))
    done = run(options, lambda *told: None)
    written = json.loads((tmp_path / "quick-part.json").read_text())
    assert len(written["cases"]) == len(done.measured) == 1
    assert [case["op"] for case in written["left_out"]] == ["select_actions", "td_loss"]
    assert "left out by --budget: select_actions 8 x 512 bfloat16" in closing(done)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["quick-part.json"]  # nothing to draw


@pytest.mark.parametrize("op", ["gather_q", "soft_value", "td_target"])
def test_rivals_of_a_small_op_agree(op):
    (case,) = choose("small", op, rows=[16], vocab=[512], k=[4])
    assert case.rows == 16
    inputs = make_inputs(case)[0]
    results = {
        rival.name: rival.prepare(case)(inputs)
        for rival in rivals_of(case)
        if not rival.compiles and rival.name not in ("amax", "tdkd")
    }
    assert set(results) == {"tdkd reference", "torch eager"}
    torch.testing.assert_close(results["torch eager"], results["tdkd reference"])


@pytest.mark.parametrize("k", [4, 64])
def test_rivals_of_a_loss_agree(k):
    """What a user would write is the same loss; the published one sees the authors' sets."""
    case = Case("td_loss", 16, 512, k=k, top_p=0.8)
    inputs = make_inputs(case)[0]
    found = {
        rival.name: rival.prepare(case)(inputs)
        for rival in rivals_of(case)
        if rival.name in ("tdkd reference", "plain torch")
    }
    for got, expected in zip(found["plain torch"], found["tdkd reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    held = nucleus(inputs.main, case.top_p)
    ids = ops.select_actions(inputs.main, 512, case.top_p, impl="reference").ids.long()
    inside = torch.zeros(16, 513, dtype=torch.bool)
    inside.scatter_(-1, torch.where(ids < 0, 512, ids), True)
    assert torch.equal(held, inside[:, :-1])


def test_fields_without_use_to_an_op_make_no_cases():
    cases = choose("small", vocab=[512, 1024], k=[4], logits=["random", "peaked"])
    assert [str(case) for case in cases] == [
        "gather_q 512 x 512 float32 k=4",
        "gather_q 512 x 1024 float32 k=4",
        "soft_value 8192 k=4",
        "td_target 8192",
    ]
    assert choose("gpu") == SUITES["gpu"]


def test_a_gpu_is_compared_with_a_copy():
    case = TINY._replace(device="cuda")
    assert [rival.name for rival in rivals_of(case)][:3] == ["copy", "amax", "tdkd"]
    assert "copy" not in [rival.name for rival in rivals_of(TINY)]
    copy = rivals_of(case)[0]
    anchor, half = measure(TINY, [copy, rival("half", passes=1)], rounds=1)
    assert anchor.bytes_moved == 2 * TINY.main_bytes
    anchor, half = compared(
        [anchor._replace(gb_per_s=10.0), half._replace(gb_per_s=5.0)], ANCHORS["cuda"]
    )
    assert (anchor.share, half.share) == (1.0, 0.5)


def test_a_compiler_is_left_out_of_most_cases():
    (result,) = measure(TINY._replace(compiled=False), [rival("c", compiles=True)], rounds=1)
    assert result.skipped == "not compiled in this case, for time"


def test_a_rival_that_fails_later_is_reported():
    calls = []

    def twice(inputs):
        calls.append(None)
        if len(calls) > 2:
            raise MemoryError("no more")

    failed, other = measure(TINY, [rival("a", twice), rival("b")], rounds=4)
    assert failed.skipped == "MemoryError: no more"
    assert failed.median_s is None
    assert len(other.times_s) == 4


def test_without_typer_and_rich(bench, tmp_path):
    """The module says what the command says, and reads what it wrote."""
    script = (
        "import runpy, sys; sys.modules.update(typer=None, rich=None);"
        "runpy.run_module('tdkd.benchmark', run_name='__main__', alter_sys=True)"
    )

    def module(*args):
        command = [sys.executable, "-c", script, *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = module(*SMALL, "--op", "td_loss", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "td_loss 8 x 512 float32 k=4 peaked (share of amax)" in done.stdout
    shown = module("--show", str(tmp_path / "quick-part.json"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1].split()[:5] == ["case", "tdkd", "ms", "GB/s", "of"]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "file")])
    assert isinstance(done.exception, UserError)
    assert "output: expected a directory to write to" in str(done.exception)


def test_fields_of_a_suite_are_replaced_in_every_combination():
    assert choose("cpu") == SUITES["cpu"]
    cases = choose("quick", "select_actions", vocab=[512, 1024], dtype=["float16"], k=[])
    assert [(c.vocab, c.dtype, c.rows) for c in cases] == [
        (512, "float16", 512),
        (1024, "float16", 512),
    ]


@pytest.mark.parametrize("case", [TINY, Case("td_loss", 8, 512)])
def test_copies_of_the_inputs_are_equal_and_apart(case):
    copies = make_inputs(case)
    assert len(copies) == MAX_COPIES
    assert len({inputs.main.data_ptr() for inputs in copies}) == MAX_COPIES
    assert copies[0].main.equal(copies[-1].main)
    if case.op == "td_loss":
        assert len({inputs.student.data_ptr() for inputs in copies}) == MAX_COPIES
        assert all(inputs.student.requires_grad for inputs in copies)
        assert copies[0].tokens.min() >= 1


def test_rounds_are_interleaved_and_copies_rotate():
    assert [order(turn, 3) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    heard = []

    def named(name, **options):
        return rival(name, lambda inputs: heard.append((name, inputs.main.data_ptr())), **options)

    rivals = [named("a"), named("b"), named("c")]
    a, b, c = measure(TINY, rivals, rounds=3)
    # one call of each, three rounds; then memory
    assert "".join(name for name, _ in heard[:12]) == "abc" + "abc" + "bca" + "cab"
    assert all(one != other for (_, one), (_, other) in zip(heard[:11], heard[1:12], strict=True))
    assert [len(result.times_s) for result in (a, b, c)] == [3, 3, 3]


def test_a_rival_that_cannot_run_is_skipped_with_its_reason():
    def no_kernel(inputs):
        raise NotImplementedError('expected "auto", got "fused"\nand more')

    def not_here(case):
        raise Skip("not on this case")

    def elsewhere(inputs):
        raise RuntimeError("no compiler at /home/someone/bin/g++")

    rivals = [
        rival("amax", passes=1),
        rival("tdkd", no_kernel, passes=1),
        Rival("b", not_here),
        rival("c", compiles=True),
        rival("d", elsewhere),
    ]
    anchor, *skipped = measure(TINY, rivals, rounds=1, compile=False)
    assert [result.skipped for result in skipped] == [
        'NotImplementedError: expected "auto", got "fused"',
        "not on this case",
        "left out by --no-compile",
        "RuntimeError: no compiler at g++",
    ]
    assert all(result.times_s == () for result in skipped)
    assert anchor.skipped is None
    assert anchor.ratio is None  # nothing to compare with


def test_ratio_and_share():
    amax, tdkd, none = measure(
        TINY, [rival("amax", passes=1), rival("tdkd", passes=2), rival("x")], rounds=1
    )
    amax, tdkd, none = compared(
        [
            amax._replace(median_s=1.0, gb_per_s=10.0),
            tdkd._replace(median_s=4.0, gb_per_s=5.0),
            none._replace(median_s=2.0),
        ],
        "amax",
    )
    assert (amax.ratio, tdkd.ratio, none.ratio) == (0.25, 1.0, 0.5)
    assert (amax.share, tdkd.share, none.share) == (1.0, 0.5, None)


def test_memory_of_a_call_is_seen():
    inputs = make_inputs(TINY)[0]
    least = TINY.main_bytes
    assert allocations(lambda x: x.main.amax(-1), inputs, least) == 0
    assert allocations(lambda x: (x.main + 1).exp(), inputs, least) == 2
    peak = peak_extra_bytes(lambda x: torch.ones(16 << 20).sum(), inputs)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs")
    # Linux counts pages in batches: a few hundred KB may be missing
    assert peak > 60 << 20


def test_times_outlive_a_call_without_memory():
    """What was timed is kept, and the run goes on."""
    calls = []

    def until_timed(inputs):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no memory")
        return inputs.main.amax(-1)

    timed, other = measure(TINY, [rival("amax", until_timed), rival("tdkd")], rounds=2)
    assert len(timed.times_s) == 2
    assert (timed.peak_extra_bytes, timed.result_bytes) == (None, None)
    assert timed.logits_sized_allocations is None
    assert other.result_bytes == 4 * TINY.rows


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    records.write_whole(path, {"whole": True})
    with pytest.raises(TypeError):
        records.write_whole(path, {"torn": object()})
    assert json.loads(path.read_text()) == {"whole": True}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_what_their_kind_says(kind, dtype):
    def make(rows=64, vocab=4096):
        return make_logits(kind, rows, vocab, dtype, torch.Generator().manual_seed(0))

    logits = make()
    assert logits.shape == (64, 4096)
    assert logits.dtype == dtype
    assert logits.is_contiguous()
    assert torch.equal(logits.nan_to_num(7.0), make().nan_to_num(7.0))
    assert make(rows=0).shape == (0, 4096)
    assert make(vocab=1).shape == (64, 1)
    z = logits.float()
    steps = z.diff(dim=-1)
    if kind == "nan":
        assert (z.isnan().sum(-1) == 1).all()
        return
    assert not z.isnan().any()
    if kind == "masked":
        assert (z == -torch.inf).all()
        return
    assert z.isfinite().all()
    if kind == "random":
        assert z.std() == pytest.approx(2.5, rel=0.02)  # 262144 draws: 0.14% at one sigma
    elif kind == "peaked":
        assert 0.5 < z.softmax(-1).amax(-1).mean() < 0.7
    elif kind == "constant":
        assert (steps == 0).all()
    elif kind == "spike":
        assert (z.argmax(-1) == 4095).all()
        assert z.amax() > 9000
    else:
        rising = steps if kind == "ascending" else -steps
        assert (rising >= 0).all()
        assert (rising > 0).all() or dtype != torch.float32


def test_unknown_logits_are_refused():
    with pytest.raises(UserError, match="logits: expected one of"):
        make_logits("flat", 1, 2, torch.float32, torch.Generator())
    with pytest.raises(UserError, match="vocab: expected"):
        make_logits("random", 1, 0, torch.float32, torch.Generator())


@pytest.mark.parametrize("sets", ["real", "random"])
@pytest.mark.parametrize("op", ["linear_td_loss", "linear_log_probs", "linear_cross_entropy"])
def test_rivals_from_hidden_states_do_the_same(op, sets):
    """`dense` has the loss and the gradients of `tdkd`; `three products` is less."""
    case = Case(op, 40, 700, k=8, sets=sets, hidden=16)
    inputs = make_inputs(case)[0]
    found = {
        rival.name: rival.prepare(case)(inputs) for rival in rivals_of(case) if not rival.compiles
    }
    for got, expected in zip(found["tdkd"], found["dense"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name in {"torch", "torch, its chunks", "torch, 256 rows"} & found.keys():
        for got, expected in zip(found[name], found["dense"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if op == "linear_td_loss":
        assert found["tdkd batch"][2].shape == found["tdkd gather"][2].shape == (700, 16)


def test_a_case_of_mixed_precision():
    """float32 weights and gradients; a CPU rounds the dense loss alone."""
    case = Case("linear_td_loss", 40, 700, k=8, hidden=16, autocast="bfloat16")
    assert str(case).endswith("under bfloat16 autocast")
    assert "autocast" not in str(case._replace(autocast=None))
    assert any(case.autocast for case in SUITES["gpu"])
    inputs = make_inputs(case)[0]
    found = {
        rival.name: rival.prepare(case)(inputs) for rival in rivals_of(case) if not rival.compiles
    }
    assert found["three products"][0].dtype == torch.bfloat16
    exact, rounded = found["tdkd"], found["dense"]
    for got, coarse in zip(exact, rounded, strict=True):
        assert got.dtype == coarse.dtype == torch.float32
        assert 0 < (got - coarse).norm() < 0.1 * got.norm()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["linear_gather_q", "linear_td_loss"])
def test_every_way_is_taken_and_gives_the_same(monkeypatch, op, dtype):
    """Whatever the rule says of a case: here it gathers, and takes all columns."""
    case = Case(op, 20, 1400, k=8, sets="random", hidden=16, dtype=dtype, ways=True)
    widths = []

    class Counted(head.Head):
        def __init__(self, weight, bias, factors):
            widths.append(weight.shape[0])
            super().__init__(weight, bias, factors)

    monkeypatch.setattr(head, "Head", Counted)
    inputs, found, looked = make_inputs(case)[0], {}, {}
    for rival in rivals_of(case):
        del widths[:]
        found[rival.name] = rival.prepare(case)(inputs)
        looked[rival.name] = set(widths)
    if op == "linear_gather_q":
        assert (looked["tdkd"], looked["k rows"], looked["all rows"]) == (set(), set(), {1400})
        pairs = [("tdkd", "k rows"), ("all rows", "k rows"), ("all rows", "dense")]
    else:
        assert looked["tdkd"] == looked["exact"] == {1400}
        assert 1120 <= min(looked["batch"]) == max(looked["batch"]) < 1400
        pairs = [("tdkd", "exact")]
        assert found["batch"][2].shape == (1400, 16)
    unit = torch.finfo(getattr(torch, dtype)).eps
    for one, other in pairs:
        for got, expected in zip(found[one], found[other], strict=True):
            error = (got.double() - expected.double()).abs().max()
            assert error <= 8 * unit * expected.abs().max()


def test_the_routes_are_measured_where_they_may_cross():
    cases = SUITES["routes"]
    assert choose("routes") == cases
    for op, vocab in (("linear_gather_q", 151_936), ("linear_td_loss", 151_936)):
        mine = [case for case in cases if case.op == op]
        assert all(case.ways and case.k <= case.vocab for case in mine)
        assert any(case.vocab == vocab for case in mine)
        assert any(case.hidden >= 2048 for case in mine)
        assert any(case.rows <= 64 for case in mine)
        assert any(case.dtype == "bfloat16" for case in mine)
    sides = {
        routes.gathers("cpu", c.k, c.vocab, c.hidden, c.rows) for c in cases if "gather" in c.op
    }
    assert sides == {True, False}


def test_a_gpu_has_routes_of_its_own():
    """Its bounds are elsewhere, and its batches larger."""
    sides = {"gather": set(), "batch": set(), "sampled": set()}
    for case in SUITES["gpu-routes"]:
        size = case.vocab, case.hidden, case.rows, torch.bfloat16
        if case.op == "linear_gather_q":
            sides["gather"].add(routes.gathers("cuda", case.k, *size))
        else:
            union = round(case.vocab * (1 - (1 - case.k / case.vocab) ** case.rows)) + 1024
            sides["batch"].add(routes.pays("cuda", union, case.vocab, *size[2:]))
            sides["sampled"].add(routes.samples("cuda", case.k, 1024, *size, LAW_ROWS))
            assert case.k <= 1024  # more than that the kernels leave to the reference
    assert all(side == {True, False} for side in sides.values()), sides


def test_the_sampled_columns_are_measured_where_they_may_cross():
    sides = {sampled_by_the_rule(case._asdict()) for case in SUITES["sampled"]}
    assert sides == {True, False}


def sampled_by_the_rule(case):
    size = case["k"], 1024, case["vocab"], case["hidden"], case["rows"]
    return routes.samples("cpu", *size, getattr(torch, case["dtype"]), LAW_ROWS)


def test_columns_are_sampled_where_that_was_measured_to_cost_less():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "sampled.json"
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) == len(SUITES["sampled"])
    for case in cases:
        cost = {r["rival"]: r["median_s"] for r in case["rivals"]}
        taken = cost["sampled" if sampled_by_the_rule(case) else "exact"]
        assert taken <= 1.1 * min(cost["sampled"], cost["exact"]), case


@pytest.mark.parametrize(
    "name,count,factors,allowed",
    [
        ("routes", 32, torch.float32, 1.1),
        ("routes-bfloat16", 32, torch.bfloat16, 1.1),
        # other CPUs: the bound is between them
        ("tiles-routes", 18, torch.float32, 1.2),
        ("routes-avx2", 7, torch.float32, 1.2),
        ("routes-gather-avx2", 16, torch.float32, 1.1),
    ],
)
def test_the_rule_takes_the_way_that_was_measured_to_cost_least(name, count, factors, allowed):
    """Within the noise of a measurement, which is in the repository."""
    path = Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json"
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) == count
    for case in cases:
        if name == "tiles-routes" and case["dtype"] == "bfloat16":
            factors = torch.bfloat16
        cost = {r["rival"]: r["median_s"] for r in case["rivals"]}
        k, columns, rows = case["k"], case["vocab"], case["rows"]
        if case["op"] == "linear_gather_q":
            names = ("k rows", "all rows")
            first = routes.gathers("cpu", k, columns, case["hidden"], rows, factors)
        else:
            names = ("batch", "exact")
            # of random sets the union, and the sample beside it
            held = round(columns * (1 - (1 - k / columns) ** rows)) + 1024
            first = routes.pays("cpu", held, columns, rows, factors)
        taken = cost[names[0] if first else names[1]]
        assert taken <= allowed * min(cost[name] for name in names), case


def test_real_sets_are_those_that_were_measured():
    case = Case("linear_td_loss", 2048, 49_152)
    actions, tokens = action_sets(case, torch.Generator())
    held = actions.ids >= 0
    assert (actions.ids == tokens[:, None]).any(-1).all()
    assert torch.equal(actions.count, held.sum(-1).int())
    assert actions.ids[held].unique().numel() == 5688  # as benchmarks/README.md says
    spread, _ = action_sets(case._replace(vocab=151_936), torch.Generator())
    assert torch.equal(spread.ids[held], 3 * actions.ids[held])
    assert actions.mass.tolist() == pytest.approx([0.85] * 2048)


@pytest.mark.parametrize("name,distinct", [("8192-p0.8", 13_455), ("8192-p1", 26_148)])
def test_sets_of_as_many_rows_as_a_gpu_takes(name, distinct):
    path = ROOT / "benchmarks" / "sets" / f"{name}.npz"
    case = Case("linear_td_loss", 8192, 49_152, sets=str(path))
    actions, tokens = action_sets(case, torch.Generator())
    assert len(tokens) == 8192
    # as benchmarks/README.md says
    assert actions.ids[actions.ids >= 0].unique().numel() == distinct


def test_sets_of_ones_own(tmp_path):
    """A file of three sets, for more rows than it has; the taken token is always a member."""
    path = tmp_path / "own.npz"
    np.savez(path, members=[4, 9, 2, 7, 1, 3], count=[3, 1, 2], tokens=[9, 7, 5])
    (case, *others) = choose("linear", "linear_td_loss", rows=[4], k=[2], sets=[str(path)])
    assert str(case).endswith("k=2 own.npz")
    assert others
    assert all(case.sets == str(path) for case in others)
    actions, tokens = action_sets(case, torch.Generator())
    assert tokens.tolist() == [9, 7, 5, 9]
    assert actions.ids.tolist() == [[4, 9], [7, -1], [5, 3], [4, 9]]
