"""The mutants are what they are said to be, and stand in for the code."""

import ast
import types

import measure
import mutate
import pytest

SOURCE = '''
"""A module."""
from __future__ import annotations

STEP = 2
Kind = Literal["a", "b"]


class Scale:
    """A class."""

    wide: bool = False

    def __init__(self, by: float = 1.5) -> None:
        self.by = by

    @property
    def twice(self) -> float:
        return 2 * self.by


def clip(x: int, low: int = 0, *, kind: Kind = "a") -> int:
    """Not below ``low``."""
    assert x is not None
    _check("x", x)
    if kind not in ("a", "b"):
        raise ValueError(f"kind: {', '.join('ab')}, not {kind!r}")
    if x < low and not STEP == 3:
        x = low
    return -x if kind == "b" else x
'''


def test_every_place_is_changed_and_no_text():
    names = [mutant.name for mutant in mutate.mutants(ast.parse(SOURCE))]
    assert names == [
        "module [constant] STEP = 2 -> STEP = 3",
        "Scale [constant] wide: bool = False -> wide: bool = True",
        "Scale.__init__ [constant] by=1.5 -> by=2.5",
        "Scale.__init__ [drop] self.by = by -> dropped",
        "Scale.twice [return] return 2 * self.by -> return None",
        "Scale.twice [arithmetic] return 2 * self.by -> return 2 / self.by",
        "Scale.twice [constant] return 2 * self.by -> return 3 * self.by",
        "clip [constant] low=0 -> low=1",
        "clip [constant] kind='a' -> kind='XXa'",
        "clip [drop] _check('x', x) -> dropped",
        "clip [comparison] kind not in ('a', 'b') -> kind in ('a', 'b')",
        "clip [constant] kind not in ('a', 'b') -> kind not in ('XXa', 'b')",
        "clip [constant] kind not in ('a', 'b') -> kind not in ('a', 'XXb')",
        "clip [drop] raise ValueError(f\"kind: {', '.join('ab')}, not {kind!r}\") -> dropped",
        "clip [boolean] x < low and (not STEP == 3) -> x < low or not STEP == 3",
        "clip [comparison] x < low and (not STEP == 3) -> x <= low and (not STEP == 3)",
        "clip [not] x < low and (not STEP == 3) -> x < low and STEP == 3",
        "clip [comparison] x < low and (not STEP == 3) -> x < low and (not STEP != 3)",
        "clip [constant] x < low and (not STEP == 3) -> x < low and (not STEP == 4)",
        "clip [drop] x = low -> dropped",
        "clip [return] return -x if kind == 'b' else x -> return None",
        "clip [comparison] return -x if kind == 'b' else x -> return -x if kind != 'b' else x",
        "clip [constant] return -x if kind == 'b' else x -> return -x if kind == 'XXb' else x",
        "clip [not] return -x if kind == 'b' else x -> return x if kind == 'b' else x",
    ]


def test_a_tree_is_left_as_it_was():
    tree = ast.parse(SOURCE)
    found = mutate.mutants(tree)
    assert ast.unparse(tree) == ast.unparse(ast.parse(SOURCE))
    changed = set()
    for mutant in found:
        mutant.new = mutant.apply()
        changed.add(ast.unparse(tree))
        mutant.apply()
    assert len(changed) == len(found)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("STEP = 2", [3, -1, 3, -5, False]),
        ("wide", [2, -1, 3, 0, True]),
        ("by=1.5", [2, -1, 5, 0, False]),
        ("return 3", [2, -1, 4.5, 0, False]),
        ("low=0", [2, -1, 3, 1, False]),
        ("[drop] x = low", [2, -1, 3, -5, False]),
    ],
)
def test_a_mutant_takes_the_place_of_the_live_code(monkeypatch, words, expected):
    """In functions, properties, defaults, and constants of classes and of the module."""
    live = types.ModuleType("a_module")
    live.__file__ = "a_module.py"
    monkeypatch.setitem(__import__("sys").modules, "a_module", live)
    source = SOURCE.replace("Kind = Literal", "# Kind = Literal").replace('_check("x", x)', "")
    tree = ast.parse(source)
    exec(compile(tree, "a_module.py", "exec"), live.__dict__)
    clip, scale = live.clip, live.Scale
    (mutant,) = (m for m in mutate.mutants(tree) if words in m.name)
    mutant.apply()
    code = compile(ast.fix_missing_locations(tree), "a_module.py", "exec")
    measure.transplant(live, code)
    got = [live.STEP, clip(1, kind="b"), scale().twice, clip(-5), scale.wide]
    assert got == expected
