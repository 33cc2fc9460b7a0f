"""Noise algebra: clean estimate, noise, velocity and a scheduler's own parametrisation, for all Diffusers schedulers.

A scheduler has a level `x_t = alpha x_0 + sigma n` (`levels.py`) and a parametrisation `p = u x_0 + w n`
(`parametrisation.py`). These are two linear equations in x_0 and n, so with `D = alpha w - sigma u`

    x_0 = (w x_t - sigma p) / D        n = (alpha p - u x_t) / D        p = (w x_t - D x_0) / sigma

and a guidance written in terms of x_0 or n works on every scheduler that `schedulers.py` lists.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .errors import GuidanceRuntimeError
from .levels import Level, LevelRule, announced, position
from .parametrisation import SAMPLE, Prediction
from .schedulers import rules_of

__all__ = ["Level", "NoiseAlgebra", "noise_algebra", "split_variance"]

INPUT_SCALE_TOLERANCE = 0.01
"""Relative error that half-precision samples may cause in a measured input scale."""


def split_variance(prediction: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split what a denoiser returns into the prediction and its learned variance, if it has one.

    Args:
        prediction: `[batch, channels or 2 channels, ...]`; the channel axis is where it is twice as long as `x_t`.
        x_t: `[batch, channels, ...]`.

    Raises:
        GuidanceRuntimeError: where the shapes fit in neither way.
    """
    if prediction.shape == x_t.shape:
        return prediction, None
    if prediction.ndim == x_t.ndim:
        for axis in range(1, x_t.ndim):
            if prediction.shape[axis] == 2 * x_t.shape[axis]:
                mean, variance = prediction.chunk(2, dim=axis)
                if mean.shape == x_t.shape:
                    return mean, variance
    raise GuidanceRuntimeError(
        f"A prediction of shape {tuple(prediction.shape)} does not fit a sample of shape {tuple(x_t.shape)}; "
        "allowed: the same shape, or twice the channels (learned variance)."
    )


