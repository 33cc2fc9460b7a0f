"""What the source of a function or a class says: what it returns, joins and reads. Each is parsed once."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any


def returned_names(function: Any) -> list[str]:
    """The names in the last return statement of a function; empty where the source is not at hand."""
    returns = [node for node in nodes(function) if isinstance(node, ast.Return) and node.value is not None]
    if not returns:
        return []
    value = max(returns, key=lambda node: node.lineno).value
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return [_name(element) for element in elements]


def joined_names(function: Any) -> dict[str, list[list[str]]]:
    """The names that a function joins along the batch with negative ones, as in `x = torch.cat([negative_x, x])`.

    By the name that the result has: the names of its parts in their order, once for each way in which it is joined.
    """
    found: dict[str, list[list[str]]] = {}
    for node in nodes(function):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _called(node.value) == "cat"):
            continue
        name, given = _name(node.targets[0]), node.value.args[:1]
        parts = [_name(part) for part in given[0].elts] if given and isinstance(given[0], ast.List) else []
        along_batch = len(node.value.args) == 1 and not node.value.keywords
        if along_batch and name in parts and any(part.startswith(("negative", "uncond")) for part in parts):
            found.setdefault(name, []).append(parts)
    return found


def nodes(function: Any) -> tuple[ast.AST, ...]:
    """Everything in a function's source; nothing where that is not at hand."""
    written = inspect.unwrap(function)
    return _nodes(getattr(written, "__func__", written))


@functools.cache
def attributes(kind: type) -> frozenset[str]:
    """The names of all attributes that a class's own source reads or sets."""
    return frozenset(node.attr for node in _parsed(kind) if isinstance(node, ast.Attribute))


@functools.cache
def _nodes(function: Any) -> tuple[ast.AST, ...]:
    return tuple(_parsed(function))


def _parsed(written: Any) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(written))))
    except (OSError, TypeError, SyntaxError):
        return


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)


def _name(node: ast.AST | None) -> str:
    """Of `name`, and of `name if it_is_wanted else None`."""
    chosen = node.body if isinstance(node, ast.IfExp) else node
    return chosen.id if isinstance(chosen, ast.Name) else ""
