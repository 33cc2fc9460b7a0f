"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, UNCOND, Branch, Predictions
from ..errors import ParameterError
from ..parameters import parameter
from ..run import Step


@dataclass
class Interval(Guidance):
    """Classifier-free guidance at middle noise levels only, and the conditional prediction alone outside of them.

    $$ \\tilde\\epsilon = \\epsilon_u + w(\\sigma)\\,(\\epsilon_c - \\epsilon_u), \\qquad
       w(\\sigma) = w \\text{ for } \\sigma_{lo} < \\sigma \\le \\sigma_{hi}, \\text{ else } 1 $$

    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", arXiv:2404.07724. The defaults are the paper's for Stable Diffusion XL. It claims the slot `"cfg"`; a
    window of `cfg` itself is another thing, for outside of that the pipeline's own guidance is left alone.

    Cost: inside, one more evaluation a step where the pipeline has no unconditional one; none outside.
    """

    name: ClassVar[str] = "interval"
    exclusive: ClassVar[str | None] = "cfg"
    needs: ClassVar[frozenset[str]] = frozenset({"level"})

    scale: float | None = parameter(
        None,
        "Scale w inside; 1 is the conditional prediction. By default the pipeline's own result stands there.",
        ge=0,
        off=1.0,
    )
    low: float = parameter(0.28, "Lower end sigma_lo, excluded.", ge=0, unit="noise per signal")
    high: float = parameter(5.42, "Upper end sigma_hi, included.", ge=0, unit="noise per signal", finite=False)

    def validate(self) -> None:
        super().validate()
        if self.low > self.high:
            raise ParameterError(
                f"{self.label}: low={self.low:g} lies above high={self.high:g}; allowed: low <= high, in sigma / alpha."
            )

    def scale_at(self, step: Step) -> float | None:
        """w(sigma)."""
        sigma = step.level.ratio
        return self.scale if self.low < sigma <= self.high or (math.isinf(sigma) and math.isinf(self.high)) else 1.0

    def branches(self, step: Step) -> Sequence[Branch]:
        scale = self.scale_at(step)
        return () if scale is None else (COND,) if scale == 1 else (COND, UNCOND)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        scale = self.scale_at(step)
        if scale is None:
            return None
        assert step.own is not None
        cond = predictions[COND]
        if scale == 1:
            return cond - step.own
        return predictions[UNCOND] + scale * (cond - predictions[UNCOND]) - step.own
