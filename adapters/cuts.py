"""Which part of its images a batch of training sees: drawn anew for each, and the same of both images of a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .pairs import crop_and_resize

Cut = Callable[[torch.Tensor], torch.Tensor]
"""From images `[batch, 3, side, side]` to their parts `[batch, 3, height, width]`; it cuts both images of a pair."""


@dataclass(frozen=True)
class RandomParts:
    """One part of each image, wherever it was drawn.

    Args:
        size: height and width that the parts are scaled to.
        boxes: `[batch, 4]`: top, left, height and width of each, as shares of its image.
        mirrored: `[batch]`, whether it is mirrored.
    """

    size: tuple[int, int]
    boxes: torch.Tensor
    mirrored: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The parts of images that were squashed to squares."""
        parts = []
        for image, box, mirrored in zip(images, self.boxes.tolist(), self.mirrored.tolist(), strict=True):
            top, left, height, width = (round(image.shape[1] * share) for share in box)
            part = image[None, :, top : top + max(1, height), left : left + max(1, width)]
            part = F.interpolate(part, self.size, mode="bilinear", antialias=True)
            parts.append(part.flip(-1) if mirrored else part)
        return torch.cat(parts)


def random_parts(
    aspects: torch.Tensor, size: tuple[int, int], smallest: float, mirrored: float, generator: torch.Generator
) -> RandomParts:
    """Parts of one shape, at random places of images of any shape.

    Args:
        aspects: `[batch]`, height by width of each image.
        size: height and width of the parts, in pixels.
        smallest: the least area of a part, as a share of the largest part of that shape.
        mirrored: the share of images that are mirrored.
        generator: of all that is drawn.
    """
    shape = size[0] / size[1]
    area, down, across, mirror = torch.rand(4, len(aspects), generator=generator, device=generator.device).cpu()
    scale = (smallest + (1 - smallest) * area).sqrt()
    height, width = (scale * part.clamp(max=1.0) for part in (shape / aspects.cpu(), aspects.cpu() / shape))
    boxes = torch.stack([down * (1 - height), across * (1 - width), height, width], dim=1)
    return RandomParts(size, boxes, mirror < mirrored)


def middle_parts(size: tuple[int, int], mirrored: float, generator: torch.Generator) -> Cut:
    """The largest part in the middle of each image, which `Pairs` cut to a square; a batch is mirrored as one."""
    flip = bool(torch.rand(1, generator=generator, device=generator.device) < mirrored)

    def cut(images: torch.Tensor) -> torch.Tensor:
        parts = crop_and_resize(images, *size)
        return parts.flip(-1) if flip else parts

    return cut


def side_to_cut_from(size: int, aspect: float, smallest: float) -> int:
    """The side of whole images squashed to squares of which no part of a square one has to be enlarged.

    Args:
        size: root of the area of the parts, in pixels.
        aspect: their largest aspect ratio.
        smallest: see `random_parts`.
    """
    return round(size * (aspect / smallest) ** 0.5)
