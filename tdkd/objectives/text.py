"""Objectives as text, for configuration files."""

from __future__ import annotations

import ast
import inspect
import math

from tdkd.objectives import imitation, inverse, soft_td
from tdkd.objectives.base import Objective

NAMED: dict[str, type[Objective]] = {
    kind.__name__: kind
    for kind in (
        imitation.ForwardKL,
        imitation.ReverseKL,
        imitation.JSD,
        imitation.SkewKL,
        imitation.TotalVariation,
        imitation.LK,
        imitation.CrossEntropy,
        inverse.IQLearn,
        inverse.LSIQ,
        inverse.SQIL,
        soft_td.SoftTD,
    )
}
"""The objectives that a text may name."""


def parse(text: str) -> Objective:
    """The objective that a text describes: names with options, weights, sums.

    Nothing is evaluated but the names of the built-in objectives, literals, ``+`` and ``*``.

    Args:
        text: for example ``"ForwardKL(tail=True) + 0.1 * IQLearn('js', alpha=1.0)"``.
    Raises:
        ValueError: the text is something else, or an option is unknown or out of range.

    >>> parse("ForwardKL(tail=True) + 0.5 * JSD(0.3)")
    1 * ForwardKL(tail=True) + 0.5 * JSD(tail=False, beta=0.3)
    """
    if not isinstance(text, str):
        raise ValueError(f"objective: expected the text of a sum, got {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f'objective: expected a sum such as "ForwardKL(tail=True) + 0.1 * IQLearn()", got '
            f"{text!r}: {getattr(error, 'msg', error)}"
        ) from error
    return _objective(tree.body)


def _objective(node: ast.expr) -> Objective:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _objective(node.left) + _objective(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for weight, other in ((node.left, node.right), (node.right, node.left)):
            number = _number(weight)
            if number is not None:
                return number * _objective(other)
        raise ValueError(f"objective: expected a number times an objective, got {_text(node)}")
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in NAMED:
        raise ValueError(
            f"objective: expected one of {', '.join(NAMED)}, a sum of them, or one times a number, "
            f"got {_text(call.func)}"
        )
    kind = NAMED[name]
    signature = inspect.signature(kind)
    for keyword in call.keywords:
        if keyword.arg not in signature.parameters:
            raise ValueError(
                f"objective: expected options of {name} ({', '.join(signature.parameters)}), got "
                f"{keyword.arg or '**'}"
            )
    positional = [_literal(argument) for argument in call.args]
    options = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    try:
        signature.bind(*positional, **options)
        return kind(*positional, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective: in {_text(node)}: {error}") from error


def _number(node: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(node)
    except (TypeError, ValueError):
        return None
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and math.isfinite(value) else None


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError):
        raise ValueError(
            f"objective: expected a number, a string, True, False or None as an option, got "
            f"{_text(node)}"
        ) from None


def _text(node: ast.AST) -> str:
    return ast.unparse(node)
