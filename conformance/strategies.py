"""Parameters of a guidance drawn from the ranges that it declares."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Container
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from ..guidance.base import Guidance
from ..guidance.parameters import fields_of, types_of

GRID = 64
"""Values drawn between two bounds, which are among them, are that many equal steps apart."""


def parameters(cls: type[Guidance], keep: Container[str] = ()) -> SearchStrategy[dict[str, Any]]:
    """Values for all parameters that are numbers, truth values or choices, and a window within the run.

    Args:
        keep: parameters that are not drawn.
    """
    drawn = {
        name: strategy
        for name, field in fields_of(cls).items()
        if name not in keep and name not in fields_of(Guidance)
        if (strategy := _of(field, types_of(cls)[name])) is not None
    }
    window = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=2).map(sorted)
    return st.builds(lambda values, ends: {**values, "start": ends[0], "stop": ends[1]},
                     st.fixed_dictionaries(drawn), window)  # fmt: skip


def _of(field: dataclasses.Field[Any], hint: Any) -> SearchStrategy[Any] | None:
    spec = field.metadata
    if spec["choices"] is not None:
        return st.sampled_from(list(spec["choices"]))
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Literal:
        return st.sampled_from(arguments)
    if kind in (typing.Union, types.UnionType):
        inner = [_of(field, one) for one in arguments if one is not type(None)]
        known = [strategy for strategy in inner if strategy is not None]
        return st.one_of(st.none(), *known) if known and type(None) in arguments and len(known) == len(inner) else None
    if kind is bool:
        return st.booleans()
    if kind not in (int, float):
        return None
    low, high = _bounds(field)
    if kind is int:
        return st.integers(math.ceil(low), math.floor(high))
    return st.integers(0, GRID).map(lambda point: low + (high - low) * point / GRID)


def _bounds(field: dataclasses.Field[Any]) -> tuple[float, float]:
    """The declared range; where it is open, twice the default is the furthest, or three steps beyond it."""
    spec, default = field.metadata, field.default
    base = float(default) if isinstance(default, (int, float)) and math.isfinite(default) else 0.0
    low, high = spec["ge"], spec["le"]
    if high is None:
        high = max(2.0 * base, base + 3.0 if isinstance(default, int) else base + 1.0, low if low is not None else base)
    if low is None:
        low = min(2.0 * base, base - 1.0, high)
    return low, high
