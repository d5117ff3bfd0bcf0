"""The mutants of a module: its syntax tree with one place changed.

Not changed: annotations and type aliases, decorators, imports, ``assert`` (for the type checker),
docstrings, and the text of errors: whatever stands in a ``raise``, f-strings, separators of
``join``, and strings that go to a function of the form ``_check("name", ...)``.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
TYPES = {"Literal", "Callable", "Iterator", "Sequence"}
WIDTH = 72


@dataclass
class Mutant:
    """One change; ``name`` does not depend on line numbers."""

    name: str
    line: int
    lines: range
    """of its statement: who reaches one of them may see it"""
    at_import: bool
    """outside of any function's body: all that uses the module may see it"""
    holder: ast.AST
    field: str
    index: int | None
    new: object

    def apply(self) -> object:
        """Changes the tree; gives what was there."""
        if self.index is None:
            old = getattr(self.holder, self.field)
            setattr(self.holder, self.field, self.new)
        else:
            place = getattr(self.holder, self.field)
            old, place[self.index] = place[self.index], self.new
        return old


def mutants(tree: ast.Module) -> list[Mutant]:
    """All of them, in the order of the file."""
    finder = _Finder()
    finder.body(tree, "body")
    seen: Counter[str] = Counter()
    for mutant in finder.found:
        seen[mutant.name] += 1
        if seen[mutant.name] > 1:
            mutant.name += f" #{seen[mutant.name]}"
    return finder.found


