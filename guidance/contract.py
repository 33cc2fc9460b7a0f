"""What a class must be to serve as a plug-in; checked once, when the plug-in is first used or registered."""

from __future__ import annotations

import dataclasses
import inspect

from .base import API_VERSION, Guidance
from .errors import ParameterError, PluginError
from .parameters import check_value, fields_of

HOOKS = (
    "setup", "branches", "delta", "project", "guide_x0", "loss", "with_respect_to", "reshape_gradient", "renoise",
    "repeats", "after_step", "teardown",
)  # fmt: skip
NEEDS = frozenset({"attention", "gradient", "level"})
DIFFERENTIATE = ("x0", "x_t", "sample")


def check_contract(name: str, cls: object) -> type[Guidance]:
    """Return `cls` if it can serve as the plug-in `name`.

    Raises:
        PluginError: it is no `Guidance`, speaks another version of the hook interface, has a hook with the wrong
            arguments, or declares a parameter or an attribute that is not sound.
    """
    if not (isinstance(cls, type) and issubclass(cls, Guidance)) or cls is Guidance:
        raise PluginError(f"{name}: {cls!r} is not a subclass of trimtab.Guidance.")
    _check_api(name, cls.api_version)
    _check_hooks(name, cls)
    _check_attributes(name, cls)
    _check_parameters(name, cls)
    return cls


def check_name(name: str, cls: type[Guidance]) -> None:
    """Messages, recipes and `before`/`after` go by the class's own name, so it must be the plug-in's.

    Raises:
        PluginError: it is another.
    """
    if cls.name != name:
        raise PluginError(f"{name}: {cls.__qualname__}.name is {cls.name!r}; it must be the plug-in's name, {name!r}.")


def api_number(version: object) -> tuple[int, int]:
    """Major and minor number of an API version such as `"1.0"`.

    Raises:
        ValueError: it is not written like that.
    """
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"api_version={version!r} is not a version; write it like {API_VERSION!r}.")
    return int(parts[0]), int(parts[1])


def _check_api(name: str, version: object) -> None:
    """SemVer: same major number, and a minor number that this package has reached."""
    try:
        theirs, ours = api_number(version), api_number(API_VERSION)
    except ValueError as error:
        raise PluginError(f"{name}: {error}") from None
    if theirs[0] != ours[0] or theirs[1] > ours[1]:
        remedy = "upgrade trimtab" if theirs > ours else "upgrade the plug-in"
        raise PluginError(
            f"{name}: written for hook interface {version}, but this trimtab has {API_VERSION}; {remedy}."
        )


def _check_hooks(name: str, cls: type[Guidance]) -> None:
    for hook in HOOKS:
        wanted, given = inspect.signature(getattr(Guidance, hook)), getattr(cls, hook)
        try:
            inspect.signature(given).bind(*wanted.parameters)
        except TypeError:
            found = inspect.signature(given) if callable(given) else f" = {given!r}"
            expected = f"{hook}({', '.join(wanted.parameters)})"
            raise PluginError(f"{name}: {cls.__qualname__}.{hook}{found} must take {expected}.") from None


def _check_attributes(name: str, cls: type[Guidance]) -> None:
    def refuse(attribute: str, allowed: str) -> PluginError:
        return PluginError(f"{name}: {cls.__qualname__}.{attribute}={getattr(cls, attribute)!r}; allowed: {allowed}.")

    for attribute in ("before", "after"):
        names = getattr(cls, attribute)
        if not isinstance(names, tuple) or not all(isinstance(other, str) and other != name for other in names):
            raise refuse(attribute, "a tuple of names of other plug-ins, such as ('cfg',)")
    if cls.exclusive is not None and not (isinstance(cls.exclusive, str) and cls.exclusive):
        raise refuse("exclusive", "None or the name of a slot, such as 'cfg'")
    if not isinstance(cls.needs, (set, frozenset)) or not cls.needs <= NEEDS:
        raise refuse("needs", f"a frozenset of {', '.join(map(repr, sorted(NEEDS)))}")
    if not isinstance(cls.deprecated, str):
        raise refuse("deprecated", "a sentence that says what to use instead, such as \"Use 'pag'.\", or ''")
    if cls.differentiate not in DIFFERENTIATE:
        raise refuse("differentiate", " or ".join(map(repr, DIFFERENTIATE)))


def _check_parameters(name: str, cls: type[Guidance]) -> None:
    for owner in cls.__mro__:
        for attribute, value in vars(owner).items():
            if isinstance(value, dataclasses.Field):
                raise PluginError(
                    f"{name}: decorate {owner.__qualname__} with @dataclass; {attribute} is not declared."
                )
    declared = fields_of(cls)
    for field in dataclasses.fields(cls):
        if field.name not in declared:
            raise PluginError(f"{name}: make the field {field.name!r} with trimtab.parameter(default, doc).")
        if not field.metadata["doc"].strip():
            raise PluginError(f"{name}: the parameter {field.name!r} needs a sentence that says what it does.")
        factory = field.default_factory
        try:
            check_value(name, cls, field.name, field.default if factory is dataclasses.MISSING else factory())
            if field.metadata["off"] is not None:
                check_value(name, cls, field.name, field.metadata["off"])
        except ParameterError as error:
            raise PluginError(f"A default or off value is not allowed: {error}") from None
        except NameError as error:
            raise PluginError(f"{name}: the type of a parameter cannot be resolved: {error}.") from None
