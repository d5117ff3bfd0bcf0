"""Mutation testing of the ops: which changes of the code do the tests see?

One pytest session collects the tests. Each mutant is a fork of it, in which the mutated module is
executed apart and its functions, defaults and constants put in the place of the live ones. It meets
tests that reach its line until one fails or ``--seconds`` of them are full: the cheapest first, but
the n-th variant of a test counts n times as dear, and a test that found a mutant of the same
function less so. The parent runs no test, so that nothing of one mutant is left for the next.

What the tests make while they are collected (the objectives of a parametrization) is made by the
code as it is: a mutant of their constructors survives more easily than it should. hypothesis
draws the examples of every run of the tests, and does not shrink. Mutants come in an order drawn
once: a sample is the beginning of that order, and a longer run goes on from a shorter one.

Results go to a file, line by line: a run that was killed goes on where it was. A kill stands while
the mutated file is the same and the test that found it exists; a survivor meets the tests of files
that have changed since.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "tdkd/ops.py",
    "tdkd/arguments.py",
    "tdkd/td_rows.py",
    *(
        str(path.relative_to(ROOT))
        for rooms in ("tdkd/objectives/[a-z]*.py", "tdkd/kernels/*/reference.py")
        for path in sorted(ROOT.glob(rooms))
    ),
]
TESTS = [
    "tests/test_ops.py",
    "tests/test_ops_options.py",
    "tests/test_ops_properties.py",
    "tests/test_linear_td_loss.py",
    "tests/test_objectives_by_hand.py",
    "tests/test_objectives.py",
    "tests/test_levels.py",
    "tests/test_soft_mdp.py",
    "tests/test_kernels.py",
]
SKIPPED = "compile or opcheck or stable_abi or without_the_extension"
"""Tests, by words in their names, that look at the kernels and take seconds each."""
EXPLAINED = Path(__file__).with_name("explained.txt")
MEMORY = 16 << 30
TIMERS = (signal.SIGPROF, signal.SIGALRM)

sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import mutate  # noqa: E402
import pytest  # noqa: E402


def digest(path: str) -> str:
    return hashlib.sha1((ROOT / path).read_bytes()).hexdigest()[:12]


def in_fork(work: Callable[[], object], limit: float) -> tuple[object, int]:
    """What ``work`` returns in a process of its own, and the signal that ended it.

    ``limit``: seconds on a processor.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            for number in TIMERS:
                signal.signal(number, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, limit)  # of this process alone, however busy
            signal.alarm(int(20 * limit) + 1)  # one that sleeps
            given = json.dumps(work()).encode()
            with os.fdopen(writer, "wb") as out:
                out.write(given)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        given = source.read()
    _, status = os.waitpid(child, 0)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (json.loads(given) if given else None), ended


# Putting a mutant in place


def transplant(live: types.ModuleType, code: types.CodeType) -> None:
    """Makes the live module what ``code`` would have made it."""
    changed = types.ModuleType(live.__name__)
    changed.__file__ = live.__file__
    sys.modules[live.__name__] = changed  # dataclasses look their module up
    try:
        exec(code, changed.__dict__)
    finally:
        sys.modules[live.__name__] = live
    _transplant(live, changed, live.__name__)


def _transplant(live: object, changed: object, module: str) -> None:
    for name, new in vars(changed).items():
        old = vars(live).get(name)
        if isinstance(new, (bool, int, float, str)) and not name.startswith("__"):
            if old != new:
                setattr(live, name, new)
        elif isinstance(new, type):
            if new.__module__ == module and new is not old:
                _transplant(old, new, module)
        else:
            mine, other = _function(old), _function(new)
            if mine is not None and other is not None and other.__module__ == module:
                mine.__code__ = other.__code__
                mine.__defaults__ = other.__defaults__
                mine.__kwdefaults__ = other.__kwdefaults__


def _function(value: object) -> types.FunctionType | None:
    value = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
    return value if isinstance(value, types.FunctionType) else None


# The session


