"""Recipes: the guidances of a pipeline as JSON, written beside a saved pipeline as `guidance.json`.

    {"format": 1, "trimtab": "0.1.0", "guidances": [
        {"name": "pag", "plugin": "pag", "distribution": "trimtab", "version": "0.1.0", "api_version": "1.0",
         "parameters": {"scale": 3.0, "layers": ["mid"], "sigma_max": "inf"}}]}

The guidances stand in the order in which they were attached, each with all its parameters, so that a later change of a
default does not change a picture. Infinity is the string `"inf"` or `"-inf"`, which JSON has no number for; tuples are
arrays; a guider of Diffusers is its class and configuration. A parameter's declared type turns them back. A value that
would not come back is refused when written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import typing
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from diffusers.guiders import BaseGuidance
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from packaging.version import InvalidVersion, Version

from .base import API_VERSION, Guidance
from .contract import api_number
from .errors import ParameterError, PluginError, RecipeError, UnknownGuidanceError
from .guiders import create, store
from .parameters import check_value, fields_of, types_of, unknown_parameter
from .registry import find, identify, plugins

FILE = "guidance.json"
FORMAT = 1
KEYS = {**dict.fromkeys(("name", "plugin", "distribution", "version", "api_version"), str), "parameters": dict}

logger = logging.getLogger("trimtab")


def dump(guidances: Mapping[str, Guidance]) -> dict[str, Any]:
    """The recipe of attached guidances, by the name under which each is attached.

    Raises:
        RecipeError: a class that is no registered plug-in, or a parameter value that JSON cannot hold.
    """
    try:
        trimtab = installed_version("trimtab")
    except PackageNotFoundError:
        trimtab = "unknown"
    entries = [_entry(name, guidance) for name, guidance in guidances.items()]
    return {"format": FORMAT, "trimtab": trimtab, "guidances": entries}


def load(data: object) -> dict[str, Guidance]:
    """New guidances from a recipe, by name, in its order.

    Raises:
        RecipeError: it is no recipe, is of a later format, or asks for what is not installed.
    """
    recipe = _object(data, {"format": int, "guidances": list}, "The recipe")
    if recipe["format"] != FORMAT:
        remedy = f"this version of trimtab reads format {FORMAT}: pip install --upgrade trimtab"
        raise RecipeError(f"The recipe has format {recipe['format']}; {remedy}")
    guidances: dict[str, Guidance] = {}
    for index, item in enumerate(recipe["guidances"]):
        entry = _object(item, KEYS, f"guidances[{index}] of the recipe")
        if not entry["name"] or entry["name"] in guidances:
            raise RecipeError(f"guidances[{index}] of the recipe: the name {entry['name']!r} is empty or used twice.")
        guidances[entry["name"]] = _guidance(entry)
    return guidances


def save(path: str | os.PathLike[str], guidances: Mapping[str, Guidance]) -> Path:
    """Write the recipe into a folder as `guidance.json`, or into a `.json` file; whole or not at all.

    Raises:
        RecipeError: see `dump`; then no file is touched.
    """
    text = json.dumps(dump(guidances), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        target = target / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read(source: str | os.PathLike[str], revision: str | None = None, **hub_options: Any) -> dict[str, Guidance]:
    """The guidances of a recipe in a folder, a file, or a repository on the Hub.

    Args:
        source: a path, or `"owner/repository"` where no such path exists.
        revision: branch, tag or commit of the repository.
        hub_options: further arguments of `huggingface_hub.hf_hub_download`, such as `token` or `local_files_only`.

    Raises:
        RecipeError: there is no recipe, it is not JSON, or see `load`.
    """
    path = Path(source)
    if path.is_dir():
        path = path / FILE
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix != ".json":
        try:
            path = Path(hf_hub_download(str(source), FILE, revision=revision, **hub_options))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise RecipeError(
                f"There is no folder {str(source)!r}, and no {FILE} came from the Hub: {error}"
            ) from error

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON; infinity is written 'inf'")

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except OSError as error:
        raise RecipeError(f"No recipe can be read from {str(path)!r}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not JSON: {error}.") from error
    return load(data)


def _entry(name: str, guidance: Guidance) -> dict[str, Any]:
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
        "parameters": {key: _stored(where, guidance, key, value) for key, value in guidance.parameters.items()},
    }


def _stored(where: str, guidance: Guidance, parameter: str, value: Any) -> Any:
    try:
        stored = _encode(value)
        loaded = check_value("", type(guidance), parameter, _decode(stored, types_of(type(guidance))[parameter]))
        same = json.dumps(loaded, default=store) == json.dumps(value, default=store)
    except (TypeError, ParameterError):
        same = False
    if not same:
        allowed = "numbers, strings, truth values, None, and tuples, lists and dicts of these"
        raise RecipeError(f"{where}: {parameter}={value!r} cannot be stored in a recipe; allowed: {allowed}.")
    return stored


def _guidance(entry: dict[str, Any]) -> Guidance:
    """A guidance from one entry of a recipe."""
    where = f"Guidance {entry['name']!r} of the recipe"
    try:
        cls = find(entry["plugin"])
    except UnknownGuidanceError:
        raise RecipeError(f"{where} needs the plug-in {entry['plugin']!r}, {_how_to_get(entry)}") from None
    except PluginError as error:
        raise RecipeError(f"{where} needs a plug-in that cannot be used: {error}") from error
    _check_versions(where, entry)
    try:
        for name in entry["parameters"].keys() - fields_of(cls).keys():
            raise unknown_parameter(cls.name, name, cls)
        values = {name: _decode(value, types_of(cls)[name]) for name, value in entry["parameters"].items()}
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}, recorded with {entry['plugin']} {entry['version']}: {error}") from error


def _how_to_get(entry: dict[str, Any]) -> str:
    distribution, version = entry["distribution"], entry["version"]
    if not distribution:
        return "a class registered in the process that wrote it; define that class and call trimtab.register(cls)."
    # A recipe may come from anywhere: nothing but a plain name and version goes into a command that is to be copied.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", distribution) or not re.fullmatch(r"\d[\w.+!]*", version, re.A):
        return f"recorded from {distribution!r} {version!r}, which is not installed."
    command = f'pip install "{distribution}>={version}"'
    return f"from {distribution} {version}, which is not installed. If you trust its author: {command}"


def _check_versions(where: str, entry: dict[str, Any]) -> None:
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
        return
    try:
        newer = Version(entry["version"]) > Version(plugin.version)
    except InvalidVersion:
        newer = False
    if newer:
        logger.warning("%s was recorded with version %s, newer than %s.", where, entry["version"], plugin)


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


def _encode(value: Any) -> Any:
    """A value in JSON's types; `TypeError` for what they cannot hold."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, BaseGuidance):
        return _encode(store(value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(type(value).__name__)


def _decode(value: Any, hint: Any) -> Any:
    """Turn "inf" back into a number where the declared type has one; `check_value` makes the tuples."""
    if isinstance(value, list):
        return [_decode(item, hint) for item in value]
    if isinstance(value, dict) and value.keys() == {"class", "config"} and _mentions(hint, BaseGuidance):
        return create(value["class"], value["config"])
    if isinstance(value, dict):
        return {key: _decode(item, hint) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf") and _mentions(hint, float) else value


def _mentions(hint: Any, kind: type) -> bool:
    return hint is kind or any(_mentions(part, kind) for part in typing.get_args(hint))
