"""Parametrisations: what a denoiser's prediction says about the clean sample and the noise.

At a level `x_t = alpha x_0 + sigma n` every parametrisation in use is a fixed mixture `p = u x_0 + w n`:

| prediction | u | w |
| --- | --- | --- |
| `epsilon` | 0 | 1 |
| `sample` | 1 | 0 |
| `v_prediction` | -sigma / h | alpha / h, with h = sqrt(alpha^2 + sigma^2) |
| `flow_prediction` | -1 | 1 |
| `reversed_flow_prediction` (MiniMax-H3, Mochi) | 1 | -1 |
| `preconditioned` (EDM, arXiv:2206.00364, table 1) | from c_skip and c_out | likewise |
| `trigflow` (sCM, arXiv:2410.11081) | -sigma / sigma_data | alpha sigma_data |
| `consistency` (arXiv:2303.01469, appendix C) | from c_skip and c_out | likewise |

Each rule below takes a scheduler and returns its parametrisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import GuidanceRuntimeError, UnsupportedSchedulerError
from .levels import Level

Mixture = Callable[[Level], tuple[float, float]]


@dataclass(frozen=True)
class Prediction:
    """A parametrisation: its name, and (u, w) of `p = u x_0 + w n` at a level."""

    name: str
    mixture: Mixture


EPSILON = Prediction("epsilon", lambda level: (0.0, 1.0))
SAMPLE = Prediction("sample", lambda level: (1.0, 0.0))
FLOW = Prediction("flow_prediction", lambda level: (-1.0, 1.0))
REVERSED_FLOW = Prediction("reversed_flow_prediction", lambda level: (1.0, -1.0))


def _velocity(level: Level) -> tuple[float, float]:
    norm = math.hypot(level.alpha, level.sigma)
    return -level.sigma / norm, level.alpha / norm


VELOCITY = Prediction("v_prediction", _velocity)
BY_TYPE = {"epsilon": EPSILON, "sample": SAMPLE, "original_sample": SAMPLE, "v_prediction": VELOCITY}


def configured(scheduler: Any) -> Prediction:
    """What `prediction_type` says; schedulers without one predict epsilon."""
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in BY_TYPE:
        raise _refuse_prediction(scheduler, kind, sorted(BY_TYPE))
    return BY_TYPE[kind]


def solver(scheduler: Any) -> Prediction:
    """What `prediction_type` says, for the solvers that run on the variance-preserving path and on the flow path."""
    # Diffusers' formulas for a velocity on the flow path, and for a flow off it, contradict their own alpha and sigma.
    kind = scheduler.config.prediction_type
    flow = scheduler.config.use_flow_sigmas
    allowed = {
        "epsilon": EPSILON,
        "sample": SAMPLE,
        **({"flow_prediction": FLOW} if flow else {"v_prediction": VELOCITY}),
    }
    if kind not in allowed:
        raise _refuse_prediction(scheduler, kind, sorted(allowed), f" with use_flow_sigmas={flow}")
    return allowed[kind]


def flow(scheduler: Any) -> Prediction:
    """The velocity of a straight path, which points to the data where the scheduler counts upwards (Mochi)."""
    if not getattr(scheduler.config, "invert_sigmas", False):
        return FLOW
    if getattr(scheduler.config, "stochastic_sampling", False):
        raise _refuse_inverted(scheduler, "stochastic_sampling=False")
    return REVERSED_FLOW


def renoised_flow(scheduler: Any) -> Prediction:
    """The velocity of a straight path, for a scheduler that adds new noise to its clean estimate."""
    if scheduler.config.invert_sigmas:
        raise _refuse_inverted(scheduler, "FlowMatchEulerDiscreteScheduler")
    return FLOW


def velocity(scheduler: Any) -> Prediction:
    """The velocity, whatever the configuration says."""
    return VELOCITY


def reversed_flow(scheduler: Any) -> Prediction:
    """The velocity towards the data, whatever the configuration says."""
    return REVERSED_FLOW


def edm(scheduler: Any) -> Prediction:
    """The raw network F of `x_0 = c_skip x_t + c_out F`; its `prediction_type` only tells the sign of c_out."""
    data = float(scheduler.config.sigma_data)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise _refuse_prediction(scheduler, kind, ["epsilon", "v_prediction"])
    sign = 1.0 if kind == "epsilon" else -1.0

    def mixture(level: Level) -> tuple[float, float]:
        norm = math.hypot(level.sigma, data)
        return sign * level.sigma / (data * norm), -sign * data / norm

    return Prediction("preconditioned", mixture)


def trigflow(scheduler: Any) -> Prediction:
    """The velocity of `x_t = cos(t) x_0 + sin(t) sigma_data n`."""
    data = float(scheduler.config.sigma_data)
    if scheduler.config.prediction_type != "trigflow":
        raise _refuse_prediction(scheduler, scheduler.config.prediction_type, ["trigflow"])
    return Prediction("trigflow", lambda level: (-level.sigma / data, level.alpha * data))


def consistency(scheduler: Any) -> Prediction:
    """The raw network of a consistency model, `x_0 = c_skip x_t + c_out F`."""
    data, least = float(scheduler.config.sigma_data), float(scheduler.config.sigma_min)

    def mixture(level: Level) -> tuple[float, float]:
        # The schedule's last sigma is the smallest one up to rounding in float32.
        if level.sigma <= least * (1.0 + 1e-5):
            raise GuidanceRuntimeError(
                f"{type(scheduler).__name__}: at its smallest sigma={least:g} the model's output has no weight, so it "
                f"cannot be guided there; let the guidance end earlier, with sigma_min={2 * least:g}."
            )
        skip = data**2 / ((level.sigma - least) ** 2 + data**2)
        out = (level.sigma - least) * data / math.hypot(level.sigma, data)
        return (1.0 - skip) / out, -skip * level.sigma / out

    return Prediction("consistency", mixture)


def _refuse_prediction(scheduler: Any, kind: Any, allowed: list[str], where: str = "") -> UnsupportedSchedulerError:
    return UnsupportedSchedulerError(
        f"{type(scheduler).__name__}: prediction_type={kind!r}{where} has no defined clean estimate; allowed: "
        f"{', '.join(allowed)}. Set it to what the model was trained for: "
        f"{type(scheduler).__name__}.from_config(scheduler.config, prediction_type=...)."
    )


def _refuse_inverted(scheduler: Any, remedy: str) -> UnsupportedSchedulerError:
    return UnsupportedSchedulerError(
        f"{type(scheduler).__name__}: with invert_sigmas=True its step takes the noise for the clean estimate; use "
        f"invert_sigmas=False, or {remedy}."
    )
