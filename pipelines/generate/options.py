"""What a command line says, as values: `0-3,8` as seeds, `pag:scale=3,layers=mid` as a guidance, and in a sweep
`pag:scale=1,2,layers=mid` as two."""

from __future__ import annotations

import contextlib
import csv
import itertools
import re
import types
import typing
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...guidance import registry
from ...guidance.base import Guidance
from ...guidance.errors import ParameterError
from ...guidance.parameters import fields_of, types_of, unknown_parameter
from ...guidance.wording import describe_range, in_words
from .request import LARGEST_SEED

_MOST_SEEDS = 100_000
_MOST_VALUES = 100
_NUMBER = r"-?\d+(?:\.\d+)?"
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def seeds(text: str) -> list[int]:
    """Seeds from `7`, `0,3,5`, `0-7` or `0-3,8`, in the order given and each once.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last > LARGEST_SEED or last - first >= _MOST_SEEDS:
            raise ValueError(
                f"--seeds: {part.strip()!r} is neither a seed nor a range; allowed: whole numbers from 0 and rising "
                f"ranges of at most {_MOST_SEEDS}, such as 0-7 or 0,3,5."
            )
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


def guidance(text: str) -> Guidance:
    """A guidance from `name` or `name:parameter=value,parameter=value`.

    Each value is read as the type that its parameter declares. A list's items are joined with `+`, `none` is `None`,
    an image is given by its file, a tensor by a .safetensors file that holds one, and a comma belongs to the value
    unless `parameter=` follows it.

    Raises:
        UnknownGuidanceError: no plug-in has this name.
        ParameterError: a parameter that the plug-in does not have, given twice, or a value that is not allowed.
    """
    name, cls, values = _split(text)
    return registry.create(name, **{key: _value(name, cls, key, value) for key, value in values.items()})


def variations(text: str) -> list[Guidance]:
    """Guidances from `name:parameter=value,value,...` with every combination of the values.

    Beside single values there are ranges, `first..last:step` with the last included and 1 as the step if none is given.
    A value that has a comma of its own stands in double quotes.

    Raises:
        UnknownGuidanceError, ParameterError: see `guidance`.
    """
    name, cls, values = _split(text)
    read = [[_value(name, cls, key, one) for one in _listed(name, key, value)] for key, value in values.items()]
    return [registry.create(name, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*read)]


def _split(text: str) -> tuple[str, type[Guidance], dict[str, str]]:
    """The name of a guidance, its class, and what is given for its parameters."""
    name, _, rest = text.partition(":")
    if "=" in name:
        raise ParameterError(f"--guidance: {text!r} names no guidance; type NAME:PARAMETER=VALUE, such as pag:scale=3.")
    name = name.strip()
    cls = registry.find(name)
    parameters: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", rest) if rest.strip() else ():
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            raise ParameterError(
                f"{name}: {part!r} has no value; type {name}:parameter=value, with one of: "
                f"{', '.join(sorted(fields_of(cls)))}."
            )
        if key not in fields_of(cls):
            raise unknown_parameter(name, key, cls)
        if key in parameters:
            raise ParameterError(f"{name}: {key} is given twice; give it once.")
        parameters[key] = value.strip()
    return name, cls, parameters


def _listed(plugin: str, name: str, text: str) -> list[str]:
    """The values of `1,2,5..9:2`, as texts."""
    found: dict[str, None] = {}
    for value in next(csv.reader([text], skipinitialspace=True), [""]):
        match = re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})(?::({_NUMBER}))?", value.strip())
        if match is None:
            found[value.strip()] = None
            continue
        first, last, step = (Decimal(number or 1) for number in match.groups())
        count = int((last - first) / step) + 1 if step > 0 and last >= first else 0
        if not 1 <= count <= _MOST_VALUES:
            raise ParameterError(
                f"{plugin}: {name}={value.strip()} is not allowed; allowed: a rising range FIRST..LAST:STEP of at most "
                f"{_MOST_VALUES} values, such as 1..3:0.5."
            )
        found |= dict.fromkeys(str(first + index * step) for index in range(count))
    return list(found)


def guidances(texts: Iterable[str]) -> dict[str, Guidance]:
    """Several guidances by name, in the order given.

    Raises:
        ParameterError: one name twice.
    """
    found: dict[str, Guidance] = {}
    for text in texts:
        one = guidance(text)
        if one.label in found:
            raise ParameterError(f"--guidance: {one.label} is given twice; give each guidance once.")
        found[one.label] = one
    return found


def _value(plugin: str, cls: type[Guidance], name: str, text: str) -> Any:
    hint = types_of(cls)[name]
    try:
        return _typed(hint, text)
    except _UnreadableError as why:
        raise ParameterError(f"{plugin}: {name}={text!r} {why}.") from None
    except ValueError:
        if not any(map(_typable, _alternatives(hint))):
            raise ParameterError(
                f"{plugin}: {name} cannot be typed; give it in Python: pipe.add_guidance({plugin!r}, {name}=...)."
            ) from None
        kinds = {Image.Image: "an image file", torch.Tensor: "a .safetensors file that holds one tensor"}
        files = " or ".join(words for kind, words in kinds.items() if kind in _alternatives(hint))
        allowed = files or describe_range(fields_of(cls)[name])
        ending = "." if allowed == "any" else f"; allowed: {allowed}."
        raise ParameterError(f"{plugin}: {name}={text!r} cannot be read as {in_words(hint)}{ending}") from None


class _UnreadableError(Exception):
    """A file that is meant to hold a tensor and does not."""


def _typed(hint: Any, text: str) -> Any:
    """The text as a declared type; a `ValueError` if it is none of it."""
    # The strictest reading first, so that `int | str` takes 3 as a number and `str | list` takes a+b as a list.
    for kind in sorted(_alternatives(hint), key=lambda kind: _looseness(kind, text)):
        with contextlib.suppress(ValueError):
            return _read(kind, text)
    raise ValueError(text)


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    if typing.get_origin(hint) is typing.Literal:
        return list(dict.fromkeys(type(value) for value in typing.get_args(hint)))
    return [hint]


def _is_sequence(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str


def _typable(kind: Any) -> bool:
    """Whether some text stands for a value of this plain type, other than `none`."""
    return kind in (bool, int, float, str, Path, Any, Image.Image, torch.Tensor) or _is_sequence(kind)


def _looseness(kind: Any, text: str) -> int:
    if _is_sequence(kind):
        return 1 if "+" in text else 3
    return 2 if kind in (str, Any, Path) else 0


def _read(kind: Any, text: str) -> Any:
    """The text as one plain type; a `ValueError` if it is not one."""
    if kind is type(None) and text.lower() == "none":
        return None
    if kind is bool and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if kind in (int, float, str, Path):
        return kind(text)
    if kind is Image.Image:
        return _image(text)
    if kind is torch.Tensor and Path(text).suffix == ".safetensors":
        return _tensor(text)
    if kind is Any:
        return text
    if _is_sequence(kind):
        item, *_ = (*typing.get_args(kind), str)
        values = [_typed(item, word.strip()) for word in text.split("+")]
        return tuple(values) if (typing.get_origin(kind) or kind) is tuple else values
    raise ValueError(text)


def _image(text: str) -> Image.Image:
    try:
        with Image.open(text) as image:
            return image.convert("RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB")
    except OSError as error:
        raise ValueError(text) from error


def _tensor(text: str) -> torch.Tensor:
    try:
        tensors = load_file(text)
    except (OSError, SafetensorError) as error:
        raise _UnreadableError(f"cannot be read as a tensor: {error}") from error
    if len(tensors) != 1:
        held = ", ".join(sorted(tensors)[:10]) or "nothing"
        raise _UnreadableError(f"holds {len(tensors)} tensors ({held}); needed: a file that holds one")
    return next(iter(tensors.values()))
