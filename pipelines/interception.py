"""How a running pipeline is held on to: the denoiser's call, the scheduler's step; and how everything is let go.

The denoiser is held at the instance's `_compiled_call_impl`, where `nn.Module.__call__` looks first: outermost, before
offload hooks, and outside a compiled graph. The scheduler is held by a dynamic subclass of the same name, because an
instance attribute would make a deep copy of the scheduler advance the original. Every change is pushed on an exit stack
together with its undoing, which touches only what is still ours. While a user's own code runs, all of it is lifted.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..guidance.errors import UnsupportedSchedulerError
from .taps import put, set_attribute


def tap_call(stack: ExitStack, module: nn.Module, on_call: Callable[..., Any]) -> None:
    """Route calls of `module` to `on_call(module, original, args, kwargs)` until the stack closes."""
    original = module.__dict__.get("_compiled_call_impl") or functools.partial(nn.Module._call_impl, module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return on_call(module, original, args, kwargs)

    set_attribute(stack, module, "_compiled_call_impl", call)


def tap_forward(stack: ExitStack, module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Route `module.forward` to `wrapper(original, *args, **kwargs)` until the stack closes.

    For modules inside the denoiser: an instance `forward` acts in a compiled graph as well, where a forward hook that
    was added after the first call would be silently ignored.
    """
    original = module.__dict__.get("forward") or functools.partial(type(module).forward, module)

    # A compiler knows a function again by its code, but a partial object only by its identity.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    set_attribute(stack, module, "forward", forward)


def tap_method(stack: ExitStack, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Route the method `name` of one object to `around(original, *args, **kwargs)`, keeping its signature."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    set_attribute(stack, owner, name, method)


def tap_scheduler(
    stack: ExitStack,
    scheduler: Any,
    on_step: Callable[[Any, inspect.BoundArguments, Callable[..., Any]], Any],
    on_scale: Callable[[Any, Any, Any], None],
) -> None:
    """Route `scheduler.step` to `on_step(scheduler, bound arguments, original)` until the stack closes.

    `on_scale(scheduler, given, returned)` sees what `scale_model_input` did. Copies that the pipeline makes of the
    scheduler are routed as well, each with itself as `scheduler`.
    """
    stock = type(scheduler)
    signature = _step_signature(stock)
    open_run = [False]

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not open_run[0]:
            return stock.step(self, *args, **kwargs)
        return on_step(self, signature.bind(self, *args, **kwargs), stock.step)

    body: dict[str, Any] = {"step": step, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    body["__reduce_ex__"] = lambda self, protocol: (_bare, (stock,), self.__dict__.copy())
    copies: weakref.WeakSet[Any] = weakref.WeakSet()

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        copies.add(twin := _copy_within_run(self, memo))
        return twin

    body["__deepcopy__"] = copied
    if hasattr(stock, "scale_model_input"):

        @functools.wraps(stock.scale_model_input)
        def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            scaled = stock.scale_model_input(self, sample, *args, **kwargs)
            if open_run[0]:
                on_scale(self, sample, scaled)
            return scaled

        body["scale_model_input"] = scale_model_input
    guided: Any = _AsStock(stock.__name__, (stock,), body)

    routed = [scheduler]

    def on() -> None:
        open_run[0] = True
        for one in routed:
            one.__class__ = guided

    def off() -> bool:
        open_run[0] = False
        # A pipeline may keep a copy in place of its scheduler (Text2Video-Zero).
        routed[:] = [one for one in (scheduler, *copies) if type(one) is guided]
        for one in routed:
            one.__class__ = stock
        return bool(routed)

    put(stack, on, off)


class _AsStock(type):
    """Equal to the class it is made of, for pipelines that ask `type(scheduler) != EulerDiscreteScheduler`."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _step_signature(stock: type) -> inspect.Signature:
    """The signature of `step` in the nearest class that names what it takes; a bare wrapper's says nothing.

    Raises:
        UnsupportedSchedulerError: no class does.
    """
    for base in stock.__mro__:
        if "step" in base.__dict__:
            signature = inspect.signature(base.__dict__["step"])
            if {"model_output", "timestep", "sample"} <= set(signature.parameters):
                return signature
    raise UnsupportedSchedulerError(
        f"{stock.__name__}: its step names no model_output, timestep and sample, so guidance cannot tell them apart."
    )


def _copy_within_run(scheduler: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that is routed as its original is; pickling, by contrast, gives the stock class."""
    kind: Any = type(scheduler)
    twin = kind.__new__(kind)
    memo[id(scheduler)] = twin
    twin.__dict__.update(copy.deepcopy(scheduler.__dict__, memo))
    return twin


def fresh_copy(scheduler: Any) -> Any:
    """A copy of the stock class with the same timesteps, which stands at their beginning and is not routed."""
    twin = copy.deepcopy(scheduler)
    rebuild, arguments, *_ = twin.__reduce_ex__(2)
    if rebuild is _bare:
        twin.__class__ = arguments[0]
    for position in ("_step_index", "_begin_index"):
        if position in twin.__dict__:
            twin.__dict__[position] = None
    return twin


def _bare(stock: Any) -> Any:
    return stock.__new__(stock)


def cache_hooks(module: nn.Module) -> list[Any]:
    """The hooks inside `module` that remember something from step to step."""
    registries = (getattr(child, "_diffusers_hook", None) for child in module.modules())
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    return [hook for hook in hooks if getattr(hook, "_is_stateful", False)]


@contextmanager
def outer_contexts_kept(module: nn.Module, states: dict[int, Any] | None = None) -> Iterator[None]:
    """Put what every step cache inside `module` was at back as it was.

    A nested `cache_context` leaves none behind, and the next call of the outer one would fail. Caches that know no
    contexts (FasterCache, pyramid attention broadcast) remember one thing at a time, which is exchanged here. Calls of
    our own hold one branch, so that FasterCache may not take them for an unconditional and a conditional half.

    Args:
        states: what those remember of the calls within, by hook; kept from one time to the next. Without it, nothing
            that is remembered within is kept.
    """
    try:
        from diffusers.hooks.hooks import StateManager
    except ImportError:  # an older layout without named contexts has nothing to keep
        yield
        return
    hooks = cache_hooks(module)
    managers = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
    contexts = [(manager, manager._context, set(manager._state_cache)) for manager in managers]
    outer = [(hook, hook.state) for hook in hooks if "state" in vars(hook)]
    inner = {} if states is None else states
    with ExitStack() as stack:
        for manager, context, names in contexts:
            stack.callback(_back_in, manager, context, names if states is None else None)
        for hook, state in outer:
            set_attribute(stack, hook, "state", inner.setdefault(id(hook), type(state)()))
            if hasattr(hook, "is_guidance_distilled"):
                set_attribute(stack, hook, "is_guidance_distilled", True)
            if hasattr(hook, "timestep_skip_range") and hook.state.cache is None:
                # FasterCache would leave out what it has never seen, where a branch begins late in the run.
                set_attribute(stack, hook, "timestep_skip_range", (0.0, 0.0))
        yield


def _back_in(manager: Any, context: str | None, names: set[str] | None) -> None:
    """Put a cache back into a context; without anything of others than `names`, if those are given."""
    manager.set_context(context)
    for name in set(manager._state_cache) - names if names is not None else ():
        del manager._state_cache[name]
