"""The cache contexts of one denoiser: in which the pipeline calls it, and those of our own calls between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import nn

from .interception import cache_hooks, outer_contexts_kept
from .taps import set_attribute


class Contexts:
    """Follows the `cache_context` of a denoiser through a run.

    Args:
        module: as the pipeline calls it.
        inside: the module itself, which a compiler may have wrapped.
        stack: undoes what is installed.

    Attributes:
        present: the name of the pipeline's own context at the moment.
    """

    def __init__(self, module: nn.Module, inside: nn.Module, stack: ExitStack) -> None:
        self.present: str | None = None
        self._inside = inside
        self._whereabouts: Mapping[str, Any] = {}
        self._cached: dict[str, dict[int, Any]] = {}
        self._named = False
        self._enter = getattr(module, "cache_context", None)
        if self._enter is not None:
            set_attribute(stack, module, "cache_context", self._followed)

    @contextmanager
    def inner(self, name: str) -> Iterator[None]:
        """A `cache_context` for calls of our own, the outer ones kept.

        None where the pipeline names none and no cache needs one: entering it would leave a hook registry behind.
        """
        enter = self._enter if self._named or self.has_step_cache else None
        context = enter(name, **self._whereabouts) if enter is not None else nullcontext()
        with outer_contexts_kept(self._inside, self._cached.setdefault(name, {})), context:
            yield

    @cached_property
    def has_step_cache(self) -> bool:
        """Whether something inside remembers one step's call until the next."""
        return bool(cache_hooks(self._inside))

    @contextmanager
    def _followed(self, name: str, **kwargs: Any) -> Iterator[None]:
        assert self._enter is not None
        outer = self.present, self._whereabouts
        self.present, self._whereabouts, self._named = name, kwargs, True
        try:
            with self._enter(name, **kwargs):
                yield
        finally:
            self.present, self._whereabouts = outer
