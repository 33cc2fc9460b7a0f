"""The noisy images that experts are made for."""

from __future__ import annotations

from typing import Any

import torch

from ...guidance.errors import UnsupportedPipelineError


def check_timesteps(scheduler: Any) -> None:
    """Refuse a scheduler whose timesteps do not run from 0 to their number, which experts' ranges are parts of.

    Raises:
        UnsupportedPipelineError: it is one of EDM.
    """
    if "sigma_data" in scheduler.config:
        raise UnsupportedPipelineError(
            f"ppap: {type(scheduler).__name__} has no timesteps that noise ranges could be told by; give the pipeline "
            "a scheduler with timesteps from 0 to num_train_timesteps, such as DDIMScheduler or "
            "FlowMatchEulerDiscreteScheduler."
        )


def noised(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`x_t` at unit variance: on the variance-preserving path, or on the straight one brought to that variance."""
    powers = getattr(scheduler, "alphas_cumprod", None)
    if powers is not None:
        power = powers.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
        return power.sqrt() * x0 + (1 - power).sqrt() * noise
    sigma = (t.to(x0) / scheduler.config.num_train_timesteps).view(-1, *[1] * (x0.ndim - 1))
    return ((1 - sigma) * x0 + sigma * noise) / torch.hypot(1 - sigma, sigma)
