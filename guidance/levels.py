"""Noise levels: alpha and sigma of `x_t = alpha x_0 + sigma n` at every call of a Diffusers scheduler's `step`.

`n` is standard normal and `x_t` lives in the space of the sample that `scheduler.step` receives: variance
preserving for DDIM, DPM-Solver and their kin, `alpha = 1` for the k-diffusion and EDM samplers, `alpha = 1 - sigma` for
flow matching. `schedulers.py` lists which rule holds for which class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ParameterError

NO_SIGNAL = 1e-4


@dataclass(frozen=True)
class Level:
    """One noise level.

    Args:
        alpha: the weight of the clean sample, 0 for pure noise.
        sigma: the standard deviation of the noise.
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """`sigma / alpha`, the noise per signal, in which all schedulers compare; infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def holds_signal(self) -> bool:
        """Whether the sample tells of the image; some flow schedulers begin with a millionth of it in place of none."""
        return self.alpha > NO_SIGNAL * self.sigma

    def alike(self, other: Level) -> bool:
        """Whether two levels differ by rounding only; neighbours among 1,000 of DDIM's differ fifty times as much."""
        return math.isclose(self.ratio, other.ratio, rel_tol=1e-4)


def _same(scheduler: Any, call: int) -> int:
    return call


def _pairs(scheduler: Any, call: int) -> int:
    return call // 2


def _pndm_step(scheduler: Any, call: int) -> int:
    # Runge-Kutta steps take four calls each; without them the first multistep one takes two.
    warm_up = len(scheduler.prk_timesteps)
    if call < warm_up:
        return call // 4
    return warm_up // 4 + (call - warm_up) if warm_up else max(call - 1, 0)


@dataclass(frozen=True)
class LevelRule:
    """How one kind of scheduler tells its level.

    Args:
        level: takes the scheduler and the place, returns the level.
        indexed: the place is the position in `scheduler.timesteps` if true, the timestep that `step` receives if not.
        rescales: whether `scale_model_input` divides the sample by `sqrt(1 + sigma^2)`, which then tells the level too.
        noise_step: takes the scheduler and the number of a call, returns that of its noise level; they differ where
            a solver evaluates the denoiser more than once on its way from one level to the next.
        trailing: entries at the end of `scheduler.timesteps` that only mark where the last step ends.
    """

    level: Callable[[Any, Any], Level]
    indexed: bool = True
    rescales: bool = False
    noise_step: Callable[[Any, int], int] = _same
    trailing: int = 0


def scalar(timestep: Any) -> float:
    """The one number in a timestep.

    Raises:
        ParameterError: where it holds several different ones, as pipelines with a noise level per token pass them.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    values = timestep.detach().flatten()
    if values.numel() == 0 or not bool((values == values[0]).all()):
        raise ParameterError(f"timestep={timestep!r} holds several noise levels; allowed: one level for all of a step.")
    return float(values[0])


def announced(scheduler: Any) -> torch.Tensor:
    """The scheduler's timesteps.

    Raises:
        ParameterError: where it has none.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        raise ParameterError(
            f"{type(scheduler).__name__} has no timesteps yet; call scheduler.set_timesteps(num_inference_steps) first."
        )
    return torch.as_tensor(timesteps)


def position(scheduler: Any, timestep: Any) -> int:
    """Where the scheduler is in its own list of timesteps: as it says itself, otherwise where `timestep` stands.

    A timestep that stands there twice means the second place, as it does to Diffusers: a run that starts in the middle
    must not begin with the second half of a two-evaluation step.

    Raises:
        ParameterError: where the scheduler has not started and has no such timestep.
    """
    for name in ("step_index", "begin_index"):
        value = getattr(scheduler, name, None)
        if value is not None:
            return int(value)
    wanted = scalar(timestep)
    places = [place for place, value in enumerate(announced(scheduler).tolist()) if value == wanted]
    if not places:
        raise ParameterError(
            f"timestep={wanted:g} is none of {type(scheduler).__name__}'s; allowed: an entry of scheduler.timesteps, "
            "after set_timesteps()."
        )
    return places[1] if len(places) > 1 else places[0]


def variance_preserving(signal_power: Any) -> Level:
    """The level whose `alpha^2` is given, such as `alphas_cumprod[t]`."""
    power = float(signal_power)
    return Level(math.sqrt(power), math.sqrt(1.0 - power))


