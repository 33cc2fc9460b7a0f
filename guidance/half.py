"""Gradients through float16, where what is smaller than 6e-8 is lost: they go through at a size of about one.

A vector-Jacobian product is linear in its vector, and that of an image depends on that image alone. So each image's
gradient is divided by a power of two, which rounds nothing, before it enters the half-precision part, and multiplied
by it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def size_of(gradient: torch.Tensor) -> torch.Tensor:
    """For each image of `[batch, ...]` a power of two not below its largest number, `[batch, 1, ...]`; 1 for zeros."""
    largest = gradient.detach().float().abs().flatten(1).amax(1)
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    usable = (largest > 0) & torch.isfinite(largest) & torch.isfinite(1 / size)
    return torch.where(usable, size, 1.0).view(-1, *[1] * (gradient.ndim - 1))


def carried(given: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute(given)` in float32, through which gradients go at a size of about one.

    Args:
        given: `[batch, ...]`, float32.
        compute: returns `[batch, ...]`, each image from its own.
    """
    if not (given.requires_grad and torch.is_grad_enabled()):
        return compute(given).float()
    sizes: list[torch.Tensor] = []

    def enter(gradient: torch.Tensor) -> torch.Tensor:
        sizes[:] = [size_of(gradient)]
        return gradient / sizes[0]

    def leave(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * sizes[0].view(-1, *[1] * (gradient.ndim - 1))

    inside = given * 1
    inside.register_hook(leave)
    result = compute(inside).float()
    result.register_hook(enter)
    return result
