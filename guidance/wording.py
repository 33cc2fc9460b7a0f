"""Parameters in words, for messages, plans and pages: their types, their ranges, their values."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import numpy as np
import torch
from PIL import Image


def describe_range(field: dataclasses.Field[Any]) -> str:
    """The allowed values in words: `>= 0`, `0 to 1`, `one of 'a', 'b'`."""
    spec = field.metadata
    if spec["choices"] is not None:
        return "one of " + ", ".join(repr(choice) for choice in spec["choices"])
    if spec["ge"] is not None and spec["le"] is not None:
        return f"{spec['ge']:g} to {spec['le']:g}"
    if spec["ge"] is not None:
        return f">= {spec['ge']:g}"
    if spec["le"] is not None:
        return f"<= {spec['le']:g}"
    return "any"


def in_words(hint: Any) -> str:
    """A type in words: `float or None`, `one of 'a', 'b'`, `tuple of str`."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if kind is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if not args:
        return getattr(hint, "__name__", str(hint))
    items = [in_words(arg) for arg in args if arg is not ...]
    return f"{getattr(kind, '__name__', kind)} of " + ", ".join(f"({i})" if " or " in i else i for i in items)


def shown(value: Any) -> str:
    """A value in one line; of a tensor, an array or an image its kind and size, of a module its class."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items, single = ", ".join(map(shown, value)), "," if len(value) == 1 else ""
        return f"[{items}]" if isinstance(value, list) else f"({items}{single})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        return f"<{str(value.dtype).removeprefix('torch.')} {kind} {list(value.shape)}>"
    if isinstance(value, Image.Image):
        return f"<{value.mode} image {value.width}x{value.height}>"
    return repr(value)


def kind_of(value: Any) -> str:
    """The type of a value in words: `a str`, `an int`."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
