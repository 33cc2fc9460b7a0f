"""How like its original a restored image is."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def psnr(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of images in -1..1, in dB, `[n]`."""
    return 10 * torch.log10(4 / (images - wanted).square().flatten(1).mean(1).clamp_min(1e-12))


def ssim(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Structural similarity `[n]` (Wang et al., 2004), Gaussian window of 11 pixels and width 1.5, range 2."""
    x = torch.arange(11.0) - 5
    row = torch.exp(-x.square() / (2 * 1.5**2))
    window = (row[:, None] * row / row.sum() ** 2)[None, None]

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        return F.conv2d(tensor, window)

    a, b = mean(images), mean(wanted)
    spread_a, spread_b = mean(images**2) - a**2, mean(wanted**2) - b**2
    joint = mean(images * wanted) - a * b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return ((2 * a * b + c1) * (2 * joint + c2) / ((a**2 + b**2 + c1) * (spread_a + spread_b + c2))).flatten(1).mean(1)
