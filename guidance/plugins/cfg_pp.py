"""CFG++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, UNCOND, Branch, Predictions, Prompt
from ..parameters import parameter
from ..run import Step


@dataclass
class CFGPlusPlus(Guidance):
    """Classifier-free guidance that stays on the data manifold: small scales, and no guidance in the noise added back.

    $$ \\epsilon^\\lambda = \\epsilon_u + \\lambda\\,(\\epsilon_c - \\epsilon_u), \\qquad
       x_{t-1} = \\alpha_{t-1}\\,\\hat x_0(\\epsilon^\\lambda) + \\sigma_{t-1}\\,\\epsilon_u $$

    Chung et al., "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", arXiv:2406.08070. It
    claims the slot `"cfg"` and takes the place of the pipeline's own guidance. Other deltas act on the clean estimate,
    not on the noise that is added back. It needs a scheduler whose step goes from a clean estimate and its noise to the
    next level: DDIM, DDPM, Euler, ancestral Euler, flow-matching Euler. The others are refused by name.

    Cost: one more evaluation a step where the pipeline has no unconditional one.
    """

    name: ClassVar[str] = "cfg_pp"
    exclusive: ClassVar[str | None] = "cfg"
    needs: ClassVar[frozenset[str]] = frozenset({"level"})

    scale: float = parameter(
        0.6, "Scale lambda; 1 is the conditional clean estimate, 0 the unconditional one.", ge=0, le=1
    )
    negative_prompt: str | None = parameter(
        None, "What to steer away from; by default the pipeline's own negative or empty prompt, or the null class."
    )

    @property
    def away_from(self) -> Branch:
        """The branch of epsilon_u."""
        return UNCOND if self.negative_prompt is None else Branch(Prompt(self.negative_prompt))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, self.away_from)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        assert step.own is not None
        uncond = predictions[self.away_from]
        return uncond + self.scale * (predictions[COND] - uncond) - step.own

    def renoise(self, step: Step, noise: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        return step.epsilon(predictions[self.away_from])
