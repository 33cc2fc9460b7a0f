"""What can be told of the installed plug-ins, for people and for programs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Guidance
from .blocking import blocked_by
from .contract import HOOKS
from .errors import PluginError
from .parameters import default_of, fields_of, off_values, types_of
from .registry import describe
from .wording import describe_range, in_words

_HELPERS = frozenset({"setup", "with_respect_to", "reshape_gradient", "repeats", "teardown"})
"""Hooks that are no phase of a step; a table leaves them out beside others."""

_COST = re.compile(r"^Cost: *(.*?)(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def status(name: str) -> dict[str, Any]:
    """One line of a listing, for JSON: `status` is `"ok"`, `"broken"` or `"blocked"`. Loads the plug-in.

    Raises:
        UnknownGuidanceError: there is none of this name.
    """
    plugin = describe(name)
    listing = {key: getattr(plugin, key) for key in ("name", "value", "distribution", "version", "origin")}
    listing |= {"status": "ok", "error": None, "api_version": None, "phases": [], "exclusive": None, "cost": None}
    listing |= {"needs": [], "deprecated": None}
    try:
        cls = plugin.load()
    except PluginError as error:
        cause = error.__cause__
        text = str(error) if cause is None else "".join(traceback.format_exception(cause))
        return listing | {"status": "blocked" if blocked_by(name) else "broken", "error": text}
    phases = [hook for hook in HOOKS if cls.overrides(hook)]
    listing |= {"api_version": cls.api_version, "phases": phases, "exclusive": cls.exclusive, "cost": _cost(cls)}
    return listing | {"needs": sorted(cls.needs), "deprecated": cls.deprecated or None}


def details(name: str) -> dict[str, Any]:
    """The status, and for a plug-in that can be used its description and its parameters, for JSON."""
    listing = status(name)
    if listing["status"] != "ok":
        return listing
    cls = describe(name).load()
    off = off_values(cls)
    parameters = [
        {
            "name": key,
            "type": in_words(types_of(cls)[key]),
            "default": _plain(default_of(field) if field.default is dataclasses.MISSING else getattr(cls, key)),
            "allowed": describe_range(field),
            "unit": field.metadata["unit"],
            "off": _plain(off.get(key)),
            "deprecated": field.metadata["deprecated"] or None,
            "doc": field.metadata["doc"],
        }
        for key, field in fields_of(cls).items()
    ]
    return listing | {"doc": _doc(cls), "parameters": parameters}


def advice(listing: Mapping[str, Any]) -> list[str]:
    """What a usable plug-in should still be given, sentence by sentence; nothing where it lacks nothing."""
    if listing["status"] != "ok":
        return []
    cls = describe(listing["name"]).load()
    lacking = []
    if not set(listing["phases"]) - (_HELPERS - {"setup"}):
        lacking.append(f"It overrides no phase, so it does nothing; is a hook misspelt? There are: {', '.join(HOOKS)}.")
    if not _doc(cls):
        lacking.append("Write a docstring: what it does, its equation, its paper.")
    elif listing["cost"] is None:
        lacking.append(
            'Say what it costs in its docstring, in a paragraph of its own: "Cost: one more evaluation ...".'
        )
    if not off_values(cls):
        lacking.append("Declare which value switches it off, if one does: parameter(..., off=0.0).")
    if listing["origin"] == "entry point" and listing["distribution"] != "trimtab" and "." not in listing["name"]:
        lacking.append(f"Names without a dot are trimtab's own; call it vendor.{listing['name']}.")
    return lacking


def table(listings: Sequence[Mapping[str, Any]]) -> str:
    """A line for each plug-in, then the traceback of each broken one."""
    lines = [("NAME", "STATUS", "PHASES", "COST", "FROM", "ORIGIN")]
    for one in listings:
        source = f"{one['distribution']} {one['version']}" if one["distribution"] else one["value"]
        cost = textwrap.shorten(one["cost"] or "-", 48, placeholder=" ...")
        state = "deprecated" if one["deprecated"] else one["status"]
        phases = [hook for hook in one["phases"] if hook not in _HELPERS] or one["phases"]
        lines.append((one["name"], state, ", ".join(phases) or "-", cost, source, one["origin"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    broken = [f"\n{one['name']} is broken:\n{one['error'].rstrip()}" for one in listings if one["status"] == "broken"]
    return "\n".join(rows + broken)


def sheet(described: Mapping[str, Any]) -> str:
    """All that `details` tells of one plug-in, to be read."""
    source = f"{described['distribution'] or described['value']} {described['version']}".strip()
    lines = [f"{described['name']} ({source})"]
    if described["status"] != "ok":
        return "\n".join([*lines, "", f"{described['status']}:", described["error"].rstrip()])
    if described["deprecated"]:
        lines += ["", f"Deprecated. {described['deprecated']}"]
    lines += ["", described["doc"], "", f"Phases: {', '.join(described['phases']) or 'none'}"]
    lines += [f"Needs: {', '.join(described['needs'])}"] if described["needs"] else []
    lines += [f"Claims the slot: {described['exclusive']}"] if described["exclusive"] else []
    lines.append("Parameters:")
    for one in described["parameters"]:
        notes = [" ".join(filter(None, (one["allowed"], one["unit"])))]
        notes += [f"off at {one['off']!r}"] if one["off"] is not None else []
        lines.append(f"  {one['name']}: {one['type']} = {one['default']}  ({'; '.join(notes)})\n      {one['doc']}")
    return "\n".join(lines)


def report(checked: Sequence[Mapping[str, Any]]) -> str:
    """What `trimtab plugins check` prints of plug-ins with their status and advice."""
    lines = []
    for one in checked:
        lines.append(f"{one['name']}: {one['status']}")
        lines += [f"    Deprecated. {one['deprecated']}"] if one["deprecated"] else []
        lines += textwrap.indent(one["error"].rstrip(), "    ").splitlines() if one["error"] else []
        lines += [f"    {sentence}" for sentence in one["advice"]]
    lines.append("To check what they compute: pytest --trimtab-plugin NAME")
    return "\n".join(lines)


def _doc(cls: type[Guidance]) -> str:
    # A dataclass without a docstring gets its signature for one.
    text = vars(cls).get("__doc__") or ""
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)


def _cost(cls: type[Guidance]) -> str | None:
    """The paragraph of the docstring that begins with "Cost:", on one line."""
    found = _COST.search(_doc(cls))
    return " ".join(found[1].split()) if found else None


def _plain(value: Any) -> Any:
    """The value if JSON has it, else its text."""
    known = isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)
