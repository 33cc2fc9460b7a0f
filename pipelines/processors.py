"""Stand-ins for attention processors: the same code, in which the attention function is another.

A processor finds `scaled_dot_product_attention`, or Diffusers' `dispatch_attention_fn`, by name in its module. Its
stand-in runs the same code with these names bound to functions of ours, which ask the perturbation that acts just then.
Norms, rotary embeddings, adapters and projections stay the processor's own. Nothing global is changed, and unlike a
`TorchFunctionMode` it acts in a compiled graph, whatever backend of attention is chosen.
"""

from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import CodeType, FunctionType
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional as F

from ..guidance.errors import UnsupportedPipelineError

_WITHOUT = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}
"""Processors that compute attention by other means, each with the one that computes the same by the function."""

Attention = Callable[..., torch.Tensor]


class _Present(threading.local):
    """The attention function that acts in a thread; always there, as a compiler asks whether it is."""

    def __init__(self) -> None:
        self.function: Any = None


_present = _Present()


def stand_in(attention: nn.Module) -> Any:
    """The stand-in for an attention's processor; `None` where its code calls no attention function that is known."""
    processor: Any = attention.processor
    other = _WITHOUT.get(type(processor).__name__)
    if other is not None and getattr(attention, "scale_qk", True):
        processor = getattr(attention_processor, other)()
    kind: Any = type(processor)
    kind = _stand_in_class(kind)
    if kind is None:
        return None
    twin = object.__new__(kind)
    twin.__dict__ = processor.__dict__
    return twin


class ProcessorsBefore:
    """The attention processors of a model before a run, some of which a pipeline may exchange in its call.

    They are put back if the stack closes with an error: Diffusers' own pipelines do so at the end of their call only,
    so that one that is refused in mid-run would be left with the wrong ones.
    """

    def __init__(self, stack: ExitStack, module: nn.Module) -> None:
        parts = [part for part in module.modules() if hasattr(part, "processor") and hasattr(part, "set_processor")]
        self._before: list[tuple[Any, Any]] = [(attention, attention.processor) for attention in parts]
        stack.push(self._put_back)

    def _put_back(self, kind: type[BaseException] | None, *_: object) -> None:
        for attention, processor in self._before if kind is not None else ():
            if attention.processor is not processor:
                attention.set_processor(processor)

    def check_unread(self, pipeline: str, asked_by: str) -> None:
        """Refuse a further prediction where the pipeline reads attention maps by processors that it has put in itself.

        Raises:
            UnsupportedPipelineError: naming the processor.
        """
        for attention, before in self._before:
            if attention.processor is not before and _keeps_something(attention.processor):
                name = type(attention.processor).__name__
                raise UnsupportedPipelineError(
                    f"{asked_by}: {pipeline} reads attention maps by a processor of its own, {name}, which would take "
                    "those of a further prediction for its own. Use a guidance that needs no further prediction."
                )


def _keeps_something(processor: Any) -> bool:
    """Whether a processor remembers what it computed: it writes to itself, or holds more than numbers."""
    if isinstance(processor, nn.Module):
        return False
    numbers = (bool, int, float, str, type(None))
    code = getattr(type(processor).__call__, "__code__", None)  # a function has none there
    writes = code is not None and any(found.opname == "STORE_ATTR" for found in dis.get_instructions(code))
    return writes or not all(isinstance(value, numbers) for value in getattr(processor, "__dict__", {}).values())


class Replaced:
    """A context in which an attention's processor gives way to its stand-in, whose attention function is `function`.

    Args:
        function: takes `(stock, query, key, value, attn_mask, scale, enable_gqa)`, tensors `[batch, heads, tokens,
            head_dim]`; `stock()` is what the processor itself would have computed.
    """

    def __init__(self, attention: nn.Module, processor: Any, function: Attention) -> None:
        self._attention, self.processor, self._function = attention, processor, function

    def __enter__(self) -> None:
        self._outer = _present.function
        self._stock = self._attention.processor
        _present.function, self._attention.processor = self._function, self.processor

    def __exit__(self, *_: object) -> None:
        _present.function, self._attention.processor = self._outer, self._stock


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """In place of `scaled_dot_product_attention`."""

    def stock() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return _present.function(stock, query, key, value, attn_mask, scale, enable_gqa)


def _dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None, **choice: Any,
) -> torch.Tensor:  # fmt: skip
    """In place of `dispatch_attention_fn`, which takes `[batch, tokens, heads, head_dim]`."""

    def stock() -> torch.Tensor:
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **choice
        ).transpose(1, 2)

    mask = attn_mask
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UnsupportedPipelineError(
            f"attention is given a {type(mask).__name__}, which says for whole blocks of tokens which of them meet: "
            "there is no map that could be perturbed. Use 'slg', which leaves whole layers out."
        )
    if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None]
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return _present.function(stock, *heads_first, mask, scale, enable_gqa).transpose(1, 2)


class _Overlaid:
    """A module of which some members are others."""

    def __init__(self, module: Any, **members: Any) -> None:
        self.__dict__.update(members)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_FUNCTIONAL = _Overlaid(F, scaled_dot_product_attention=_attend)
_NN = _Overlaid(nn, functional=_FUNCTIONAL)
_REPLACED = {id(F.scaled_dot_product_attention): _attend, id(dispatch_attention_fn): _dispatch}
_REPLACED_MODULES = {id(F): _FUNCTIONAL, id(nn): _NN, id(torch): _Overlaid(torch, nn=_NN)}


@functools.cache
def _stand_in_class(kind: type) -> Any:
    """A subclass whose methods, and those that they reach by `super()`, are rebound; `None` if there is nothing to."""
    own, *inherited = [_methods(base) for base in kind.__mro__ if base not in (*nn.Module.__mro__, object)]
    if not any((own, *inherited)):
        return None
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    # Each goes into the order of lookup just before the class that it stands for.
    between = [
        type(base.__name__, (base,), methods)
        for base, methods in zip(kind.__mro__[1:], inherited, strict=False)
        if methods
    ]
    return type(kind.__name__, (kind, *between), {**body, **own})


def _methods(kind: type) -> dict[str, FunctionType]:
    found = ((name, _rebound(value)) for name, value in vars(kind).items() if isinstance(value, FunctionType))
    return {name: function for name, function in found if function is not None}


@functools.cache
def _rebound(function: FunctionType) -> FunctionType | None:
    """The same code with other attention functions; `None` where neither it nor a helper in its module calls one."""
    names = set(_names(function.__code__))
    changed = {}
    for name in names & set(function.__globals__):
        value = function.__globals__[name]
        replaced: Any = _REPLACED.get(id(value))
        if replaced is None and "scaled_dot_product_attention" in names:
            replaced = _REPLACED_MODULES.get(id(value))
        helper = isinstance(value, FunctionType) and value is not function
        if replaced is None and helper and value.__globals__ is function.__globals__:
            replaced = _rebound(value)
        if replaced is not None:
            changed[name] = replaced
    if not changed:
        return None
    # By its `__name__` a compiler would look the names up in the module itself.
    namespace = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    twin = FunctionType(
        function.__code__, {**namespace, **changed}, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__, twin.__qualname__ = function.__kwdefaults__, function.__qualname__
    twin.__module__, twin.__annotations__ = function.__module__, function.__annotations__
    return twin


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
