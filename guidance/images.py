"""Images for and from other networks: what they expect, and how a parameter gives one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from .errors import ParameterError

Given = Image.Image | str | torch.Tensor | tuple[Image.Image | str | torch.Tensor, ...] | None
"""What `as_images` takes, as the type of a parameter that need not be given; a recipe can hold it."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image that is in -1..1; every step is differentiable.

    Args:
        size: height and width, to which images are resized, or a function of theirs; `None` leaves them.
        unit_range: whether the network's values, before mean and standard deviation, are in 0..1 and not in -1..1.
        mean, std: by channel of the image, of those values; `None` for none.
        channels: a grey image is repeated to so many; `None` leaves it.
        reverse: whether the last channel comes first, as where blue does.
    """

    size: tuple[int, int] | Callable[[int, int], tuple[int, int]] | None = None
    unit_range: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    reverse: bool = False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[batch, channels, height, width]` in -1..1 as the network wants them."""
        if self.channels is not None and images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        height, width = images.shape[-2:]
        size = self.size(height, width) if callable(self.size) else self.size
        if size is not None and (height, width) != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.unit_range:
            images = images / 2 + 0.5
        if self.mean is not None:
            images = images - images.new_tensor(self.mean).view(1, -1, 1, 1)
        if self.std is not None:
            images = images / images.new_tensor(self.std).view(1, -1, 1, 1)
        return images.flip(1) if self.reverse else images


def for_rows(held: torch.Tensor, rows: int) -> torch.Tensor:
    """What is held for each image, `[n, ...]`, for so many rows: each stands for `rows / n` that follow one another."""
    return held if len(held) == rows else held.repeat_interleave(rows // len(held), dim=0)


def as_images(value: Any, plugin: str, name: str, mode: str | None = None) -> torch.Tensor:
    """The images that a parameter gives, `[batch, channels, height, width]` in -1..1.

    Args:
        value: a tensor in -1..1, `[channels, height, width]` or with a batch; a PIL image; the path of one; a list.
        plugin, name: for messages.
        mode: of PIL images: `"RGB"`, `"L"` for grey, or `None` for what they are.

    Raises:
        ParameterError: it is something else, or a file that is no image.
    """
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        raise ParameterError(
            f"{plugin}: {name} is a tensor of {value.dtype}; needed: numbers in -1..1, in floating point."
        )
    if isinstance(value, torch.Tensor) and value.ndim in (3, 4):
        if not value.numel():
            raise ParameterError(f"{plugin}: {name} is an empty tensor {list(value.shape)}; give at least one image.")
        return value.float() if value.ndim == 4 else value.float()[None]
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        images = [as_images(item, plugin, name, mode) for item in value]
        if len(shapes := list(dict.fromkeys(f"{list(image.shape[1:])}" for image in images))) > 1:
            raise ParameterError(
                f"{plugin}: {name} holds images of {' and '.join(shapes)} (channels, height, width); needed: one size "
                "and as many channels in all."
            )
        return torch.cat(images)
    if isinstance(value, str):
        try:
            value = Image.open(value)
        except (OSError, UnidentifiedImageError) as error:
            raise ParameterError(f"{plugin}: {name}={value!r} cannot be read as an image: {error}") from None
    if isinstance(value, Image.Image):
        mode = mode or ("L" if value.mode in ("1", "L") else "RGB")
        pixels = torch.from_numpy(np.array(value.convert(mode))).float().div(127.5).sub(1)
        return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
    raise ParameterError(
        f"{plugin}: {name} is a {type(value).__name__}; needed: a PIL image, the path of one, a tensor "
        "[channels, height, width] in -1..1, or a list of these."
    )
