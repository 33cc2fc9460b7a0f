"""Closed-form denoisers, and a sampling loop that drives any Diffusers scheduler with them.

For data `N(mean, diag(variance))` and `x_t = alpha x_0 + sigma n` the clean estimate and the solution of the
probability-flow ODE are known exactly, so a scheduler and the algebra around it can be judged without any network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.guidance.noise import Level, noise_algebra

SHAPE = (1, 4, 32, 32)

Visit = Callable[[int, torch.Tensor, torch.Tensor, Level], torch.Tensor]
"""Takes a call's number, its sample, the exact prediction and the level; returns the prediction to use."""


def image(seed: int) -> torch.Tensor:
    """A clean sample within [-0.9, 0.9], so that clipping to [-1, 1] leaves it alone."""
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def noise(seed: int) -> torch.Tensor:
    """Standard normal noise."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def prepared(scheduler: Any, steps: int = 10) -> Any:
    """The scheduler itself, ready to step."""
    scheduler.set_timesteps(steps)
    return scheduler


@dataclass(frozen=True)
class Gaussian:
    """Data `N(mean, diag(variance))`; `variance = 0` is a single image, whose clean estimate is always itself."""

    mean: torch.Tensor
    variance: torch.Tensor | float = 0.0

    def x0(self, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """E[x_0 | x_t]."""
        gain = level.alpha * self.variance / (level.sigma**2 + level.alpha**2 * self.variance)
        return self.mean + gain * (x_t - level.alpha * self.mean)

    def solution(self, x_t: torch.Tensor, level: Level, end: Level) -> torch.Tensor:
        """Where the probability-flow ODE carries `x_t` from one level to another."""
        spread = (end.sigma**2 + end.alpha**2 * self.variance) / (level.sigma**2 + level.alpha**2 * self.variance)
        return end.alpha * self.mean + spread**0.5 * (x_t - level.alpha * self.mean)


def predict(kind: str, x0: torch.Tensor, x_t: torch.Tensor, level: Level, sigma_data: float = 1.0) -> torch.Tensor:
    """What an exact network of this parametrisation returns, from its definition in the paper that introduced it."""
    alpha, sigma = level.alpha, level.sigma
    n = (x_t - alpha * x0) / sigma
    if kind == "epsilon":
        return n
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return (alpha * n - sigma * x0) / (alpha**2 + sigma**2) ** 0.5
    if kind == "flow_prediction":
        return n - x0
    if kind == "reversed_flow_prediction":
        return x0 - n
    if kind == "trigflow":
        return alpha * sigma_data * n - sigma / sigma_data * x0
    skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    if kind in ("edm_epsilon", "edm_v_prediction"):
        return (x0 - skip * x_t) / (out if kind == "edm_epsilon" else -out)
    if kind == "consistency":
        skip = sigma_data**2 / ((sigma - 0.002) ** 2 + sigma_data**2)
        out = (sigma - 0.002) * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        return (x0 - skip * x_t) / out
    raise ValueError(kind)


def advance(scheduler: Any, call: int, prediction: torch.Tensor, x_t: torch.Tensor, memory: dict[str, Any]) -> Any:
    """One call of `step`, with the further arguments that the scheduler's own pipeline would give it."""
    timestep = scheduler.timesteps[call]
    name = type(scheduler).__name__
    parameters = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": memory["generator"]} if "generator" in parameters else {}
    if "prev_timestep" in parameters:
        extra["prev_timestep"] = scheduler.timesteps[call + 1] if call + 1 < len(scheduler.timesteps) else None
    if name == "RePaintScheduler":
        extra |= {"original_image": x_t, "mask": torch.zeros_like(x_t)}
    if name == "CogVideoXDPMScheduler":
        extra |= {
            "old_pred_original_sample": memory.get("clean"),
            "timestep_back": scheduler.timesteps[call - 1] if call else None,
        }
    if name == "DDPMWuerstchenScheduler":
        timestep = timestep.expand(len(x_t))
    result = scheduler.step(model_output=prediction, timestep=timestep, sample=x_t, **extra)
    if isinstance(result, tuple):
        memory["clean"] = result[1]
        return result[0]
    memory["result"] = result
    return result.prev_sample


def sample(
    scheduler: Any,
    kind: str,
    data: Gaussian,
    start: torch.Tensor,
    first: int = 0,
    visit: Visit | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Sample with the exact denoiser of `data`, from `alpha mean + sigma start` at call number `first` on."""
    algebra = noise_algebra(scheduler)
    if first:
        scheduler.set_begin_index(first)
    levels = algebra.levels()
    memory: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    x_t = levels[first].alpha * data.mean + levels[first].sigma * start
    for call in range(first, len(levels)):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x_t, scheduler.timesteps[call])
        level = algebra.level(scheduler.timesteps[call])
        prediction = predict(kind, data.x0(x_t, level), x_t, level, float(getattr(scheduler.config, "sigma_data", 1.0)))
        if visit is not None:
            prediction = visit(call, x_t, prediction, level)
        x_t = advance(scheduler, call, prediction, x_t, memory)
    return x_t