class _Finder:
    def __init__(self) -> None:
        self.found: list[Mutant] = []
        self.scope: list[str] = []
        self.inside: list[ast.AST] = []
        """the nodes around the current one, outermost first"""
        self.bound: list[set[str]] = []
        """names that each function around has bound so far"""
        self.statement = range(0)
        self.default: str | None = None
        """the argument whose default is looked at"""

    # Statements

    def body(self, holder: ast.AST, field: str) -> None:
        for index, node in enumerate(getattr(holder, field)):
            self.inside.append(node)
            self.visit_statement(node, holder, field, index)
            self.inside.pop()

    def visit_statement(self, node: ast.stmt, holder: ast.AST, field: str, index: int) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.Pass)):
            return
        blocks = [name for name in ("body", "orelse", "finalbody") if getattr(node, name, None)]
        end = node.body[0].lineno - 1 if blocks else node.end_lineno
        self.statement = range(node.lineno, max(node.lineno, end or 0) + 1)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.definition(node)
            return
        place = (holder, field, index)
        if isinstance(node, ast.Raise):
            self.emit("drop", node, *place, ast.Pass())
            return
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):
                return
            self.emit("drop", node, *place, ast.Pass())
        if isinstance(node, ast.AugAssign) or self.rebinds(node):
            self.emit("drop", node, *place, ast.Pass())
        if isinstance(node, ast.Return) and node.value is not None:
            if isinstance(holder, ast.FunctionDef):
                self.emit("return", node, node, "value", None, ast.Constant(None))
            else:
                self.emit("drop", node, *place, ast.Pass())
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return
        for name, value in ast.iter_fields(node):
            if name in (*blocks, "annotation", "type_comment"):
                continue
            self.children(node, name, value)
        if self.bound:
            parts = [getattr(node, "target", None), *getattr(node, "targets", [])]
            names = [n for part in parts if part for n in ast.walk(part)]
            self.bound[-1] |= {n.id for n in names if isinstance(n, ast.Name)}
        for name in blocks:
            self.body(node, name)

    def definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            first = len(positional) - len(arguments.defaults)
            self.scope.append(node.name)
            # a default is seen by whoever enters the function
            here, self.statement = self.statement, range(node.body[0].lineno, node.end_lineno + 1)
            for argument, index in zip(positional[first:], range(len(positional)), strict=False):
                self.default = argument.arg
                self.visit(arguments.defaults[index], arguments, "defaults", index)
            for index, argument in enumerate(arguments.kwonlyargs):
                self.default = argument.arg
                if arguments.kw_defaults[index] is not None:
                    self.visit(arguments.kw_defaults[index], arguments, "kw_defaults", index)
            self.statement, self.default = here, None
            every = [*positional, *arguments.kwonlyargs]
            self.bound.append({argument.arg for argument in every})
            self.body(node, "body")
            self.bound.pop()
        else:
            self.scope.append(node.name)
            self.body(node, "body")
        self.scope.pop()

    def rebinds(self, node: ast.stmt) -> bool:
        """An assignment that can be left out: to names that have a value, or into something."""
        if not isinstance(node, ast.Assign) or not self.bound:
            return False
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        return all(name in self.bound[-1] for name in names)

    # Expressions

    def children(self, node: ast.AST, name: str, value: object) -> None:
        if isinstance(value, ast.AST):
            self.visit(value, node, name, None)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST):
                    self.visit(item, node, name, index)

    def visit(self, node: ast.AST, holder: ast.AST, field: str, index: int | None) -> None:
        if isinstance(node, ast.JoinedStr) or _is_type(node, module=not self.bound):
            return
        self.inside.append(node)
        for kind, new in self.replacements(node, holder, field):
            self.emit(kind, node, holder, field, index, new)
        if isinstance(node, ast.Compare):
            for position, operator in enumerate(node.ops):
                new = COMPARISONS[type(operator)]()
                self.emit("comparison", node, node, "ops", position, new)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            self.emit("arithmetic", node, node, "op", None, ARITHMETIC[type(node.op)]())
        if isinstance(node, ast.BoolOp):
            new_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            self.emit("boolean", node, node, "op", None, new_op)
        for name, value in ast.iter_fields(node):
            self.children(node, name, value)
        self.inside.pop()

    def replacements(
        self, node: ast.AST, holder: ast.AST, field: str
    ) -> Iterator[tuple[str, ast.AST]]:
        """What may stand in place of a whole node."""
        if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            yield "not", node.operand  # of not, ~ and -; numbers are changed below
        plain = isinstance(node, (ast.Name, ast.Attribute, ast.Call))
        if plain and field == "test":
            yield "not", ast.UnaryOp(ast.Not(), node)
        if not isinstance(node, ast.Constant):
            return
        value = node.value
        if isinstance(value, bool):
            yield "constant", ast.Constant(not value)
        elif isinstance(value, (int, float)):
            yield "constant", ast.Constant(value + 1)
        elif isinstance(value, str) and not _is_text(holder):
            yield "constant", ast.Constant("XX" + value)

    def emit(
        self,
        kind: str,
        node: ast.AST,
        holder: ast.AST,
        field: str,
        index: int | None,
        new: object,
    ) -> None:
        mutant = Mutant(
            "", node.lineno, self.statement, not self.bound and self.default is None, holder,
            field, index, new,
        )  # fmt: skip
        around = self.shown(node)
        before = _text(around)
        mutant.new = mutant.apply()
        after = "dropped" if kind == "drop" else _text(around)
        mutant.new = mutant.apply()
        if self.default is not None and around is node:
            before, after = f"{self.default}={before}", f"{self.default}={_text(new)}"
        elif around is node and after == before:  # the node itself was replaced
            after = _text(new)
        where = ".".join(self.scope) or "module"
        mutant.name = f"{where} [{kind}] {before} -> {after}"
        self.found.append(mutant)

    def shown(self, node: ast.AST) -> ast.AST:
        """The largest piece of code around the node that is still short."""
        shown = node
        for around in reversed(self.inside):
            if isinstance(around, (ast.If, ast.For, ast.With, ast.While, ast.FunctionDef)):
                break
            if isinstance(around, (ast.expr, ast.stmt)) and around is not node:
                if len(ast.unparse(around)) > WIDTH:
                    break
                shown = around
        return shown


def _text(node: object) -> str:
    text = " ".join(ast.unparse(node).split()) if isinstance(node, ast.AST) else str(node)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _is_type(node: ast.AST, *, module: bool) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id in TYPES
    return module and isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def _is_text(holder: ast.AST) -> bool:
    """Whether a string there is read by people alone."""
    if isinstance(holder, ast.Attribute):
        return holder.attr == "join"
    if not isinstance(holder, ast.Call):
        return False
    return isinstance(holder.func, ast.Name) and holder.func.id.startswith("_")
