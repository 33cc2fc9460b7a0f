"""Pipelines that hand the frames of a video to the scheduler as the images of a batch (text to video, I2VGen-XL).

Their denoiser returns videos `[rows, channels, frames, height, width]`. So that guidances see a video wherever there is
one, what the scheduler is given becomes videos again before a run looks at it, and images before it is stepped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .call import Call
from .observation import observe
from .prediction import primary, with_primary

OnStep = Callable[[Any, inspect.BoundArguments, Callable[..., Any]], Any]


def with_videos(on_step: OnStep, calls: Callable[[], Sequence[Call]]) -> OnStep:
    """`on_step`, which is given videos where the scheduler is given their frames.

    Args:
        calls: the denoiser's since the last step.
    """

    def step(scheduler: Any, bound: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
        given, names = bound.arguments, ("model_output", "sample")
        frames = _frames(calls(), *(given[name] for name in names))
        if frames is None:
            return on_step(scheduler, bound, original)

        def with_images(*_: Any, **__: Any) -> Any:
            given.update({name: given[name].transpose(1, 2).flatten(0, 1) for name in names})
            result = original(*bound.args, **bound.kwargs)
            return with_primary(result, _videos(primary(result), frames))

        given.update({name: _videos(given[name], frames) for name in names})
        result = on_step(scheduler, bound, with_images)
        return with_primary(result, primary(result).transpose(1, 2).flatten(0, 1))

    return step


def _videos(images: torch.Tensor, frames: int) -> torch.Tensor:
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


def _frames(calls: Sequence[Call], model_output: torch.Tensor, sample: torch.Tensor) -> int | None:
    """How many images of the batch are one video; `None` where they are images, or one frame of each video."""
    outputs = [call.handed_back for call in calls]
    if not outputs or outputs[-1].ndim != 5 or model_output.ndim != 4 or model_output.shape != sample.shape:
        return None
    channels, frames, *size = outputs[-1].shape[1:]
    if [channels, *size] != list(model_output.shape[1:]) or frames < 2 or len(model_output) % frames:
        return None
    # As many videos as they have frames: each frame may be stepped by itself.
    seen = observe([output for output in outputs if output.shape == outputs[-1].shape], model_output, sample)
    return None if seen is not None and seen.exact else frames
