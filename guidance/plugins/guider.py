"""Any guider of Diffusers as a guidance."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.guiders import BaseGuidance

from ..base import Guidance
from ..branch import COND, UNCOND, Branch, Predictions
from ..guiders import check_usable, combine, create
from ..parameters import parameter
from ..run import Run, Step


@dataclass
class Guider(Guidance):
    """A guider of Diffusers: APG, CFG-Zero*, TCFG, FDG, MaG, or one of your own.

    $$ \\tilde\\epsilon = G(\\epsilon_c + \\Delta,\\ \\epsilon_u + \\Delta) $$

    where G is the guider's own `forward` and Delta the sum of what the other guidances add (0 without any): they steer
    the model, and the guider combines what the steered model predicts. So with `ClassifierFreeGuidance` the terms add
    up, and a guider that projects or rescales does that to the sum. What a paper calls its formula, and where its
    guidance interval lies, is the guider's own configuration; beyond its interval it hands the conditional prediction
    on, as in a modular pipeline. Outside of `start` to `stop` here the pipeline does what it does by itself.

    Each run works on a copy of the guider, so that its momentum begins anew and no other pipeline sees it.

    `pipe.add_guidance(AdaptiveProjectedGuidance(guidance_scale=7.5))` attaches one under the name of its class.

    Cost: one more evaluation a step where the pipeline has no unconditional one; none beyond the guider's interval.
    """

    name: ClassVar[str] = "guider"
    exclusive: ClassVar[str | None] = "cfg"
    before: ClassVar[tuple[str, ...]] = ("dynamic_threshold", "rescale")

    guider: BaseGuidance | str = parameter(
        "ClassifierFreeGuidance",
        "The guider, or a name in diffusers.guiders, such as 'apg', for one with its defaults.",
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "guider" and isinstance(value, str):
            value = create(value)
        super().__setattr__(name, value)

    def validate(self) -> None:
        super().validate()
        check_usable(self.guider)

    def setup(self, run: Run) -> None:
        guider: Any = copy.copy(self.guider)
        run.state.guider = guider
        # A guider forgets the run before when it prepares its first step, which may lie outside this window.
        guider.set_state(step=0, num_inference_steps=None, timestep=None)
        guider.prepare_inputs({})

    def _asked(self, step: Step) -> list[tuple[str, Branch]]:
        """What the guider asks for at this step, by its own name for it, as it would tell a modular pipeline."""
        guider = step.state.guider
        guider.set_state(step.index, step.count, torch.tensor(step.timestep))
        asked = guider.prepare_inputs({"branch": (COND, UNCOND)})
        return [(getattr(one, guider._identifier_key), one.branch) for one in asked]

    def branches(self, step: Step) -> Sequence[Branch]:
        return tuple(branch for _, branch in self._asked(step))

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        assert step.own is not None
        delta = prediction - step.own
        return combine(step.state.guider, {name: predictions[branch] + delta for name, branch in self._asked(step)})
