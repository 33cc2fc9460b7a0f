"""Recurrence: a step is evaluated again at an x_t that was noised back from where the step led.

    x_s = alpha_s x_0 + sigma_s n,      x_t' = r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) z,      r = alpha_t / alpha_s

with the guided x_0 and n of the evaluation before, the scheduler's own levels t and s, and new noise z. So x_t' lies at
level t again. Lugmayr et al., "RePaint", arXiv:2201.09865; Bansal et al., "Universal Guidance", arXiv:2302.07121.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..guidance.base import Guidance
from ..guidance.errors import UnsupportedSchedulerError
from ..guidance.run import Step

STARTS_ELSEWHERE = {
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
    "PNDMScheduler": "DDIMScheduler",
    "SASolverScheduler": "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler": "DPMSolverMultistepScheduler",
}
"""Schedulers whose step goes on from an earlier sample than the one it is given, and what to use instead."""


def check_repeats(acting: Mapping[str, Guidance], steps: Mapping[str, Step], scheduler: Any) -> None:
    """Refuse guidances that evaluate a step several times with a scheduler that cannot.

    Args:
        acting: by name.
        steps: for each the step as it sees it.
        scheduler: that is stepped.

    Raises:
        UnsupportedSchedulerError: see `check_repeatable`.
    """
    for name, guidance in acting.items():
        if guidance.overrides("repeats") and guidance.repeats(steps[name]) > 1:
            check_repeatable(scheduler, name)


def check_repeatable(scheduler: Any, asked_by: str) -> None:
    """Refuse recurrence where the scheduler would not go on from the new x_t.

    Raises:
        UnsupportedSchedulerError: naming the scheduler and another.
    """
    for base in type(scheduler).__mro__:
        if base.__name__ in STARTS_ELSEWHERE:
            raise UnsupportedSchedulerError(
                f"{asked_by}: repeats above 1 are not possible with {base.__name__}, whose step goes on from an "
                f"earlier sample; use {STARTS_ELSEWHERE[base.__name__]}."
            )


def noised_back(
    step: Step, prediction: torch.Tensor, edit: Callable[[torch.Tensor], torch.Tensor], generator: Any
) -> torch.Tensor:
    """x_t' `[batch, ...]`.

    Args:
        step: with x_t.
        prediction: the guided prediction at x_t.
        edit: what phase 6 makes of x_s.
        generator: of the pipeline's call, one or one an image.
    """
    assert step.sample is not None
    t, s = step.level, step.next_level
    x0 = step.x0(prediction)
    onward = edit(x0 if s.sigma == 0.0 else s.alpha * x0 + s.sigma * step.epsilon(prediction))
    ratio = t.alpha / s.alpha
    z = randn_tensor(onward.shape, generator=generator, device=onward.device, dtype=onward.dtype)
    again = ratio * onward + math.sqrt(max(t.sigma**2 - (ratio * s.sigma) ** 2, 0.0)) * z
    return again.to(step.sample.dtype)
