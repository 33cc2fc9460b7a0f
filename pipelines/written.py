"""What a pipeline's call computes, followed through its source as far as the arguments of the call tell.

A test that does not follow from these is unknown, and so is what depends on it; nothing is guessed.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .source import nodes

UNKNOWN: Any = object()
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_TYPES = {"str": str, "list": list, "int": int, "float": float}


@dataclass(frozen=True)
class Place:
    """A statement, the tests that lead to it with their wanted outcomes, and the loops around it."""

    statement: ast.stmt
    tests: tuple[tuple[ast.expr, bool], ...]
    loops: tuple[ast.stmt, ...]


class WrittenCall:
    """The call of a pipeline with given arguments.

    Args:
        kind: the pipeline's class.
        arguments: of its call, defaults included.
        attribute: what an attribute of the pipeline is in this call; `UNKNOWN` where nobody can tell.
    """

    def __init__(self, kind: Any, arguments: Mapping[str, Any], attribute: Callable[[str], Any]) -> None:
        self._arguments, self._attribute = arguments, attribute
        self.places, self.assigned = _read(kind.__call__)
        self._open: set[str] = set()

    def named(self, name: str) -> Any:
        """What a name stands for once it is set."""
        given = self._arguments.get(name, UNKNOWN)
        if name in self._open:
            return given
        self._open.add(name)
        try:
            set_here = [
                (place, value) for place, value in self.assigned.get(name, ()) if self.reached(place) is not False
            ]
            if not set_here:
                return self._attribute(name.removeprefix("self.")) if name.startswith("self.") else given
            place, value = set_here[-1]
            return self.value(value) if value is not None and self.reached(place) else UNKNOWN
        finally:
            self._open.remove(name)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, if the arguments tell."""
        if isinstance(node, ast.Constant):
            return node.value
        if name := name_of(node):
            return self.named(name)
        if isinstance(node, ast.List):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.BoolOp):
            return self._of_all(node)
        if isinstance(node, ast.IfExp):
            test = self.true(node.test)
            return UNKNOWN if test is None else self.value(node.body if test else node.orelse)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._called(node.func.id, node.args)
        pair: tuple[Any, ...] = ()
        compute: Callable[..., Any] | None = None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            pair, compute = (self.value(node.operand),), operator.not_
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            pair, compute = (self.value(node.left), self.value(node.comparators[0])), _COMPARED.get(type(node.ops[0]))
        elif isinstance(node, ast.BinOp):
            pair, compute = (self.value(node.left), self.value(node.right)), _COMPUTED.get(type(node.op))
        return UNKNOWN if compute is None else computed(compute, *pair)

    def _of_all(self, node: ast.BoolOp) -> Any:
        """`and` and `or`, which one side may decide although the other is unknown."""
        decides, last, unknown = isinstance(node.op, ast.Or), UNKNOWN, False
        for operand in node.values:
            outcome = self.true(operand)
            last = self.value(operand)
            if outcome is decides:
                return decides if unknown else last
            unknown = unknown or outcome is None
        return UNKNOWN if unknown else last

    def _called(self, function: str, given: Sequence[ast.expr]) -> Any:
        if function == "len" and len(given) == 1:
            return computed(len, self.value(given[0]))
        if function == "isinstance" and isinstance(given[1], ast.Name) and given[1].id in _TYPES:
            return computed(isinstance, self.value(given[0]), _TYPES[given[1].id])
        return UNKNOWN

    def true(self, node: ast.expr) -> bool | None:
        """Whether an expression counts as true; `None` where that is not known."""
        value = self.value(node)
        outcome = UNKNOWN if value is UNKNOWN else computed(bool, value)
        return None if outcome is UNKNOWN else bool(outcome)

    def reached(self, place: Place) -> bool | None:
        """Whether a statement is reached; `None` where that is not known."""
        outcomes = []
        for test, wanted in place.tests:
            outcome = self.true(test)
            if outcome is (not wanted):
                return False
            outcomes.append(outcome)
        return None if None in outcomes else True


@functools.cache
def _read(call: Any) -> tuple[list[Place], dict[str, list[tuple[Place, ast.expr | None]]]]:
    """The statements of a function, and what names are set to in it."""
    written = [node for node in nodes(call) if isinstance(node, ast.FunctionDef)]
    places = list(_places(written[0].body)) if written else []
    assigned: dict[str, list[tuple[Place, ast.expr | None]]] = {}
    for place in places:
        for name, value in _assignments(place.statement):
            assigned.setdefault(name, []).append((place, value))
    return places, assigned


def _places(
    body: Sequence[ast.stmt], tests: tuple[tuple[ast.expr, bool], ...] = (), loops: tuple[ast.stmt, ...] = ()
) -> Iterator[Place]:
    for statement in body:
        yield Place(statement, tests, loops)
        if isinstance(statement, ast.If):
            yield from _places(statement.body, (*tests, (statement.test, True)), loops)
            yield from _places(statement.orelse, (*tests, (statement.test, False)), loops)
        elif isinstance(statement, (ast.For, ast.While)):
            yield from _places(statement.body, tests, (*loops, statement))
        elif isinstance(statement, (ast.With, ast.Try)):
            yield from _places(statement.body, tests, loops)


def _assignments(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """The names that a statement sets, and to what; `None` where that is part of something."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if name := name_of(target):
                yield name, statement.value
            for part in target.elts if isinstance(target, ast.Tuple) else ():
                yield name_of(part), None
    elif isinstance(statement, (ast.AugAssign, ast.For)):
        yield from ((name, None) for inner in ast.walk(statement.target) if (name := name_of(inner)))


def name_of(node: ast.AST) -> str:
    """Of `name`, and of `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"self.{node.attr}" if node.value.id == "self" else ""
    return node.id if isinstance(node, ast.Name) else ""


def computed(compute: Callable[..., Any], *given: Any) -> Any:
    """What a function finds; unknown where one of what it is given is, or where it cannot, as of a tensor's truth."""
    if any(value is UNKNOWN for value in given):
        return UNKNOWN
    try:
        return compute(*given)
    except (TypeError, ValueError, RuntimeError):
        return UNKNOWN
