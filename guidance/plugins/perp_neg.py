"""Perp-Neg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, UNCOND, Branch, Predictions, Prompt
from ..parameters import parameter
from ..run import Step

EMPTY = Branch(Prompt(""))


@dataclass
class PerpNeg(Guidance):
    """Classifier-free guidance away from negative prompts only where they do not contradict the prompt.

    $$ \\tilde\\epsilon = \\epsilon_\\varnothing + g\\Bigl[\\Delta_c - w \\sum_i \\Delta_i^{\\perp}\\Bigr], \\qquad
       \\Delta_c = \\epsilon_c - \\epsilon_\\varnothing, \\quad \\Delta_i = \\epsilon_i - \\epsilon_\\varnothing, \\quad
       \\Delta_i^{\\perp} = \\Delta_i - \\frac{\\langle\\Delta_c, \\Delta_i\\rangle}{\\|\\Delta_c\\|^2}\\,\\Delta_c $$

    with the empty prompt `\\varnothing` and the product over all elements of an image. Armandpour et al., "Re-imagine
    the Negative Prompt Algorithm", arXiv:2304.04968. It claims the slot `"cfg"`.

    Cost: an evaluation a step for the empty prompt, and one for each negative prompt; the pipeline's own negative
    prompt costs one only where the pipeline does not compute it by itself.
    """

    name: ClassVar[str] = "perp_neg"
    exclusive: ClassVar[str | None] = "cfg"

    scale: float = parameter(7.5, "Guidance scale g; 1 and w = 0 are the conditional prediction alone.", ge=0, off=1.0)
    negative_scale: float = parameter(1.0, "Weight w of the negative prompts; 0 is plain guidance.", ge=0, off=0.0)
    negative_prompt: str | tuple[str, ...] | None = parameter(
        None, "One or several things to steer away from; by default the pipeline's own negative prompt."
    )

    @property
    def negatives(self) -> tuple[Branch, ...]:
        """The branches of epsilon_i."""
        if self.negative_scale == 0:
            return ()
        if self.negative_prompt is None:
            return (UNCOND,)
        texts = (self.negative_prompt,) if isinstance(self.negative_prompt, str) else self.negative_prompt
        return tuple(Branch(Prompt(text)) for text in texts)

    def branches(self, step: Step) -> Sequence[Branch]:
        if self.scale == 0:
            return (EMPTY,)
        return (COND,) if self.scale == 1 and not self.negatives else (COND, EMPTY, *self.negatives)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        assert step.own is not None
        if EMPTY not in predictions:
            return predictions[COND] - step.own
        empty = predictions[EMPTY]
        if self.scale == 0:
            return empty - step.own
        towards = predictions[COND] - empty
        away = sum((perpendicular(predictions[n] - empty, towards) for n in self.negatives), torch.zeros_like(empty))
        return empty + self.scale * (towards - self.negative_scale * away) - step.own


def perpendicular(delta: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """The part of each image of `delta` `[batch, ...]` that is perpendicular to that of `to`."""
    axes = tuple(range(1, delta.ndim))
    inner = (delta.float() * to.float()).sum(dim=axes, keepdim=True)
    square = to.float().square().sum(dim=axes, keepdim=True)
    return delta - ((inner / square.clamp_min(torch.finfo(torch.float32).tiny)) * to).to(delta.dtype)
