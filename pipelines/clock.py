"""Where a run stands: the noise level of the denoiser call that is about to happen, and of each `scheduler.step`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..guidance.errors import ParameterError, UnsupportedSchedulerError
from ..guidance.noise import Level, NoiseAlgebra, noise_algebra
from ..guidance.run import CLEAN, Step
from ..guidance.schedulers import REFUSED

UNKNOWN_LEVEL = Level(math.nan, math.nan)
"""The level of a scheduler that is not understood, where no guidance needs it."""


class Clock:
    """Follows one scheduler through one run.

    Two calls of `scheduler.step` at one noise level (Heun's method) are one step with two evaluations.

    Args:
        scheduler: the scheduler after `set_timesteps`.
        algebra: its noise algebra, or `None` where it has none and nothing needs it.
        timestep: the timestep of the first denoiser call if it is known; only trusted if it is one of the schedule.

    Attributes:
        input_scale: output over input of `scale_model_input` in this step, if it was called.
        unscaled: what it was given, `[rows, ...]`.
        scheduler: which one; a copy that the pipeline lets go of must not give its place to another.
    """

    def __init__(self, scheduler: Any, algebra: NoiseAlgebra | None, timestep: float | None = None) -> None:
        self.algebra = algebra
        self.scheduler = scheduler
        self.timesteps = [float(t) for t in scheduler.timesteps]
        begin = getattr(scheduler, "begin_index", None)
        if begin is None and timestep in self.timesteps:
            begin = self.timesteps.index(timestep)
        self.begin = begin or 0
        self.calls = 0
        self.input_scale: float | None = None
        self.unscaled: torch.Tensor | None = None

    @property
    def position(self) -> int:
        """Index in `scheduler.timesteps` of the next `scheduler.step` call."""
        return min(self.begin + self.calls, len(self.timesteps) - 1)

    def locate(self, timestep: Any) -> None:
        """Correct the position by the timestep that `scheduler.step` is called with."""
        value = float(torch.as_tensor(timestep).flatten()[0])
        if self.timesteps[self.position] != value and value in self.timesteps:
            later = [index for index, t in enumerate(self.timesteps) if t == value and index >= self.position]
            if later:
                self.begin = later[0] - self.calls
            else:  # the schedule has begun anew, as for the next stretch of a video
                self.begin, self.calls = self.timesteps.index(value), 0

    def step(self) -> Step:
        """The step at the present position, without a sample."""
        return self._step(self.position)

    def steps(self) -> list[Step]:
        """One step for each `scheduler.step` call of the run, from its beginning."""
        # A trailing timestep only marks where the last step ends.
        return [self._step(position) for position in range(self.begin, len(self._noise_steps))]

    def _step(self, position: int) -> Step:
        first, last = self._noise_steps[self.begin], self._noise_steps[-1]
        index = self._noise_steps[min(position, len(self._noise_steps) - 1)] - first
        before = position - self._noise_steps[: position + 1].index(first + index)
        return Step(
            index, last - first + 1, self.timesteps[position], self._level(position), algebra=self.algebra,
            evaluation=before, next_level=self._next_level(position),
        )  # fmt: skip

    @cached_property
    def _noise_steps(self) -> list[int]:
        """The noise level of each call; for an unknown scheduler, neighbours of equal timestep are one level."""
        if self.algebra is not None:
            return self.algebra.noise_steps()
        changes = [a != b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)]
        return list(accumulate(changes, initial=0))

    def _next_level(self, position: int) -> Level:
        if self.algebra is None:
            return UNKNOWN_LEVEL
        if position + 1 >= min(len(self.timesteps), len(self._noise_steps)):
            return CLEAN
        return self.algebra.level(self.timesteps[position + 1], index=position + 1)

    def _level(self, position: int) -> Level:
        if self.algebra is None:
            return UNKNOWN_LEVEL
        scale = self.input_scale if position == self.position else None
        return self.algebra.level(self.timesteps[position], index=position, input_scale=scale)


class Clocks:
    """The clocks of one run, one for each scheduler that the pipeline steps.

    Args:
        schedulers: the pipeline's; it may step copies of them as well.
        needing: guidances that need noise levels.

    Raises:
        UnsupportedSchedulerError: see `algebra_or_none`.
    """

    def __init__(self, schedulers: Sequence[Any], needing: Sequence[str]) -> None:
        self.schedulers = schedulers
        self._algebras = {id(scheduler): algebra_or_none(scheduler, needing) for scheduler in schedulers}
        self._clocks: dict[int, Clock] = {}
        self._consumers: dict[int, Any] = {}

    def pair(self, module: nn.Module, scheduler: Any) -> None:
        """From now on it is known that this scheduler consumes what this denoiser returns."""
        self._consumers[id(module)] = scheduler

    def at_step(self, scheduler: Any, timestep: Any) -> Clock:
        """The clock of a scheduler whose `step` is called with this timestep."""
        clock = self._clock(scheduler, float(torch.as_tensor(timestep).flatten()[0]))
        assert clock is not None
        clock.locate(timestep)
        return clock

    def at_call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
        """The step that a denoiser call belongs to, if the scheduler that will consume it is known."""
        scheduler = self.consumer(module)
        if scheduler is None:
            return None
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        timestep = float(given.flatten()[0]) if isinstance(given, torch.Tensor) and given.numel() else None
        clock = self._clock(scheduler, timestep)
        return clock.step() if clock is not None else None

    def note_scaled(self, scheduler: Any, given: torch.Tensor, returned: torch.Tensor) -> None:
        """Note what `scale_model_input` made of its input in this step."""
        clock = self._clock(scheduler)
        size = float(given.float().norm()) if clock is not None else 0.0
        if clock is not None and size > 0:
            clock.input_scale, clock.unscaled = float(returned.float().norm()) / size, given

    def unscaled(self, module: nn.Module) -> torch.Tensor | None:
        """What `scale_model_input` was given before this denoiser's call, if it was called."""
        clock = self._clocks.get(id(self.consumer(module)))
        return clock.unscaled if clock is not None else None

    def forget_unscaled(self, module: nn.Module) -> None:
        """Let go of it, as the pipeline has, where nothing needs it in this denoiser's call."""
        clock = self._clocks.get(id(self.consumer(module)))
        if clock is not None:
            clock.unscaled = None

    def consumer(self, module: nn.Module) -> Any:
        """The scheduler that consumes what a denoiser returns, if that is known."""
        return self._consumers.get(id(module), self.schedulers[0] if len(self.schedulers) == 1 else None)

    def _clock(self, scheduler: Any, timestep: float | None = None) -> Clock | None:
        """The clock of a scheduler; `None` before it has timesteps."""
        if id(scheduler) not in self._clocks:
            if getattr(scheduler, "timesteps", None) is None or not len(scheduler.timesteps):
                return None
            algebra = self._algebras.get(id(scheduler), next(iter(self._algebras.values())))
            self._clocks[id(scheduler)] = Clock(scheduler, algebra, timestep)
        return self._clocks[id(scheduler)]


def algebra_or_none(scheduler: Any, needed_by: Sequence[str]) -> NoiseAlgebra | None:
    """The scheduler's noise algebra; without one, an error if any guidance needs it.

    Raises:
        UnsupportedSchedulerError: naming the scheduler, the guidances, and what works instead.
    """
    try:
        return noise_algebra(scheduler)
    except UnsupportedSchedulerError as error:
        if needed_by:
            names = " and ".join(needed_by)
            raise UnsupportedSchedulerError(
                f"{names}: the noise level is needed (for a window in sigma, a loss or an edit of the clean estimate), "
                f"but {error}"
            ) from None
        return None


def planned_clock(scheduler: Any, algebra: NoiseAlgebra | None, **schedule: Any) -> Clock:
    """A clock for a run that has not begun; `scheduler` must be a copy, for its timesteps are set.

    Args:
        **schedule: `num_inference_steps`, or the `timesteps` or `sigmas` that a call is given instead.

    Raises:
        ParameterError: the scheduler refuses these.
        UnsupportedSchedulerError: it asks for more, which only the pipeline knows.
    """
    refusals = []
    for shift in ({}, {"mu": 1.0}):  # a scheduler with dynamic shifting asks for mu, which only a call can tell
        try:
            scheduler.set_timesteps(**schedule, **shift)
            return Clock(scheduler, algebra)
        except (ValueError, TypeError) as error:
            refusals.append(error)
        except LookupError as error:  # the stage of a pyramid, for each of which the pipeline sets the steps anew
            name = type(scheduler).__name__
            reason = REFUSED.get(name, f"its steps do not follow from {', '.join(schedule)} alone")
            raise UnsupportedSchedulerError(f"{name}: {reason.rstrip('.')}. So no guidance can be planned.") from error
    given = ", ".join(f"{name}={value!r}" for name, value in schedule.items())
    raise ParameterError(f"{type(scheduler).__name__}: {given}: {refusals[0]}")
