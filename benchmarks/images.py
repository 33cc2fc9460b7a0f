"""Images as bytes: what a file would hold, and what generated and real images are compared as."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image

from trimtab.pipelines.fashion.data import CLASS_NAMES, load


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in -1..1 as the bytes that a file would hold."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: torch.Tensor) -> torch.Tensor:
    """Bytes as images in -1..1."""
    return images.float().div(127.5).sub(1)


def real_images(count: int, data: str | None) -> torch.Tensor:
    """The first training images of each class, in the order of generated ones, as bytes."""
    images, labels = load("train", data)
    per_class = -(-count // len(CLASS_NAMES))
    rows = torch.stack([(labels == label).nonzero().flatten()[:per_class] for label in range(len(CLASS_NAMES))], 1)
    return to_bytes(images[rows.flatten()[:count]])


def light(image: Image.Image) -> Image.Image:
    """The image in 256 colours, since a page waits for its pictures."""
    return image.quantize(256)


def contact_sheet(images: Mapping[str, torch.Tensor], columns: int) -> Image.Image:
    """The first images `[n, 1, height, width]` (bytes) of each set, one line a set, enlarged twice."""
    lines = [torch.cat(list(pixels[:columns, 0]), dim=1) for pixels in images.values()]
    sheet = Image.fromarray(torch.cat(lines).numpy())
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)
