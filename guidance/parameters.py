"""Parameters of a guidance: typed, documented, range-checked, serialisable.

A parameter is a dataclass field made with `parameter(...)`. Its range is checked when the guidance is built and again
whenever the attribute is set, so a guidance object can never hold a value that it does not allow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .errors import ParameterError, did_you_mean
from .wording import describe_range, in_words, kind_of, shown


def parameter(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
    unit: str = "",
    finite: bool = True,
    off: Any = None,
    deprecated: str = "",
    consent: bool = False,
) -> Any:
    """Declare one parameter of a guidance.

    Its type is one that a recipe can hold: numbers, strings, truth values, `None`, `torch.Tensor`, `PIL.Image.Image`,
    and tuples, lists and dicts of these.

    Args:
        default: its default value.
        doc: what it does, one sentence.
        ge, le: smallest and largest value allowed, also of the elements of a container or tensor.
        choices: the only values allowed.
        unit: of the number, for the documentation.
        finite: whether infinity is refused (NaN always is).
        off: the value at which the guidance leaves the pipeline's prediction as it is.
        deprecated: what to use instead, in a sentence; giving it then warns.
        consent: whether it is a consent that only who calls can give; a recipe that holds another value than the
            default is refused.
    """
    spec = {"doc": doc, "ge": ge, "le": le, "choices": choices, "unit": unit, "finite": finite}
    spec |= {"off": off, "deprecated": deprecated, "consent": consent}
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=spec)
    return dataclasses.field(default=default, metadata=spec)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a parameter that is not given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def fields_of(owner: type) -> dict[str, dataclasses.Field[Any]]:
    """The declared parameters of a guidance class, by name."""
    return {field.name: field for field in dataclasses.fields(owner) if "doc" in field.metadata}


def types_of(owner: type) -> dict[str, Any]:
    """The declared types of a guidance class's attributes, by name."""
    return _type_hints(owner)


_type_hints = functools.lru_cache(maxsize=256)(typing.get_type_hints)


def off_values(owner: type) -> dict[str, Any]:
    """The parameter values at which a guidance does nothing, all of them together: those declared with `off`."""
    fields = fields_of(owner)
    return {name: field.metadata["off"] for name, field in fields.items() if field.metadata["off"] is not None}


def unknown_parameter(plugin: str, name: str, owner: type) -> ParameterError:
    """The error for a parameter that the plug-in does not have."""
    known = sorted(fields_of(owner))
    hint = did_you_mean(name, known)
    return ParameterError(f"{plugin}: no parameter {name!r}.{hint} It takes: {', '.join(known)}.")


def check_value(plugin: str, owner: type, name: str, value: Any) -> Any:
    """Return `value`, converted to the field's type, or raise a `ParameterError` that names what is allowed."""
    field = fields_of(owner)[name]
    spec = field.metadata
    try:
        converted = _convert(value, types_of(owner)[name])
        if spec["choices"] is not None and converted is not None and converted not in spec["choices"]:
            raise ValueError("is not allowed")
        _check_range(converted, spec)
    except ValueError as why:
        allowed = describe_range(field)
        ending = "." if allowed == "any" else f"; allowed: {allowed}."
        raise ParameterError(f"{plugin}: {name}={shown(value)} {why}{ending}") from None
    return converted


def same(one: Any, other: Any) -> bool:
    """Whether two values of a parameter are equal, in type as well as in content."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(one.detach().cpu(), other.detach().cpu())
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _check_range(value: Any, spec: Mapping[str, Any]) -> None:
    """Check a number, or each number of a container; `ValueError` says what is wrong with it."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_range(item, spec)
    if isinstance(value, torch.Tensor):
        _check_tensor(value, spec)
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("is not a number")
        if spec["finite"] and math.isinf(value):
            raise ValueError("is infinite")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = spec["ge"], spec["le"]
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError("is out of range")


def _check_tensor(value: torch.Tensor, spec: Mapping[str, Any]) -> None:
    if value.is_floating_point() and value.isnan().any():
        raise ValueError("holds what is not a number")
    if spec["finite"] and value.is_floating_point() and value.isinf().any():
        raise ValueError("holds infinity")
    low, high = spec["ge"], spec["le"]
    if value.numel() and ((low is not None and value.min() < low) or (high is not None and value.max() > high)):
        raise ValueError("has values out of range")


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type hint wants it: integers become floats, sequences tuples; `ValueError` where it cannot."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _convert_union(value, args)
    if kind is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise ValueError("is not one of " + ", ".join(map(repr, args)))
        return value
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("is a truth value, not a number")
        if isinstance(value, numbers.Integral if kind is int else numbers.Real):
            try:
                return kind(value)
            except OverflowError:
                raise ValueError("is too large") from None
    elif kind in (tuple, list, Sequence) and isinstance(value, (tuple, list)):
        fixed = kind is tuple and args and args[-1] is not ...
        if fixed and len(value) != len(args):
            raise ValueError(f"has {len(value)} values, not {len(args)}")
        hints = args if fixed else [args[0] if args else Any] * len(value)
        items = [_convert_item(item, item_hint) for item, item_hint in zip(value, hints, strict=True)]
        return items if kind is list else tuple(items)
    elif kind in (dict, Mapping) and isinstance(value, dict):
        key_hint, item_hint = args or (Any, Any)
        return {_convert_item(key, key_hint): _convert_item(item, item_hint) for key, item in value.items()}
    elif kind is Any or (isinstance(kind, type) and kind is not Sequence and isinstance(value, kind)):
        return value
    raise ValueError(f"is {kind_of(value)}, not {in_words(hint)}")


def _convert_item(value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except ValueError as why:
        raise ValueError(f"holds {shown(value)}, which {why}") from None


def _convert_union(value: Any, hints: Sequence[Any]) -> Any:
    """Prefer the value's own type, so that `2` stays an integer where both `float` and `int` are allowed."""
    exact = [hint for hint in hints if type(value) in _kinds_of(hint)]
    if not exact and isinstance(value, (list, tuple)):
        exact = [hint for hint in hints if (typing.get_origin(hint) or hint) in (list, tuple)]
    reasons = []
    for hint in exact + [hint for hint in hints if hint not in exact]:
        try:
            return _convert(value, hint)
        except ValueError as why:
            reasons.append(why)
    if exact or isinstance(value, bool):
        raise reasons[0]
    raise ValueError(f"is {kind_of(value)}, not {' or '.join(map(in_words, hints))}")


def _kinds_of(hint: Any) -> set[Any]:
    """The types of the values that are just what the hint means."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(choice) for choice in typing.get_args(hint)}
    return {typing.get_origin(hint) or hint}