def _mix(a: float, x: torch.Tensor, b: float, y: torch.Tensor) -> torch.Tensor:
    """`a x + b y` in at least float32, returned in the wider of the two types."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    work = torch.promote_types(dtype, torch.float32)
    return (a * x.to(work) + b * y.to(work)).to(dtype)


class NoiseAlgebra:
    """Converts between a scheduler's predictions, clean estimates and noise; made by `noise_algebra`.

    All conversions are differentiable, compute in at least float32 with coefficients in float64, and return the wider
    dtype of their arguments. A prediction may carry a learned variance in a second half of its channels.

    Attributes:
        scheduler: the scheduler, which is only ever read.
        prediction: name of its parametrisation, see `parametrisation.py`.
    """

    def __init__(self, scheduler: Any, rule: LevelRule, form: Prediction) -> None:
        self.scheduler = scheduler
        self.prediction = form.name
        self._rule = rule
        self._form = form

    def of_clean_estimates(self) -> NoiseAlgebra:
        """The same levels, for predictions that are clean estimates already."""
        return NoiseAlgebra(self.scheduler, self._rule, SAMPLE)

    def level(self, timestep: Any, *, index: int | None = None, input_scale: float | None = None) -> Level:
        """The level of the sample that a call of `step` receives.

        Args:
            timestep: that call's own `timestep`, or an entry of `scheduler.timesteps`, as number or tensor.
            index: the call's position in `scheduler.timesteps`. Without it: where the scheduler stands, `step_index`,
                else `begin_index`, else the position of `timestep`. Ignored where the timestep alone decides.
            input_scale: output over input of `scale_model_input` in this step, where it was called. It overrules the
                known rule where the two differ by more than rounding can explain, as a subclass may cause.

        Raises:
            ParameterError: where the timestep is not one of the schedule, or not one for the whole batch.
        """
        if not self._rule.indexed:
            return self._rule.level(self.scheduler, timestep)
        level = self._rule.level(self.scheduler, position(self.scheduler, timestep) if index is None else index)
        if input_scale is None or not self._rule.rescales or not 0.0 < input_scale <= 1.0:
            return level
        if abs(input_scale * math.hypot(1.0, level.sigma) - 1.0) <= INPUT_SCALE_TOLERANCE:
            return level
        return Level(1.0, math.sqrt(1.0 / input_scale**2 - 1.0))

    def levels(self) -> list[Level]:
        """The level of every call of `step` that `scheduler.timesteps` announces, whatever was stepped so far.

        Raises:
            ParameterError: before `set_timesteps`, where the scheduler has no timesteps of its own.
        """
        places = announced(self.scheduler)
        calls = range(len(places) - self._rule.trailing)
        return [self._rule.level(self.scheduler, call if self._rule.indexed else places[call]) for call in calls]

    def noise_steps(self) -> list[int]:
        """Which noise level each of these calls belongs to: `[0, 0, 1, 1, 2]` for three steps of Heun's method."""
        return [self._rule.noise_step(self.scheduler, call) for call in range(len(self.levels()))]

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """The clean estimate `[batch, channels, ...]` that a prediction stands for.

        Raises:
            GuidanceRuntimeError: where it has none, as epsilon at pure noise.
        """
        p, _ = split_variance(prediction, x_t)
        u, w = self._form.mixture(level)
        if (u, w) == (1.0, 0.0):
            return p
        determinant = self._determinant(level, "clean estimate")
        return _mix(w / determinant, x_t, -level.sigma / determinant, p)

    def epsilon(self, prediction: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """The noise `n` `[batch, channels, ...]` that a prediction stands for.

        Raises:
            GuidanceRuntimeError: where it has none, as a clean estimate of a clean sample.
        """
        p, _ = split_variance(prediction, x_t)
        u, w = self._form.mixture(level)
        if (u, w) == (0.0, 1.0):
            return p
        determinant = self._determinant(level, "noise")
        return _mix(level.alpha / determinant, p, -u / determinant, x_t)

    def velocity(self, prediction: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """`v = (alpha n - sigma x_0) / sqrt(alpha^2 + sigma^2)` `[batch, channels, ...]`, arXiv:2202.00512.

        The root is 1 on the variance-preserving path, so that v means the same at equal `ratio` on every scheduler.

        Raises:
            GuidanceRuntimeError: where the prediction has no clean estimate or no noise.
        """
        p, _ = split_variance(prediction, x_t)
        u, w = self._form.mixture(level)
        determinant = self._determinant(level, "velocity")
        norm = math.hypot(level.alpha, level.sigma)
        return _mix(norm / determinant, p, -(level.alpha * u + level.sigma * w) / (determinant * norm), x_t)

    def from_x0(
        self, x0: torch.Tensor, x_t: torch.Tensor, level: Level, prediction: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The prediction in the scheduler's own parametrisation whose clean estimate is `x0`.

        It changes noise and clean estimate together, so that x_t is still their mixture. Editing only the clean one, as
        `DDIMScheduler(clip_sample=True)` does by keeping the noise of the unclipped estimate, leaves the path that the
        denoiser knows; a scheduler that clips does so on top of what is returned here.

        Args:
            x0, x_t: `[batch, channels, ...]`.
            prediction: the denoiser's own; what is returned then has its dtype and its learned variance.

        Raises:
            GuidanceRuntimeError: where the sample is clean already (sigma = 0), so that no prediction can change it.
        """
        u, w = self._form.mixture(level)
        if (u, w) == (1.0, 0.0):
            edited = x0
        elif level.sigma == 0.0:
            raise self._undefined(level, "prediction for another clean estimate")
        else:
            determinant = level.alpha * w - level.sigma * u
            edited = _mix(w / level.sigma, x_t, -determinant / level.sigma, x0)
        if prediction is None:
            return edited
        _, variance = split_variance(prediction, x_t)
        edited = edited.to(prediction.dtype)
        if variance is None:
            return edited
        axis = next(axis for axis in range(1, x_t.ndim) if prediction.shape[axis] != x_t.shape[axis])
        return torch.cat([edited, variance], dim=axis)

    def from_epsilon(self, noise: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        """The prediction in the scheduler's own parametrisation whose noise is `noise`; the inverse of `epsilon`.

        Args:
            noise, x_t: `[batch, channels, ...]`.

        Raises:
            GuidanceRuntimeError: where the sample is pure noise (alpha = 0), which leaves the noise no choice.
        """
        u, w = self._form.mixture(level)
        if (u, w) == (0.0, 1.0):
            return noise
        if level.alpha == 0.0:
            raise self._undefined(level, "prediction for another noise")
        determinant = level.alpha * w - level.sigma * u
        return _mix(determinant / level.alpha, noise, u / level.alpha, x_t)

    def _determinant(self, level: Level, wanted: str) -> float:
        u, w = self._form.mixture(level)
        determinant = level.alpha * w - level.sigma * u
        if determinant == 0.0:
            raise self._undefined(level, wanted)
        return determinant

    def _undefined(self, level: Level, wanted: str) -> GuidanceRuntimeError:
        remedy = "sigma_min above 0" if level.sigma == 0.0 else "a finite sigma_max, or a start above 0,"
        return GuidanceRuntimeError(
            f"{type(self.scheduler).__name__}: at alpha={level.alpha:g}, sigma={level.sigma:g} a {self.prediction} "
            f"prediction has no {wanted}; give the guidance {remedy} to leave this level out."
        )


def noise_algebra(scheduler: Any) -> NoiseAlgebra:
    """The noise algebra of a scheduler. Subclasses are taken for the Diffusers class that they are made of.

    Raises:
        UnsupportedSchedulerError: for a class or a configuration whose levels are not known, with what works instead.
    """
    rule, form = rules_of(scheduler)
    return NoiseAlgebra(scheduler, rule, form(scheduler))
