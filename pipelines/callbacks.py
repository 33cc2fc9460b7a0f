"""Between two steps a user's callback finds the pipeline as a stock run would show it, with nothing of ours on it.

So it may copy or pickle the pipeline, or call another one that shares the denoiser, which then runs as ever; what it
computes is none of the run's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .taps import Taps

CALLBACKS = ("callback_on_step_end", "callback")
"""Arguments of a pipeline's call that are called between its steps; the second is an older name."""


def with_callbacks_apart(taps: Taps, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, with callbacks during which the taps are lifted."""
    return {name: _apart(taps, value) if name in CALLBACKS else value for name, value in call.items()}


def _apart(taps: Taps, callback: Any) -> Any:
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return _Apart(taps, callback)
    if not callable(callback):
        return callback
    inner: Callable[..., Any] = callback

    @functools.wraps(inner)
    def between_steps(*args: Any, **kwargs: Any) -> Any:
        with taps.lifted():
            return inner(*args, **kwargs)

    return between_steps


class _Apart(MultiPipelineCallbacks):
    """A callback that is an object, whose `tensor_inputs` a pipeline asks for."""

    def __init__(self, taps: Taps, callback: Any) -> None:
        super().__init__([callback])
        self._taps = taps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._taps.lifted():
            return self.callbacks[0](*args, **kwargs)
