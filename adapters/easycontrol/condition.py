"""A condition image as tokens: how it is laid out, where it lies, and its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.nn import functional as F

from ...guidance.errors import ParameterError

SUBJECT_OFFSET = 64
"""Rows by which a subject's positions lie below the image's first row."""


def layout(picture: Image.Image, kind: str, size: int, patch: int) -> torch.Tensor:
    """The condition as `[1, 3, size, size]` in -1 to 1.

    A spatial condition is squashed to the square; its positions undo that. A subject keeps its aspect ratio and is
    padded with grey.

    Args:
        size: side of the square, in pixels.
        patch: pixels a token's side covers.
    """
    processor = VaeImageProcessor(vae_scale_factor=patch)
    if kind == "spatial":
        return processor.preprocess(picture, height=size, width=size).float()
    scale = size / max(picture.size)
    width, height = (int(side * scale) // patch * patch for side in picture.size)
    if not width or not height:
        raise ParameterError(
            f"easycontrol: image is {picture.width} x {picture.height}; a subject's shorter side must be at least "
            f"{patch} pixels when the longer one is scaled to cond_size={size}."
        )
    pixels = processor.preprocess(picture, height=height, width=width).float()
    beside, above = (size - width) // 2, (size - height) // 2
    return F.pad(pixels, (beside, size - width - beside, above, size - height - above))


def positions(kind: str, side: int, image_ids: torch.Tensor) -> torch.Tensor:
    """Position ids `[side * side, 3]` of a condition's tokens, in float32: fractions of a token would not survive less.

    Args:
        side: tokens along each side of the condition.
        image_ids: `[tokens, 3]`: those of the image that is made begin with 0, then rows and columns from 0.
    """
    made = image_ids[:, 0] == 0  # not those of an image that Kontext is given
    rows, columns = ((image_ids[:, axis] * made).max().float() + 1 for axis in (1, 2))
    steps = torch.arange(side, device=image_ids.device, dtype=torch.float32)
    if kind == "spatial":
        down, across = steps * (rows / side), steps * (columns / side)
    else:
        down, across = steps + SUBJECT_OFFSET, steps
    ids = torch.zeros(side, side, 3, device=image_ids.device)
    ids[..., 1], ids[..., 2] = down[:, None], across[None, :]
    return ids.flatten(0, 1)


def encode(pipe: Any, stacks: Sequence[torch.Tensor], generator: Any) -> torch.Tensor:
    """Packed latents `[draws, tokens, channels]` of images stacked vertically, each `[1, 3, height, width]`.

    The autoencoder's latents are drawn, not their mean: once for each picture, or for each image from its own
    generator, so that an image does not depend on the others of its batch.

    Args:
        pipe: the pipeline, for its autoencoder.
        stacks: one for each picture.
        generator: the pipeline's, or a list with one for each image.
    """
    vae = pipe.vae
    pixels = torch.cat(list(stacks)).to(pipe._execution_device, vae.dtype)
    if isinstance(generator, list):
        found = [vae.encode(one[None]).latent_dist for one in pixels]
        latents = torch.cat([found[i * len(found) // len(generator)].sample(one) for i, one in enumerate(generator)])
    else:
        latents = vae.encode(pixels).latent_dist.sample(generator)
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)
