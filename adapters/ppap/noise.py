"""The noisy images that experts are made for."""

from __future__ import annotations

from typing import Any

import torch


def noised(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`x_t` at unit variance: on the variance-preserving path, or on the straight one brought to that variance."""
    powers = getattr(scheduler, "alphas_cumprod", None)
    if powers is not None:
        power = powers.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
        return power.sqrt() * x0 + (1 - power).sqrt() * noise
    sigma = (t.to(x0) / scheduler.config.num_train_timesteps).view(-1, *[1] * (x0.ndim - 1))
    return ((1 - sigma) * x0 + sigma * noise) / torch.hypot(1 - sigma, sigma)
