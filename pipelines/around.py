"""What guidances put around the denoiser's calls, and the calls that they make apart from those of the run."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..guidance.branch import Branch
from ..guidance.run import AroundDenoiser, Step
from .call import branches_of
from .denoiser import Denoiser
from .interception import outer_contexts_kept

_numbers = itertools.count()

apart: ContextVar[bool] = ContextVar("apart", default=False)
"""Whether the denoiser is being called apart from the run; such a call is no evaluation."""


def surrounded(
    denoiser: Denoiser,
    original: Callable[..., Any],
    around: Sequence[AroundDenoiser],
    step: Step | None,
    roles: Sequence[str] | None,
) -> Callable[..., Any]:
    """A denoiser call with every `around` about it, the last outermost."""
    forward = original
    for one in around:
        assert step is not None
        forward = _around(one, step, _DenoiserCall(denoiser, forward, original, roles))
    return forward


def _around(around: AroundDenoiser, step: Step, call: _DenoiserCall) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(step, call, args, kwargs)

    return forward


class _DenoiserCall:
    """See `guidance.run.DenoiserCall`."""

    def __init__(
        self, denoiser: Denoiser, forward: Callable[..., Any], bare: Callable[..., Any], roles: Sequence[str] | None
    ) -> None:
        self.module: nn.Module = denoiser.family.module
        self._denoiser, self._forward, self._bare, self._roles = denoiser, forward, bare, roles

    @property
    def rows(self) -> tuple[Branch | None, ...]:
        layout = self._denoiser.perturber.layout
        return branches_of(self._roles) if layout is None else layout.branches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def apart(self, *args: Any, **kwargs: Any) -> Any:
        # A step cache compares with the call before it in the same context, so each call has one of its own.
        enter = getattr(self.module, "cache_context", None)
        context = enter(f"trimtab_apart_{next(_numbers)}") if enter is not None else nullcontext()
        token = apart.set(True)
        try:
            with torch.no_grad(), self._denoiser.perturber.idle(), outer_contexts_kept(self.module), context:
                return self._bare(*args, **kwargs)
        finally:
            apart.reset(token)
