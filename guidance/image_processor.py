"""What a checkpoint's image processor does, seen on plain pictures that are shown to it.

Each kind of processor has switches and an order of steps of its own, which are read by nobody but itself. What all of
them do to a colour is

    value[c'] = (v[c] - mean[c]) / std[c],      v in 0..1, c' = c, or counted from the other end

so that four pictures of one colour tell it, and three of different shapes whether it resizes, to one size or by theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import ParameterError
from .images import Preprocessing

SHAPES = ((96, 96), (160, 160), (96, 160))
"""Height and width of the pictures that are shown."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Of PIL images, by number of channels."""


def of_processor(processor: Any, channels: int | None = None, label: str = "preprocessing") -> Preprocessing:
    """What a transformers image processor does to an image, cropping and the filter of its resizing apart.

    Args:
        processor: of images.
        channels: that the network takes; 3 if not given.
        label: of the guidance, for messages.

    Raises:
        ParameterError: it takes no plain pictures, or does something else to a colour than what is said above.
    """
    channels = channels or 3
    try:
        black, white, first = (_colour(processor, channel) for channel in _probes(channels))
        sizes = Sizes(processor, channels)
        seen = [sizes(*shape) for shape in SHAPES]
        reverse = channels > 1 and bool((first - black)[0].abs() < (first - black)[-1].abs())
        mean, std = -black / (white - black), 1 / (white - black)
        if reverse:
            mean, std = mean.flip(0), std.flip(0)
        size = None if seen == list(SHAPES) else seen[0] if len(set(seen)) == 1 else sizes
        found = Preprocessing(size, True, tuple(mean.tolist()), tuple(std.tolist()), channels, reverse)
        _check(processor, found, channels)
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ParameterError(
            f"{label}: the image processor {type(processor).__name__} cannot be followed for pictures of {channels} "
            f"channels: {' '.join(str(error).split())} Load the network yourself, and give it with size, unit_range, "
            "mean and std."
        ) from error
    return found


def _probes(channels: int) -> tuple[list[int], list[int], list[int]]:
    """Black, white, and the first channel alone."""
    return [0] * channels, [255] * channels, [255] + [0] * (channels - 1)


def _shown(processor: Any, colour: Sequence[int], shape: tuple[int, int] = SHAPES[0]) -> torch.Tensor:
    """What a processor makes of a picture of one colour, `[channels, height, width]`."""
    channels = len(colour)
    plain = Image.fromarray(np.tile(np.array(colour, dtype=np.uint8), (*shape, 1)).squeeze(), MODES[channels])
    values = torch.as_tensor(processor(plain, return_tensors="pt")["pixel_values"])
    if values.ndim != 4 or values.shape[:2] != (1, channels):
        raise ValueError(f"of one picture it makes {list(values.shape)}.")
    return values[0].double()


class Sizes:
    """The height and width that a processor makes of a picture of some height and width."""

    def __init__(self, processor: Any, channels: int) -> None:
        self._processor, self._channels = processor, channels
        self._known: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        shape = height, width
        if shape not in self._known:
            values = _shown(self._processor, [51] * self._channels, shape)
            self._known[shape] = values.shape[1], values.shape[2]
        return self._known[shape]


def _colour(processor: Any, colour: Sequence[int]) -> torch.Tensor:
    """The same in the middle of the picture, which is not padded."""
    values = _shown(processor, colour)
    return values[:, values.shape[1] // 2, values.shape[2] // 2]


def _check(processor: Any, found: Preprocessing, channels: int) -> None:
    colour = [37, 181, 94, 210][:channels]
    image = torch.tensor(colour, dtype=torch.float64).view(1, channels, 1, 1) / 127.5 - 1
    ours = Preprocessing(None, found.unit_range, found.mean, found.std, None, found.reverse)(image).flatten()
    theirs = _colour(processor, colour)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise ValueError(
            f"it makes {theirs.tolist()} of the colour {colour}, which no mean and std of each channel do."
        )
