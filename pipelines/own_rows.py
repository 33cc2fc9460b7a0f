"""How many predictions a pipeline's call makes in each step, and whether it says how often it steps, by its source."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .source import nodes
from .written import UNKNOWN, Place, WrittenCall, computed, name_of

_UNCHANGED = ("to", "type", "contiguous", "unsqueeze")
"""Methods of a tensor that leave its rows as they are."""


class OwnRows:
    """What one call computes by itself.

    Args:
        call: as it is written, with its arguments.
        denoisers: names of the pipeline's candidates.
    """

    def __init__(self, call: WrittenCall, denoisers: Sequence[str]) -> None:
        self._call = call
        self._steps = self._found(_is_step)
        self._predicting = self._found(lambda node: name_of(node.func) in {f"self.{name}" for name in denoisers})
        self._so_far: dict[str, int | None] = {}

    def each_call(self) -> list[int] | None:
        """Rows for each image in each denoiser call of one step; `None` where that is not known."""
        loops = {place.loops for place, _ in self._steps}
        if len(loops) != 1 or len({name_of(node.func) for _, node in self._predicting}) != 1:
            return None
        here = loops.pop()
        counted = [(place, node) for place, node in self._predicting if place.loops[:1] == here[:1]]
        if any(place.loops != here or not self._call.reached(place) for place, _ in counted):
            return None
        rows = [self._rows(sample) if (sample := _sample(node)) is not None else None for _, node in counted]
        known = [count for count in rows if count is not None]
        return known if len(known) == len(rows) else None

    def says_how_often_it_steps(self, steps: Callable[[str], bool]) -> bool:
        """Whether it goes through its noise levels once, or as often as its arguments tell.

        Args:
            steps: whether a method of the pipeline, by its name, steps the scheduler.
        """
        elsewhere = self._found(lambda node: name_of(node.func).startswith("self.") and steps(name_of(node.func)[5:]))
        # One after another a prior's scheduler and a decoder's may be stepped, but the same one in one loop only.
        stepped = {(ast.unparse(node.func), *place.loops[:1]) for place, node in self._steps}
        if len(elsewhere) > 1 or len(stepped) > len({function for function, *_ in stepped}):
            return False
        within = {loop for place, _ in self._predicting for loop in place.loops}
        return all(
            self._rounds(node, [one for one in place.loops if one in within]) == 1 for place, node in self._steps
        )

    def _rounds(self, step: ast.Call, loops: Sequence[ast.stmt]) -> Any:
        """How often the loops around a step go round that are not the one over its timesteps."""
        timestep = [*step.args[1:2], *(word.value for word in step.keywords if word.arg == "timestep")]
        names = {node.id for given in timestep for node in ast.walk(given) if isinstance(node, ast.Name)}
        counts = [
            self._times(loop)
            for loop in loops
            if not isinstance(loop, ast.For)
            or names.isdisjoint(node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name))
        ]
        if len(counts) == len(loops):  # none of them is seen to be over timesteps
            counts = counts[:-1]
        found: Any = 1
        for count in counts:
            found = computed(operator.mul, found, count)
        return found

    def _times(self, loop: ast.stmt) -> Any:
        over = loop.iter if isinstance(loop, ast.For) else None
        if isinstance(over, ast.Call) and name_of(over.func) == "range" and len(over.args) == 1:
            return self._call.value(over.args[0])
        return UNKNOWN

    def _found(self, wanted: Callable[[ast.Call], bool]) -> list[tuple[Place, ast.Call]]:
        """Calls that may be reached."""
        return [
            (place, node)
            for place in self._call.places
            for node in _own_nodes(place.statement)
            if isinstance(node, ast.Call) and wanted(node) and self._call.reached(place) is not False
        ]

    # -- rows of a tensor ------------------------------------------------------------------------------------------
    def _rows(self, node: ast.expr) -> int | None:
        """How many rows a tensor has for each image; what is not understood counts as one, the sample itself."""
        if isinstance(node, ast.IfExp):
            test = self._call.true(node.test)
            if test is not None:
                return self._rows(node.body if test else node.orelse)
            either = {self._rows(node.body), self._rows(node.orelse)}
            return either.pop() if len(either) == 1 else None
        if isinstance(node, ast.Name):
            return self._rows_of_name(node.id)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return 1
        if node.func.attr in ("cat", "stack") and node.args:
            return self._joined(node, stacked=node.func.attr == "stack")
        if node.func.attr == "scale_model_input" and node.args:
            return self._rows(node.args[0])
        return self._rows(node.func.value) if node.func.attr in _UNCHANGED else 1

    def _rows_of_name(self, name: str) -> int | None:
        if name in self._so_far:
            return self._so_far[name]
        self._so_far[name] = 1
        for place, value in self._call.assigned.get(name, ()):
            reached, before = self._call.reached(place), self._so_far[name]
            if value is not None and reached is not False:
                here = self._rows(value)
                self._so_far[name] = here if reached or here == before else None
        return self._so_far.pop(name)

    def _joined(self, node: ast.Call, stacked: bool) -> int | None:
        """Tensors joined along the batch, or along another dimension."""
        along = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "dim")]
        parts = node.args[0]
        if along and self._call.value(along[0]) != 0:
            items = parts.elts if isinstance(parts, (ast.List, ast.Tuple)) else []
            return self._rows(items[0]) if items else 1
        times = 1
        if isinstance(parts, ast.BinOp) and isinstance(parts.op, ast.Mult):
            times, parts = self._call.value(parts.right), parts.left
        if not isinstance(parts, (ast.List, ast.Tuple)) or not isinstance(times, int):
            return None
        if stacked:  # of single rows
            return len(parts.elts) if all(isinstance(item, ast.Subscript) for item in parts.elts) else None
        each = [self._rows(item) for item in parts.elts]
        known = [count for count in each if count is not None]
        return times * sum(known) if len(known) == len(each) else None


def steps_scheduler(kind: type, method: str) -> bool:
    """Whether a method of a pipeline steps a scheduler."""
    function = inspect.getattr_static(kind, method, None)
    written = nodes(function) if inspect.isfunction(function) else ()
    return any(isinstance(node, ast.Call) and _is_step(node) for node in written)


def _is_step(node: ast.Call) -> bool:
    if not (isinstance(node.func, ast.Attribute) and node.func.attr == "step"):
        return False
    parts = ast.walk(node.func.value)
    return any("scheduler" in getattr(part, "attr", getattr(part, "id", "")) for part in parts)


def _sample(node: ast.Call) -> ast.expr | None:
    """What a denoiser is called on."""
    named = [word.value for word in node.keywords if word.arg in ("sample", "hidden_states")]
    return next(iter([*named, *node.args[:1]]), None)


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """What lies in a statement, but for the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield from ast.walk(child)
