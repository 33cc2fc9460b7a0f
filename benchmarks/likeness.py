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


def edge_f1(found: torch.Tensor, wanted: torch.Tensor, threshold: float = 0.2) -> torch.Tensor:
    """F1 of edges `[n, 1, h, w]` in 0..1 against wanted ones, `[n]`: an edge counts if one lies within a pixel of it.

    With precision P, the share of found pixels beside a wanted one, and recall R, that of wanted pixels beside a found
    one, `2 P R / (P + R)`. Pixels above the threshold are edges.
    """
    marks = [(edges > threshold).float() for edges in (found, wanted)]
    near = [F.max_pool2d(one, 3, stride=1, padding=1) for one in marks]
    precision, recall = (
        (one * other).flatten(1).sum(1) / one.flatten(1).sum(1).clamp_min(1)
        for one, other in zip(marks, reversed(near), strict=True)
    )
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)
