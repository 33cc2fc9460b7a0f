"""The noisy images that experts are made for, and the schedulers whose timesteps tell how noisy they are."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...guidance.errors import UnsupportedPipelineError
from ...guidance.gradient import signal_share
from ...guidance.levels import Level
from ...guidance.noise import noise_algebra

NEAR = 0.05
"""Difference of two shares of the signal at which they are still those of one level of noise."""


def share_at(scheduler: Any, t: torch.Tensor) -> torch.Tensor:
    """The signal's share of the variance of what `noised` makes at timesteps `t`."""
    powers = _powers(scheduler)
    if powers is not None:
        return powers.to(t.device)[t.long()].float()
    sigma = t.float() / scheduler.config.num_train_timesteps
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def _powers(scheduler: Any) -> torch.Tensor | None:
    """alpha-bar at each timestep; `None` on straight paths, which some schedulers with a beta schedule take too."""
    return None if scheduler.config.get("use_flow_sigmas") else getattr(scheduler, "alphas_cumprod", None)


def noised(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`x_t` at unit variance: on the variance-preserving path, or on the straight one brought to that variance."""
    share = share_at(scheduler, t).to(x0).view(-1, *[1] * (x0.ndim - 1))
    return share.sqrt() * x0 + (1 - share).sqrt() * noise


def check_timesteps(scheduler: Any, count: int | None = None) -> None:
    """Refuse a scheduler whose timesteps do not tell the noise that experts were made for.

    Args:
        scheduler: of the pipeline.
        count: of timesteps that the experts were trained on; `None` before that.

    Raises:
        UnsupportedPipelineError: its timesteps, from 0 to another number or counted otherwise, mean other noise.
    """
    kind = type(scheduler).__name__
    own = scheduler.config.get("num_train_timesteps")
    if count is not None and own != count:
        raise UnsupportedPipelineError(
            f"ppap: the experts' ranges are parts of {count} timesteps, but {kind} has num_train_timesteps={own}; give "
            "the pipeline the scheduler that it had in their training."
        )
    if "sigma_data" in scheduler.config:
        raise _refusal(kind)
    probe = copy.deepcopy(scheduler)
    try:
        probe.set_timesteps(10)
    except (TypeError, ValueError):  # it wants more than the pipeline's call alone can give; its first step will tell
        return
    algebra = noise_algebra(probe)
    for index, t in enumerate(probe.timesteps):
        check_level(scheduler, float(t), algebra.level(t, index=index))


def check_level(scheduler: Any, timestep: float, level: Level) -> None:
    """Refuse a timestep at which there is other noise than experts saw at it in their training."""
    highest = scheduler.config.num_train_timesteps
    inside = 0 <= timestep <= highest
    at = torch.tensor([timestep if _powers(scheduler) is None else min(timestep, highest - 1)])
    if not inside or abs(float(share_at(scheduler, at)) - signal_share(level)) > NEAR:
        raise _refusal(type(scheduler).__name__)


def _refusal(kind: str) -> UnsupportedPipelineError:
    return UnsupportedPipelineError(
        f"ppap: {kind}, as it is configured, has no timesteps that noise ranges could be told by; give the pipeline a "
        "scheduler with timesteps from 0 to num_train_timesteps, such as DDIMScheduler or "
        "FlowMatchEulerDiscreteScheduler."
    )
