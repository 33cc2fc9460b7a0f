"""What a recipe says of each guidance, and what is said where a plug-in is missing or older."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from packaging.version import InvalidVersion, Version

from ..base import API_VERSION, Guidance
from ..contract import api_number
from ..errors import PluginError, RecipeError, UnknownGuidanceError
from ..parameters import check_value, fields_of, types_of, unknown_parameter
from ..registry import find, identify, plugins, warn_if_deprecated
from ..wording import shown
from .values import Fetch, check_depth, comes_back, decode, encode

FORMAT = 1
KEYS = {**dict.fromkeys(("name", "plugin", "distribution", "version", "api_version"), str), "parameters": dict}

logger = logging.getLogger("trimtab")


def dump(guidances: Mapping[str, Guidance], files: dict[str, bytes] | None = None) -> dict[str, Any]:
    """The recipe of attached guidances, by the name under which each is attached.

    Args:
        files: is given the files that tensors and images go into, by name; without it these are refused.

    Raises:
        RecipeError: a class that is no registered plug-in, or a parameter value that cannot be stored.
    """
    try:
        trimtab = installed_version("trimtab")
    except PackageNotFoundError:
        trimtab = "unknown"
    entries = [_entry(name, guidance, files) for name, guidance in guidances.items()]
    return {"format": FORMAT, "trimtab": trimtab, "guidances": entries}


def pinned(guidances: Mapping[str, Guidance]) -> dict[str, Guidance]:
    """The guidances, each with the commits and hashes of the files that it loads, so that its recipe means no others.

    The Hub is asked which commit a branch is at; nothing is downloaded.
    """
    return {name: guidance.pinned() for name, guidance in guidances.items()}


def load(data: object, fetch: Fetch | None = None) -> dict[str, Guidance]:
    """New guidances from a recipe, by name, in its order.

    Args:
        fetch: gives the content of a file that belongs to the recipe; without it such files are an error.

    Raises:
        RecipeError: it is no recipe, is of a later format, asks for what is not installed, or has other files.
    """
    recipe = _object(data, {"format": int, "guidances": list}, "The recipe")
    if recipe["format"] != FORMAT:
        remedy = f"this version of trimtab reads format {FORMAT}: pip install --upgrade trimtab"
        raise RecipeError(f"The recipe has format {recipe['format']}; {remedy}")
    try:
        check_depth(recipe)
    except ValueError as error:
        raise RecipeError(f"The recipe cannot be one: {error}.") from None
    guidances: dict[str, Guidance] = {}
    for index, item in enumerate(recipe["guidances"]):
        entry = _object(item, KEYS, f"guidances[{index}] of the recipe")
        if not entry["name"] or entry["name"] in guidances:
            raise RecipeError(f"guidances[{index}] of the recipe: the name {entry['name']!r} is empty or used twice.")
        guidances[entry["name"]] = _guidance(entry, fetch)
    return guidances


def _entry(name: str, guidance: Guidance, files: dict[str, bytes] | None) -> dict[str, Any]:
    cls = type(guidance)
    plugin = identify(cls)
    if plugin is None:
        raise RecipeError(
            f"Guidance {name!r} is a {cls.__qualname__}, which is not a registered plug-in, so a recipe could not find "
            "it again; call trimtab.register(cls) first."
        )
    where = f"Guidance {name!r}, plug-in {plugin}"
    return {
        "name": name,
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "api_version": cls.api_version,
        "parameters": {key: _stored(where, guidance, key, value, files) for key, value in guidance.parameters.items()},
    }


def _stored(where: str, guidance: Guidance, parameter: str, value: Any, files: dict[str, bytes] | None) -> Any:
    """The value as it is stored, once it is certain that it comes back."""
    written: dict[str, bytes] | None = None if files is None else {}
    try:
        stored = encode(value, parameter, written)
        read = decode(stored, types_of(type(guidance))[parameter], lambda name, largest: (written or {})[name])
        kept = comes_back(value, check_value("", type(guidance), parameter, read))
    except (TypeError, ValueError):
        kept = False
    if not kept:
        allowed = "numbers, strings, truth values, None, tensors, images, and tuples, lists and dicts of these"
        raise RecipeError(f"{where}: {parameter}={shown(value)} cannot be stored in a recipe; allowed: {allowed}.")
    if files is not None and written:
        files.update(written)
    return stored


def _guidance(entry: dict[str, Any], fetch: Fetch | None) -> Guidance:
    """A guidance from one entry of a recipe."""
    where = f"Guidance {entry['name']!r} of the recipe"
    try:
        cls = find(entry["plugin"])
    except UnknownGuidanceError:
        raise RecipeError(f"{where} needs the plug-in {entry['plugin']!r}, {_how_to_get(entry)}") from None
    except PluginError as error:
        raise RecipeError(f"{where} needs a plug-in that cannot be used: {error}") from error
    older = _check_versions(where, entry)
    try:
        for name in entry["parameters"].keys() - fields_of(cls).keys():
            raise unknown_parameter(cls.name, name, cls)
        values = {name: decode(value, types_of(cls)[name], fetch) for name, value in entry["parameters"].items()}
        for name, field in fields_of(cls).items():
            if field.metadata["consent"] and values.get(name, field.default) != field.default:
                raise ValueError(f"{cls.name}: {name}={values[name]!r} is a consent that a recipe cannot give.")
        warn_if_deprecated(cls)
        return cls(**values)
    except (ValueError, TypeError, OSError) as error:
        # As text from anywhere, without control characters.
        recorded = f"{where}, recorded with {entry['plugin']} {repr(entry['version'])[1:-1]}"
        raise RecipeError(f"{recorded}: {error}{f' {older}' if older else ''}") from error


def _how_to_get(entry: dict[str, Any]) -> str:
    distribution, version = entry["distribution"], entry["version"]
    if not distribution:
        return "a class registered in the process that wrote it; define that class and call trimtab.register(cls)."
    command = _pip_command(distribution, version)
    if not command:
        return f"recorded from {distribution!r} {version!r}, which is not installed."
    return f"from {distribution} {version}, which is not installed. If you trust its author: {command}"


def _pip_command(distribution: str, version: str, option: str = "") -> str:
    """A command to copy; nothing where the recipe, which may come from anywhere, holds no plain name and version."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", distribution) and re.fullmatch(r"\d[\w.+!]*", version, re.A)
    return f'pip install {option}"{distribution}>={version}"' if plain else ""


