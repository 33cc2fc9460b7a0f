"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, UNCOND, Branch, Predictions, Prompt
from ..parameters import parameter
from ..run import Step
from .rescale import rescaled


@dataclass
class CFG(Guidance):
    """Classifier-free guidance, for pipelines that have none, and in place of a pipeline's own.

    $$ \\tilde\\epsilon = \\epsilon_u + g\\,(\\epsilon_c - \\epsilon_u) $$

    Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598. A window makes it guidance in a limited
    interval (Kynkäänniemi et al., arXiv:2404.07724). With `rescale` the sum is brought towards the standard deviation
    of the conditional prediction (Lin et al., arXiv:2305.08891):

    $$ \\phi\\,\\frac{\\operatorname{std}\\epsilon_c}{\\operatorname{std}\\tilde\\epsilon}\\tilde\\epsilon
       + (1-\\phi)\\,\\tilde\\epsilon $$

    Where the pipeline computes an unconditional prediction itself, that one is used and the pipeline's own
    `guidance_scale` gives way to this one within the window.

    Cost: one more evaluation a step where the pipeline has no unconditional one; none at scale 1.
    """

    name: ClassVar[str] = "cfg"
    exclusive: ClassVar[str | None] = "cfg"

    scale: float = parameter(
        5.0, "Scale g; 1 is the conditional prediction alone, 0 the unconditional one.", ge=0, off=1.0
    )
    negative_prompt: str | None = parameter(
        None, "What to steer away from; by default the pipeline's own negative or empty prompt, or the null class."
    )
    rescale: float = parameter(0.0, "Share phi of the sum that is rescaled.", ge=0, le=1)

    @property
    def away_from(self) -> Branch:
        """The branch of epsilon_u."""
        return UNCOND if self.negative_prompt is None else Branch(Prompt(self.negative_prompt))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, self.away_from) if self.scale != 1 else (COND,)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        assert step.own is not None
        cond = predictions[COND]
        if self.scale == 1:
            return cond - step.own
        uncond = predictions[self.away_from]
        return uncond + self.scale * (cond - uncond) - step.own

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        if self.rescale == 0:
            return prediction
        return rescaled(prediction, predictions[COND], self.rescale)
