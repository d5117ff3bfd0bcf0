"""What importing tdkd brings with it, and what works without Triton, the extension or an extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from commands import one_line

EXTRAS = ("transformers", "trl", "datasets", "accelerate", "peft", "safetensors", "rouge_score")
# what the ops have no use for
HEAVY = (*EXTRAS, "triton", "typer", "rich", "matplotlib", "numba", "pandas", "scipy")

# packages that are not there, as the import system tells it; find_spec finds none either
BLOCKED = """
import importlib.abc
import sys
blocked, sys.argv = sys.argv[1].split(), sys.argv[1:]
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in blocked else found(name, package)
)
"""


def python(code, blocked=(), *args):
    """Runs code in a process of its own, where some packages are missing."""
    command = [sys.executable, "-c", BLOCKED + code, " ".join(blocked), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def without(blocked, *args):
    """Runs the command where some packages are missing."""
    code = "from tdkd.cli import main\nsys.argv[0] = 'tdkd'\nmain()"
    return python(code, blocked, *args)


@pytest.mark.parametrize("what", ["tdkd", "tdkd.ops, tdkd.objectives, tdkd.nn"])
def test_importing_brings_nothing_that_is_heavy(what):
    """Over what torch brings itself."""
    code = f"""
import torch
before = set(sys.modules)
import {what}
came = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*came & set({HEAVY!r}))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


LOSS = """
import torch
from tdkd import nn, objectives, ops
torch.manual_seed(0)
logits = torch.randn(5, 40, requires_grad=True)
teacher, tokens = torch.randn(5, 40), torch.arange(5)
out = ops.td_loss(logits, teacher, tokens, k=4)
out.loss.backward()
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8)
fused = ops.linear_td_loss(
    hidden, weight, tokens, teacher_hidden=torch.randn(5, 8), teacher_weight=weight, k=4
)
fused.loss.backward()
assert logits.grad.any() and hidden.grad.any()
print(out.loss.item(), fused.loss.item())
"""


def test_the_ops_work_alone():
    """Without Triton, the extension and every extra, as with them."""
    alone = python(LOSS, (*HEAVY, "tdkd._C"))
    assert alone.returncode == 0, alone.stderr
    assert alone.stderr == ""
    whole = python(LOSS)
    assert whole.returncode == 0, whole.stderr
    for got, expected in zip(alone.stdout.split(), whole.stdout.split(), strict=True):
        # kernels sum in another order
        assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_info_says_what_is_missing_and_how_to_get_it():
    code = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name.replace("-", "_") in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from rich.console import Console
from tdkd.cli import info
info.Console = lambda: Console(width=200)
info.run()
"""
    missing = ("triton", "tdkd._C", "matplotlib", *EXTRAS)
    done = python(code, missing)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("transformers", "trl", "datasets", "peft", "rouge-score", "matplotlib"):
        (line,) = (line for line in lines if f" {name} " in line)
        assert 'missing: pip install "tdkd[train]"' in line
    (line,) = (line for line in lines if "gpu kernels" in line)
    assert 'Triton is not installed: pip install "triton"' in line
    (line,) = (line for line in lines if "cpu kernels" in line)
    assert "not built" in line


@pytest.mark.parametrize("args", [["--help"], ["info"], ["generate", "--help"]])
def test_help_and_info_work_without_the_extras(args):
    done = without(EXTRAS, *args)
    assert done.returncode == 0, done.stderr
    assert "tdkd" in done.stdout


def test_bench_works_without_the_extras(tmp_path):
    done = without(
        (*EXTRAS, "matplotlib"), "bench", "--op", "select_actions", "--rounds", "1", "--vocab",
        "64", "--rows", "2", "--no-compile", "--output", tmp_path, "--name", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'matplotlib is missing: pip install "tdkd[train]"' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


COMMANDS = {
    "generate": ["generate", "--model", "m", "--output", "x"],
    "evaluate": ["evaluate", "--model", "m", "--teacher", "t", "--data", "d", "--output", "x"],
    "distill": ["distill", "config.yaml"],
}


@pytest.mark.parametrize(
    "name,command",
    [
        ("transformers", "generate"),
        ("rouge_score", "evaluate"),
        ("trl", "distill"),
        ("datasets", "distill"),
        ("accelerate", "distill"),
    ],
)
def test_a_missing_extra_names_the_command_that_installs_it(name, command):
    done = without([name], *COMMANDS[command])
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert line.startswith("tdkd: ")
    assert line.endswith(' is missing: pip install "tdkd[train]"')


def test_a_module_that_needs_an_extra_says_so():
    code = """
import importlib
for module in ("trainer", "models", "checkpoints"):
    try:
        importlib.import_module(f"tdkd.{module}")
    except ModuleNotFoundError as error:
        print(error)
"""
    done = python(code, EXTRAS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.endswith(' is missing: pip install "tdkd[train]"') for line in lines)


def test_no_default_is_a_slice():
    """torch 2.11 and older compile no function with one."""
    for path in (Path(__file__).parents[1] / "tdkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for default in [*node.args.defaults, *node.args.kw_defaults]:
                    told = default and ast.unparse(default)
                    assert not str(told).startswith("slice("), f"{path}:{node.lineno}"
