"""Guidance rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, Branch, Predictions
from ..parameters import parameter
from ..run import Step


@dataclass
class Rescale(Guidance):
    """Brings the guided prediction back towards the standard deviation of the conditional one, against overexposure.

    $$ \\phi\\,\\frac{\\operatorname{std}\\epsilon_c}{\\operatorname{std}\\tilde\\epsilon}\\tilde\\epsilon
       + (1-\\phi)\\,\\tilde\\epsilon $$

    with the deviation over all elements of an image. `\\tilde\\epsilon` is what the pipeline and all deltas add up to,
    so it may follow any of them, several together, or a pipeline that has no `guidance_rescale` of its own. Lin et al.,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4, arXiv:2305.08891.

    Cost: none.
    """

    name: ClassVar[str] = "rescale"

    phi: float = parameter(0.7, "Share of the prediction that is rescaled; 0 switches it off.", ge=0, le=1, off=0.0)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND,) if self.phi > 0 else ()

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        return rescaled(prediction, predictions[COND], self.phi) if self.phi > 0 else prediction


def rescaled(prediction: torch.Tensor, towards: torch.Tensor, phi: float) -> torch.Tensor:
    """`prediction` with a share `phi` of it scaled to the standard deviation of `towards`, both `[batch, ...]`."""
    axes = tuple(range(1, prediction.ndim))
    std_towards = towards.std(dim=axes, keepdim=True)
    std_prediction = prediction.std(dim=axes, keepdim=True)
    return prediction * (phi * std_towards / std_prediction + 1 - phi)
