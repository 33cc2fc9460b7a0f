"""What is drawn for a batch of training: the shape of its images, and how subjects are turned."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

MIRRORED, TURN = 0.7, 20.0
"""The probability with which a subject is mirrored, and the most degrees by which it is turned, as published."""


def drawn_shape(
    aspects: torch.Tensor, sides: tuple[int, int], widest: float, patch: int, generator: torch.Generator
) -> tuple[float, tuple[int, int]]:
    """The aspect ratio of a batch, height by width, and its size in pixels, rounded to patches.

    Args:
        aspects: those of its images; one of them is taken, so that a single image stays whole.
        sides: between which the longest side is drawn.
        widest: the largest aspect ratio; a wider or higher one is brought to it.
        patch: pixels that a token's side covers.
    """
    longest = sides[0] + chance(generator) * (sides[1] - sides[0])
    aspect = min(max(aspects[int(chance(generator) * len(aspects))].item(), 1 / widest), widest)
    parts = (min(1.0, aspect), min(1.0, 1 / aspect))
    height, width = (max(patch, round(longest * part / patch) * patch) for part in parts)
    return aspect, (height, width)


def turned(subjects: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squares `[batch, channels, size, size]`, each mirrored and turned at random; what comes in is 0, a mid grey."""
    count, device = len(subjects), subjects.device
    drawn = torch.rand(2, count, generator=generator, device=generator.device).to(device)
    mirror = 1 - 2 * (drawn[0] < MIRRORED).float()
    angle = math.radians(TURN) * (2 * drawn[1] - 1)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros(count, device=device)
    rows = [torch.stack([mirror * cos, -mirror * sin, none], dim=1), torch.stack([sin, cos, none], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(subjects.shape), align_corners=False)
    return F.grid_sample(subjects, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def chance(generator: torch.Generator) -> float:
    """A number between 0 and 1."""
    return float(torch.rand(1, generator=generator, device=generator.device))
