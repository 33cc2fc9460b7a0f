"""The noise that the scheduler's step adds back to the clean estimate, chosen by a guidance (CFG++).

A step that depends on nothing but its level, the sample and the prediction is a function of the clean estimate and of
the noise that these two stand for. So a guidance that wants another noise n needs no step of its own: the scheduler is
given `alpha x_0 + sigma n` for a sample, and the prediction that makes of it the same `x_0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.branch import Predictions
from ..guidance.run import Step
from ..guidance.schedulers import check_single_step
from .hooks import Hooks


def check_renoising(schedulers: Sequence[Any], guidances: Mapping[str, Guidance]) -> None:
    """Refuse schedulers whose step depends on more, for guidances that choose the noise.

    Raises:
        UnsupportedSchedulerError: naming guidance and scheduler, and what works instead.
    """
    for name, guidance in guidances.items():
        if guidance.overrides("renoise"):
            for scheduler in schedulers:
                check_single_step(scheduler, name)


def renoise(
    hooks: Hooks, acting: Mapping[str, Guidance], step: Step, prediction: torch.Tensor, predictions: Predictions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction and the x_t that the scheduler is to be given.

    Args:
        step: with x_t.
        prediction: the guided one `[batch, ...]`, in the scheduler's own parametrisation.
        predictions: all that were computed.
    """
    assert step.sample is not None
    if not any(guidance.overrides("renoise") for guidance in acting.values()):
        return prediction, step.sample
    assert step.algebra is not None
    x0 = step.x0(prediction)
    noise = hooks.renoise(acting, step, step.epsilon(prediction), predictions)
    sample = (step.level.alpha * x0.float() + step.level.sigma * noise.float()).to(step.sample.dtype)
    return step.algebra.from_x0(x0, sample, step.level, prediction), sample