def _cumulative(scheduler: Any, timestep: Any) -> Level:
    return variance_preserving(scheduler.alphas_cumprod[int(scalar(timestep))])


def _inverse(scheduler: Any, timestep: Any) -> Level:
    # An inversion step is called with the level that it goes to.
    train = scheduler.config.num_train_timesteps
    start = min(int(scalar(timestep)) - train // scheduler.num_inference_steps, train - 1)
    return variance_preserving(scheduler.alphas_cumprod[start] if start >= 0 else scheduler.initial_alpha_cumprod)


def _wuerstchen(scheduler: Any, timestep: Any) -> Level:
    time = torch.tensor([scalar(timestep)])
    return variance_preserving(scheduler._alpha_cumprod(time, time.device))


def _solver(scheduler: Any, index: int) -> Level:
    sigma = float(scheduler.sigmas[index])
    if scheduler.config.use_flow_sigmas:
        return Level(1.0 - sigma, sigma)
    return Level(1.0 / math.hypot(1.0, sigma), sigma / math.hypot(1.0, sigma))


def _sigma(scheduler: Any, index: int) -> Level:
    return Level(1.0, float(scheduler.sigmas[index]))


def is_second(scheduler: Any, index: int) -> bool:
    """Whether a call is the second evaluation of a two-evaluation step."""
    return (index - (getattr(scheduler, "begin_index", None) or 0)) % 2 == 1


def _kdpm2(scheduler: Any, index: int) -> Level:
    sigmas = scheduler.sigmas_interpol if is_second(scheduler, index) else scheduler.sigmas
    return Level(1.0, float(sigmas[index]))


def _kdpm2_ancestral(scheduler: Any, index: int) -> Level:
    second = is_second(scheduler, index)
    return Level(1.0, float(scheduler.sigmas_interpol[index - 1] if second else scheduler.sigmas[index]))


def _dpm_sde(scheduler: Any, index: int) -> Level:
    if is_second(scheduler, index):
        return Level(1.0, math.sqrt(float(scheduler.sigmas[index - 1]) * float(scheduler.sigmas[index])))
    return _sigma(scheduler, index)


def _flow(scheduler: Any, index: int) -> Level:
    sigma = float(scheduler.sigmas[index])
    if getattr(scheduler.config, "invert_sigmas", False):
        # Mochi counts upwards: its sigma is the weight of the clean sample.
        return Level(sigma, 1.0 - sigma)
    return Level(1.0 - sigma, sigma)


def _flow_map(scheduler: Any, timestep: Any) -> Level:
    # Any time is allowed here, not only those of the schedule.
    sigma = scalar(timestep) / scheduler.config.num_train_timesteps
    return Level(1.0 - sigma, sigma)


def _trigonometric(scheduler: Any, index: int) -> Level:
    angle = float(scheduler.timesteps[index])
    # The largest time is pi / 2 rounded up, whose cosine is below zero by rounding alone.
    return Level(max(math.cos(angle), 0.0), math.sin(angle) * scheduler.config.sigma_data)


def _ipndm(scheduler: Any, index: int) -> Level:
    return Level(float(scheduler.alphas[index]), float(scheduler.betas[index]))


FROM_TIMESTEP = LevelRule(_cumulative, indexed=False)
PNDM = LevelRule(_cumulative, indexed=False, noise_step=_pndm_step)
INVERSE = LevelRule(_inverse, indexed=False)
WUERSTCHEN = LevelRule(_wuerstchen, indexed=False, trailing=1)
SOLVER = LevelRule(_solver)
SIGMA = LevelRule(_sigma, rescales=True)
HEUN = LevelRule(_sigma, rescales=True, noise_step=_pairs)
KDPM2 = LevelRule(_kdpm2, rescales=True, noise_step=_pairs)
KDPM2_ANCESTRAL = LevelRule(_kdpm2_ancestral, rescales=True, noise_step=_pairs)
DPM_SDE = LevelRule(_dpm_sde, rescales=True, noise_step=_pairs)
EDM = LevelRule(_sigma)
FLOW = LevelRule(_flow)
FLOW_HEUN = LevelRule(_flow, noise_step=_pairs)
FLOW_MAP = LevelRule(_flow_map, indexed=False)
TRIGONOMETRIC = LevelRule(_trigonometric, trailing=1)
IPNDM = LevelRule(_ipndm)