def _check_versions(where: str, entry: dict[str, Any]) -> str:
    """Warn where the plug-in is another than the recipe's; where it is older, the remedy is returned."""
    plugin = plugins()[entry["plugin"]]
    try:
        major = api_number(entry["api_version"])[0]
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    if major != api_number(API_VERSION)[0]:
        written, here = f"was written for hook interface {entry['api_version']}", f"this trimtab has {API_VERSION}"
        raise RecipeError(f"{where} {written}; {here}, which may compute something else.")
    if plugin.distribution != entry["distribution"]:
        logger.warning("%s was recorded with %r, but %s is used.", where, entry["distribution"], plugin)
        return ""
    try:
        newer = Version(entry["version"]) > Version(plugin.version)
    except InvalidVersion:
        return ""
    if not newer:
        return ""
    remedy = f"To bring it up to date: {_pip_command(entry['distribution'], entry['version'], '--upgrade ')}"
    logger.warning("%s was recorded with version %s, newer than %s. %s", where, entry["version"], plugin, remedy)
    return remedy


def _object(data: object, keys: Mapping[str, type], where: str) -> dict[str, Any]:
    """`data` as an object that has these keys, with values of these types."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is a {type(data).__name__}, not an object.")
    if missing := [key for key in keys if key not in data]:
        raise RecipeError(f"{where} lacks {', '.join(map(repr, missing))}.")
    for key, kind in keys.items():
        if type(data[key]) is not kind:
            raise RecipeError(f"{where}: {key!r} is {data[key]!r}, not a {kind.__name__}.")
    return data
