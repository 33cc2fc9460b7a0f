"""What a function's source says about what it returns."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def returned_names(function: Any) -> list[str]:
    """The names in the last return statement of a function; empty where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return []
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    if not returns:
        return []
    value = max(returns, key=lambda node: node.lineno).value
    elements = value.elts if isinstance(value, ast.Tuple) else [value]
    return [_name(element) for element in elements]


def _name(node: ast.AST | None) -> str:
    """Of `name`, and of `name if it_is_wanted else None`."""
    chosen = node.body if isinstance(node, ast.IfExp) else node
    return chosen.id if isinstance(chosen, ast.Name) else ""
