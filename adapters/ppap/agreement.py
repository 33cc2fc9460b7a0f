"""How much of what the teacher sees in clean images the experts see in noisy ones, over the range of noise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...guidance.images import Preprocessing
from ...guidance.networks import tensor_of
from .experts import Experts
from .noise import noised


@torch.no_grad()
def agreement(
    experts: Experts, teacher: nn.Module, images: torch.Tensor, scheduler: Any, preprocessing: Preprocessing,
    kind: str = "classification", bins: int = 10, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each of `bins` equal ranges of timesteps, from little noise to much.

    Args:
        experts, teacher: wherever a training left them.
        images: clean `[n, ...]` in -1..1.
        kind: 'depth' compares maps; the others the classes with the highest logit.

    Returns:
        rows of `timesteps` (low, high), `untaught` and `experts`: what the teacher itself, and the experts, make of
        x_t against what the teacher makes of x_0; the share of equal classes, or for depth the mean squared difference.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images.to(next(experts.parameters()))
    teacher = teacher.to(images.device)
    wanted = tensor_of(teacher(preprocessing(images))).float()
    rows = []
    edges = [experts.timesteps * index // bins for index in range(bins + 1)]
    for low, high in pairwise(edges):
        t = torch.randint(low, high, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        x_t = preprocessing(noised(scheduler, images, noise.to(images), t.to(images.device)))
        found = {"untaught": tensor_of(teacher(x_t)).float(), "experts": experts(x_t, t).float()}
        compared = {name: _compared(value, wanted, kind) for name, value in found.items()}
        rows.append({"timesteps": [low, high], **compared})
    return rows


def _compared(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> float:
    if kind == "depth":
        return (found - wanted).square().mean().item()
    return (found.argmax(1) == wanted.argmax(1)).float().mean().item()
