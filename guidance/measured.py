"""What was measured of an image, as the plug-in `steered` is given it, and whether it fits a run."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from .errors import ParameterError
from .images import as_images

BEYOND = 2.0
"""Values in -1..1 that resizing or noise has carried further stay below it; those of bytes do not."""


def measurement(image: Any, grey: bool, label: str) -> torch.Tensor:
    """The images that a parameter `image` gives, `[n, channels, height, width]` in -1..1, in grey if wished.

    Raises:
        ParameterError: they are none, or their values are those of bytes.
    """
    found = as_images(image, label, "image", "L" if grey else None)
    least, most = found.aminmax()
    if max(-least, most) > BEYOND:
        raise ParameterError(
            f"{label}: image holds values from {least:g} to {most:g}; needed: -1 to 1, so of bytes image / 127.5 - 1."
        )
    return found


def known_pixels(mask: Any, label: str) -> torch.Tensor:
    """Where a mask `[n, 1, height, width]` is not white: pictures by black, tensors by less than a half."""
    masks = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    first = masks[0]
    given = [one.float() if isinstance(one, torch.Tensor) else one for one in masks]
    given = [one[None] if isinstance(one, torch.Tensor) and one.ndim == 2 else one for one in given]
    found = as_images(given, label, "mask", "L")
    return found[:, :1] <= (0.5 if isinstance(first, torch.Tensor) else 0.0)


def check_sizes(known: torch.Tensor, measured: torch.Tensor, label: str) -> None:
    """Refuse a mask of another size than the image."""
    if known.shape[-2:] != measured.shape[-2:]:
        raise ParameterError(f"{label}: mask is {_size(known)}, but image is {_size(measured)}; needed: one size.")


def check_numbers(given: dict[str, torch.Tensor], rows: int, label: str) -> None:
    """Refuse another number of images, by parameter, than one or one for each row."""
    for name, held in given.items():
        if rows % len(held):
            raise ParameterError(
                f"{label}: {name} holds {len(held)} images, but the denoiser is called with {rows} rows; give one, or "
                "one for each image that is made."
            )


def check_task(
    task: str, given: torch.Tensor, masked: bool, blank: torch.Tensor, arguments: Container[str], label: str
) -> None:
    """Refuse what is no measurement, by the task of this name, of the images that a run makes.

    Args:
        task: as `steered` names it.
        given: what was measured.
        masked: whether a mask of the same size came with it.
        blank: an image of the run.
        arguments: names of what the pipeline's call takes.
        label: for messages.
    """
    if blank.ndim == 5:
        raise ParameterError(
            f"{label}: task={task!r} measures images, but the pipeline makes videos of {blank.shape[2]} frames; give "
            "an operator that takes [batch, channels, frames, height, width]."
        )
    channels, height, width = blank.shape[1:]
    if task == "colourisation" and channels != 3:
        raise ParameterError(
            f"{label}: task='colourisation' needs a pipeline of colour images; this one's have {channels} channel."
        )
    if task != "colourisation" and given.shape[1] != channels:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        raise ParameterError(
            f"{label}: image has {given.shape[1]} channels, but the pipeline's images have {channels}; convert it: "
            f"image.convert({mode!r})."
        )
    small = task == "super_resolution"
    fits = (given.shape[-2] <= height and given.shape[-1] <= width) if small else given.shape[-2:] == blank.shape[-2:]
    if fits:
        return
    what = "image and mask are" if masked and not small else "image is"
    call = ", or call the pipeline with height={} and width={}".format(*given.shape[-2:])
    raise ParameterError(
        f"{label}: {what} {_size(given)}, but the pipeline makes {_size(blank)}; needed: "
        f"{'at most ' if small else ''}that size, such as image.resize(({width}, {height}))"
        f"{call if 'height' in arguments else ''}."
    )


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"