class Session:
    """A pytest plugin in whose session every test runs in a fork."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.room = Path(arguments.output)
        self.room.mkdir(parents=True, exist_ok=True)
        self.failed = False
        self.controlled: set[str] = set()
        self.sources = {path: digest(path) for path in FILES}
        self.tests = {path: digest(path) for path in TESTS if (ROOT / path).exists()}
        self.finders: dict[str, Counter[str]] = defaultdict(Counter)
        """by function, how many of its mutants each test has found"""
        self.mutants = {}
        for path in FILES:
            tree = ast.parse((ROOT / path).read_text())
            for mutant in mutate.mutants(tree):
                self.mutants[f"{path}::{mutant.name}"] = (path, tree, mutant)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests do not even import")
        self.items = {item.nodeid: item for item in session.items}
        self.baseline()
        self.measure()
        return True

    def run(self, nodeids: list[str]) -> str | None:
        """The first of the tests that fails."""
        items = [self.items[nodeid] for nodeid in nodeids]
        for item, following in zip(items, [*items[1:], None], strict=True):
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            except BaseException:
                self.failed = True
            if self.failed:
                return item.nodeid
        return None

    # Which test reaches what

    def baseline(self) -> None:
        """Seconds of each test and the lines it reaches, kept while its file and FILES last."""
        key = "".join(self.sources.values())
        place = self.room / "baseline.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        self.reached, self.seconds = defaultdict(set), {}
        for path, of_file in self.tests.items():
            nodeids = [nodeid for nodeid in self.items if nodeid.startswith(path)]
            if known.get(path, {}).get("key") != key + of_file:
                print(f"==> {len(nodeids)} tests of {path}, as they are", flush=True)
                found, ended = in_fork(lambda nodeids=nodeids: self.trace(nodeids), 3600)
                if not isinstance(found, dict):
                    raise pytest.UsageError(
                        f"{path}: a test fails without a mutant: {found or ended}"
                    )
                known[path] = {"key": key + of_file, **found}
                place.write_text(json.dumps(known))
            self.seconds.update(known[path]["seconds"])
            for place_, nodes in known[path]["reached"].items():
                self.reached[place_].update(nodes)
            # what torch imports at a first call would be imported by every fork
            for module in known[path]["modules"]:
                importlib.import_module(module)
        gc.freeze()

    def trace(self, nodeids: list[str]) -> object:
        names = {str(ROOT / path): path for path in FILES}
        seen: set[tuple[str, int]] = set()
        reached, seconds = defaultdict(list), {}
        before = set(sys.modules)

        def calls(frame: types.FrameType, event: str, argument: object) -> object:
            path = names.get(frame.f_code.co_filename)
            if path is None:
                return None

            def lines(frame: types.FrameType, event: str, argument: object) -> object:
                if event == "line":
                    seen.add((path, frame.f_lineno))
                return lines

            return lines

        for nodeid, following in zip(nodeids, [*nodeids[1:], None], strict=True):
            seen.clear()
            start = time.perf_counter()
            sys.settrace(calls)
            item = self.items[nodeid]
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=self.items[following] if following else None
            )
            sys.settrace(None)
            seconds[nodeid] = round(time.perf_counter() - start, 4)
            if self.failed:
                return nodeid
            for path, line in seen:
                reached[f"{path}:{line}"].append(nodeid)
        modules = [name for name in set(sys.modules) - before if name.startswith("torch._dynamo")]
        return {"seconds": seconds, "reached": reached, "modules": sorted(modules)}

    def tests_of(
        self, path: str, mutant: mutate.Mutant, met: dict[str, str]
    ) -> tuple[list[str], bool]:
        """Those it is to meet, in that order, but for files that it has met; whether any reaches
        it."""
        if mutant.at_import:
            places = [place for place in self.reached if place.startswith(f"{path}:")]
        else:
            places = [f"{path}:{line}" for line in mutant.lines]
        nodeids = set().union(*(self.reached.get(place, ()) for place in places))
        nodeids &= set(self.items)
        fresh = (n for n in nodeids if met.get(n.split("::")[0]) != self.tests[n.split("::")[0]])
        cheapest = sorted(fresh, key=lambda n: (self.seconds[n], n))
        variants: Counter[str] = Counter()
        finders = self.finders[self.function(path, mutant)]
        cost = {}
        for nodeid in cheapest:
            test = nodeid.split("[")[0]
            variants[test] += 1
            cost[nodeid] = self.seconds[nodeid] * variants[test] / (1 + 10 * finders[test])
        ordered, total = [], 0.0
        for nodeid in sorted(cheapest, key=cost.__getitem__):
            total += self.seconds[nodeid]
            if not ordered or total <= self.arguments.seconds:
                ordered.append(nodeid)
        return ordered, bool(nodeids)

    def function(self, path: str, mutant: mutate.Mutant) -> str:
        return f"{path}::{mutant.name.split(' ')[0]}"

    def remember(self, record: dict) -> None:
        if record["by"] is not None:
            function = record["mutant"].split(" ")[0]
            self.finders[function][record["by"].split("[")[0]] += 1

    # The mutants

    def measure(self) -> None:
        results = self.room / "results.jsonl"
        known = {}
        if results.exists():
            for line in results.read_text().splitlines():
                record = json.loads(line)
                known[record["mutant"]] = record
        for record in known.values():
            self.remember(record)
        names = list(self.mutants)
        if self.arguments.only:
            names = [name for name in names if self.arguments.only in name]
        random.Random(0).shuffle(names)
        names = names[: self.arguments.sample or None]
        begin, done = time.perf_counter(), 0
        with results.open("a") as out:
            for number, name in enumerate(names, 1):
                record = self.judged(name, known.get(name))
                if record is not known.get(name):
                    known[name] = record
                    self.remember(record)
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    done += 1
                    if done % 50 == 0:
                        spent = time.perf_counter() - begin
                        print(f"==> {number} of {len(names)} mutants, {spent:.0f} s", flush=True)
        if not names:
            raise pytest.UsageError(f"no mutant holds {self.arguments.only!r}")
        report({name: known[name] for name in names}, self.mutants)
        if len(names) < len(self.mutants):
            print(f"a sample of {len(names)} from {len(self.mutants)} mutants")

    def judged(self, name: str, before: dict | None) -> dict:
        path, tree, mutant = self.mutants[name]
        if before is not None and before["source"] != self.sources[path]:
            before = None
        if before is not None and before["status"] in ("killed", "timeout"):
            if before["by"] is None or before["by"] in self.items:
                return before
            before = None
        more = before is None or before["seconds"] < self.arguments.seconds
        met = {} if more else before["met"]
        if before is not None and met == self.tests:
            return before
        fresh, reached = self.tests_of(path, mutant, met)
        record = {
            "mutant": name,
            "source": self.sources[path],
            "status": "survived" if reached else "unreached",
            "by": None,
            "met": self.tests,
            "seconds": self.arguments.seconds,
        }
        if fresh:
            self.control(path, tree, fresh)
            limit = 10 + 4 * sum(self.seconds[nodeid] for nodeid in fresh)
            given, ended = in_fork(lambda: self.challenge(path, tree, mutant, fresh), limit)
            if ended in TIMERS:
                record["status"] = "timeout"
            elif given != {"by": None}:
                record["status"] = "killed"
                record["by"] = given["by"] if isinstance(given, dict) else None
        return record

    def control(self, path: str, tree: ast.Module, nodeids: list[str]) -> None:
        """A module that is put in its own place passes: what fails later fails for its change."""
        if path in self.controlled:
            return
        given, ended = in_fork(lambda: self.challenge(path, tree, None, nodeids), 600)
        if given != {"by": None}:
            raise pytest.UsageError(f"{path} fails without a change: {given or ended}")
        self.controlled.add(path)

    def challenge(
        self, path: str, tree: ast.Module, mutant: mutate.Mutant | None, nodeids: list[str]
    ) -> object:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        filename = str(ROOT / path)
        try:
            if mutant is not None:
                mutant.apply()
            code = compile(ast.fix_missing_locations(tree), filename, "exec", dont_inherit=True)
            transplant(importlib.import_module(path.removesuffix(".py").replace("/", ".")), code)
        except Exception as error:
            return {"by": None, "import": repr(error)}
        return {"by": self.run(nodeids)}


# The report


def explanations() -> dict[str, str]:
    """Why mutants survive: in the file comment lines, then the mutants that they hold for."""
    reasons, reason, names_before = {}, [], False
    for line in EXPLAINED.read_text().splitlines() if EXPLAINED.exists() else []:
        if line.startswith("#"):
            reason = [*([] if names_before else reason), line.lstrip("# ")]
            names_before = False
        elif line.strip():
            reasons[line.strip()] = " ".join(reason)
            names_before = True
    return reasons


def report(records: dict[str, dict], mutants: dict[str, tuple]) -> None:
    reasons = explanations()
    rows = defaultdict(lambda: defaultdict(int))
    left = []
    for name, record in records.items():
        status = record["status"]
        if status in ("survived", "unreached"):
            known = name in reasons
            if not known:
                left.append(name)
            status = "explained" if known else status
        for row in (name.split("::")[0], "all"):
            rows[row][status] += 1
            rows[row]["mutants"] += 1
    counts = Counter(reasons[name] for name in records if name in reasons)
    print("\nExplained:")
    for reason, count in counts.most_common():
        print(f"  {count:3} {reason}")
    print("\nLeft over:" if left else "\nNothing is left over.")
    for name in left:
        path, _, mutant = mutants[name]
        status = records[name]["status"]
        print(f"  {path}:{mutant.line} {status}: {name.split('::')[1]}")
    for name in reasons.keys() - records.keys() if len(records) == len(mutants) else ():
        print(f"  {EXPLAINED.name} explains what does not exist: {name}")
    for name in reasons.keys() & records.keys():
        if records[name]["status"] in ("killed", "timeout"):
            print(f"  {EXPLAINED.name} explains what a test sees: {name}")
    head = ["mutants", "killed", "timeout", "survived", "unreached", "explained"]
    print(f"\n{'':46}" + "".join(f"{word:>11}" for word in head) + "   score   without explained")
    for row in [*(row for row in FILES if row in rows), "all"]:
        counts = rows[row]
        killed = counts["killed"] + counts["timeout"]
        score = 100 * killed / counts["mutants"]
        other = 100 * killed / max(1, counts["mutants"] - counts["explained"])
        line = "".join(f"{counts[word]:>11}" for word in head)
        print(f"{row:46}{line}{score:>7.1f}%{other:>15.1f}%")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn")
    parser.add_argument("--seconds", type=float, default=3, help="of tests, at most, a mutant")
    parser.add_argument("--only", default="", help="mutants whose name holds these words")
    parser.add_argument("--output", default=str(ROOT / "build/mutation"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: forks, and small shapes
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")
    session = Session(arguments)
    tests = [str(ROOT / path) for path in session.tests]
    options = ["-qs", "--no-header", "--disable-warnings", "--rootdir", str(ROOT)]
    options += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
    os.chdir(ROOT)
    return int(pytest.main([*options, "-k", f"not ({SKIPPED})", *tests], plugins=[session]))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # Triton would list, after the table, what it has not freed
