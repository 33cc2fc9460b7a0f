"""What an object is made of: two fingerprints are equal only if no attribute was added, removed or exchanged."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from typing import Any

import torch

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
    functools.partial,
)
_OWN = ("_trimtab_guidances", "last_guided_run")


def fingerprint(owner: Any, values: bool = True, identity: bool = True) -> dict[str, str]:
    """Every attribute reachable from `owner`'s `__dict__`, by path.

    Args:
        values: whether numbers, strings and tensors count by value; otherwise only that they are there, as after a run
            that was broken off.
        identity: whether classes, functions, hooks and attention processors must be the very same objects; otherwise
            those of another pipeline that was built alike count as equal.
    """
    found: dict[str, str] = {}
    seen: dict[int, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = _tensor(value) if values else "data"
        elif isinstance(value, _NUMBERS):
            found[path] = repr(value) if values else "data"
        elif id(value) in seen:
            found[path] = f"is {seen[id(value)]}"
        elif isinstance(value, (dict, list, tuple, set)):
            seen[id(value)] = path
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = [(key, item) for key, item in items if values or not _is_data(item)]
            found[path] = f"{type(value).__qualname__} of {len(inner)}" if values or inner else "data"
            for position, (key, item) in enumerate(inner):
                walk(item, f"{path}[{key if isinstance(key, str) else position}]")
        elif isinstance(value, _FUNCTIONS):
            found[path] = _function(value, identity)
        else:
            seen[id(value)] = path
            kind = f"{type(value).__module__}.{type(value).__qualname__} {id(type(value))}"
            found[path] = f"{kind} {id(value)}" if identity else kind
            for name, item in getattr(value, "__dict__", {}).items():
                walk(item, f"{path}.{name}")

    walk(owner, "")
    return found


def of_pipeline(pipe: Any, values: bool = True, identity: bool = True) -> dict[str, str]:
    """The fingerprint of each model and scheduler of a pipeline, and of what else its own `__dict__` holds."""
    found: dict[str, str] = {}
    for name, item in vars(pipe).items():
        if name in _OWN:
            continue
        followed = (
            isinstance(item, (torch.nn.Module, torch.Tensor)) or hasattr(item, "step") or not hasattr(item, "__dict__")
        )
        aside = f"{type(item).__qualname__} {id(item)}" if identity else type(item).__qualname__
        inner = fingerprint(item, values, identity) if followed else {"": aside}
        found.update({f"{name}{path}": token for path, token in inner.items()})
    return found


def of_class(cls: type, base: type) -> dict[str, str]:
    """The fingerprint of what a class and its module hold: numbers, tensors, models, and containers of these.

    Args:
        base: the classes above it, up to this one, and their modules count as well.
    """
    held: dict[str, Any] = {}
    for one in cls.__mro__[: cls.__mro__.index(base)]:
        held |= {f"{one.__module__}.{name}": value for name, value in vars(sys.modules[one.__module__]).items()}
        held |= {f"{one.__qualname__}.{name}": value for name, value in vars(one).items()}
    kinds = (*_NUMBERS, dict, list, tuple, set, torch.Tensor, torch.nn.Module)
    found: dict[str, str] = {}
    for name, value in held.items():
        if isinstance(value, kinds) and "__" not in name:
            found.update({f"{name}{path}": token for path, token in fingerprint(value).items()})
    return found


def _tensor(value: torch.Tensor) -> str:
    if value.is_meta:
        return f"{type(value).__qualname__} {value.dtype} {tuple(value.shape)} meta"
    flatten: Any = getattr(value, "__tensor_flatten__", None)
    if flatten is not None:  # quantised weights are made of several tensors
        inner = [_tensor(getattr(value, name)) for name in flatten()[0]]
        return f"{type(value).__qualname__} {value.dtype} {tuple(value.shape)} of {inner}"
    data = value.detach().cpu().contiguous().view(-1).view(torch.uint8) if value.numel() else value.detach()
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
    return f"{type(value).__qualname__} {value.dtype} {tuple(value.shape)} {value.requires_grad} {digest}"


def _is_data(value: Any) -> bool:
    return isinstance(value, (*_NUMBERS, torch.Tensor))


def _function(value: Any, identity: bool) -> str:
    function = getattr(value, "__func__", value)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {id(function)} of {id(getattr(value, '__self__', None))}" if identity else name
