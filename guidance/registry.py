"""The plug-ins: found through entry points of the group `trimtab.guidance`, or registered in this process.

The entry point's name is the plug-in's. Names without a dot are this package's own; a plug-in from elsewhere is called
`vendor.name`. Discovery reads metadata only; a plug-in's module is imported when the plug-in is first used.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from .base import Guidance
from .blocking import blocked_by
from .contract import check_contract, check_name
from .declared import declared
from .errors import PluginError, UnknownGuidanceError, did_you_mean
from .guiders import NATIVE, known_as
from .parameters import fields_of, unknown_parameter

GROUP = "trimtab.guidance"

GuidanceType = TypeVar("GuidanceType", bound=Guidance)


@dataclass(frozen=True)
class Plugin:
    """One plug-in as its metadata describes it; nothing of it is imported yet.

    Args:
        name: its public name.
        value: where its class is, `"module:object"`.
        distribution, version: what provides it; empty for a class registered in this process.
        origin: `"entry point"` or `"registered"`.
        rivals: plug-ins of other distributions that claim the same name; then none of them can be used.
    """

    name: str
    value: str
    distribution: str
    version: str
    origin: str = "entry point"
    rivals: tuple[Plugin, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        source = f"{self.distribution} {self.version}" if self.distribution else f"registered from {self.value}"
        return f"{self.name} ({source})"

    def load(self) -> type[Guidance]:
        """Its class, imported and checked at the first call.

        Raises:
            PluginError: it is blocked, broken, made for another hook interface, or its name is claimed twice.
        """
        if reason := blocked_by(self.name):
            raise PluginError(f"{self.name} is blocked by {reason}.")
        if self.rivals:
            raise _claimed_twice(self, *self.rivals)
        if self in _classes:
            return _classes[self]
        # Python's import lock makes the import happen once. Holding ours meanwhile could deadlock with a module that
        # registers something while another thread imports it.
        try:
            # What its module prints is none of the output of whoever lists it.
            with contextlib.redirect_stdout(sys.stderr):
                found = EntryPoint(self.name, self.value, GROUP).load()
            cls = check_contract(self.name, found)
            check_name(self.name, cls)
        except PluginError as error:
            raise PluginError(f"Plug-in {self} cannot be used. {error}") from None
        except (Exception, SystemExit) as error:
            raise PluginError(f"Plug-in {self} is broken: {type(error).__name__}: {error}") from error
        with _lock:
            return _classes.setdefault(self, cls)


_lock = threading.RLock()
_discovered: dict[str, Plugin] | None = None
_registered: dict[str, Plugin] = {}
_classes: dict[Plugin, type[Guidance]] = {}
_hidden = False


def plugins(refresh: bool = False) -> dict[str, Plugin]:
    """All plug-ins by name, also blocked and broken ones; `refresh` reads the installed metadata again."""
    global _discovered
    with _lock:
        if _discovered is None or refresh:
            _discovered = {} if _hidden else _discover()
        return dict(sorted({**_discovered, **_registered}.items()))


def describe(name: str) -> Plugin:
    """A plug-in's metadata; nothing is imported.

    Raises:
        UnknownGuidanceError: there is none of this name; the message lists those that there are.
    """
    # A package may have been installed since the last look.
    known = plugins() if name in plugins() else plugins(refresh=True)
    if name in known:
        return known[name]
    if (guider := known_as(name)) is not None and guider not in NATIVE:
        raise UnknownGuidanceError(
            f"There is no guidance {name!r}, but Diffusers has it as a guider: add_guidance({guider}(...)) after "
            f"`from diffusers.guiders import {guider}`; in a command, --guidance guider:guider={guider}."
        )
    meant = f" Did you mean {NATIVE[guider]!r}?" if guider is not None else did_you_mean(name, known)
    message = f"There is no guidance {name!r}.{meant} Installed: {', '.join(known) or 'none'}."
    if not meant and re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", name):
        package = "trimtab-" + re.sub(r"[._]", "-", name.lower())
        message += f" A package may provide it, perhaps (if you trust its author): pip install {package}"
    raise UnknownGuidanceError(message)


def find(name: str) -> type[Guidance]:
    """The class of a plug-in.

    Raises:
        UnknownGuidanceError: there is none of this name; the message lists those that there are.
        PluginError: it cannot be used; see `Plugin.load`.
    """
    return describe(name).load()


def create(name: str, /, **parameters: Any) -> Guidance:
    """A new guidance: `create("pag", scale=3.0)`.

    Raises:
        ParameterError: an unknown parameter, or a value that is not allowed. Others: see `find`.
    """
    cls = find(name)
    for unknown in sorted(parameters.keys() - fields_of(cls).keys()):
        raise unknown_parameter(name, unknown, cls)
    warn_if_deprecated(cls)
    for given in parameters:
        if instead := fields_of(cls)[given].metadata["deprecated"]:
            _warn(f"{name}: {given} is deprecated. {instead}")
    return cls(**parameters)


def warn_if_deprecated(cls: type[Guidance]) -> None:
    """Say what to use instead of a plug-in, where it says so."""
    if cls.deprecated:
        _warn(f"Plug-in {plugins()[cls.name]} is deprecated. {cls.deprecated}")


def register(cls: type[GuidanceType], name: str | None = None, *, override: bool = False) -> type[GuidanceType]:
    """Make a class of this process, such as one from a notebook, a plug-in. Returns it, so it serves as a decorator.

    Args:
        name: its public name; by default the class's own `name`. A class without one of its own is given it.
        override: let it replace a plug-in of the same name.

    Raises:
        PluginError: the class breaks the contract, or the name is taken; the message names both.
    """
    if not (chosen := getattr(cls, "name", "") if name is None else name):
        raise PluginError(f"{cls!r} has no name; give it one: name = 'vendor.name'.")
    check_contract(chosen, cls)
    takes_name = name is not None and not vars(cls).get("name")
    if not takes_name:
        check_name(chosen, cls)
    plugin = Plugin(chosen, f"{cls.__module__}:{cls.__qualname__}", "", "", "registered")
    with _lock:
        taken = plugins().get(chosen)
        if taken and _classes.get(taken) is cls:
            return cls
        if taken and not override:
            raise _claimed_twice(taken, plugin)
        if takes_name:
            cls.name = chosen
        _registered[chosen] = plugin
        _classes[plugin] = cls
    return cls


def unregister(name: str) -> None:
    """Undo `register`; a plug-in that it replaced is back. A name not registered is an `UnknownGuidanceError`."""
    with _lock:
        if name not in _registered:
            raise UnknownGuidanceError(f"{name!r} is not registered.{did_you_mean(name, _registered)}")
        _classes.pop(_registered.pop(name), None)


def identify(cls: type[Guidance]) -> Plugin | None:
    """The plug-in that this very class is, or `None` for a class that is not registered."""
    plugin = plugins().get(cls.name)
    try:
        return plugin if plugin is not None and plugin.load() is cls else None
    except PluginError:
        return None


@contextmanager
def isolated() -> Iterator[None]:
    """Hide every plug-in within a `with` block, so that only what is registered in it exists; then all are back."""
    global _discovered, _hidden
    with _lock:
        before = _discovered, _hidden, dict(_registered), dict(_classes)
        _discovered, _hidden = {}, True
        _registered.clear()
        _classes.clear()
    try:
        yield
    finally:
        with _lock:
            _discovered, _hidden = before[:2]
            _registered.clear()
            _registered.update(before[2])
            _classes.clear()
            _classes.update(before[3])


def _discover() -> dict[str, Plugin]:
    claims: dict[str, list[Plugin]] = {}
    for point, distribution, version in declared(GROUP):
        claims.setdefault(point.name, []).append(Plugin(point.name, point.value, distribution, version))
    return {name: replace(first, rivals=tuple(rest)) for name, (first, *rest) in claims.items()}


def _warn(message: str) -> None:
    """A `FutureWarning` that points to the line outside of this package which led here."""
    package, level = __name__.partition(".")[0], 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FutureWarning, stacklevel=level)


def _claimed_twice(*claims: Plugin) -> PluginError:
    claimants = " and ".join(map(str, claims))
    return PluginError(
        f"The plug-in name {claims[0].name!r} is claimed twice: by {claimants}. Uninstall or rename one, "
        "or choose one yourself: trimtab.register(cls, override=True)."
    )
