"""Dynamic thresholding."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..parameters import parameter
from ..run import Run, Step

logger = logging.getLogger(__name__)


@dataclass
class DynamicThreshold(Guidance):
    """Keeps the clean estimate within the range of clean data, against saturation at high guidance scales.

    $$ s = \\max\\bigl(b,\\; \\text{the } p\\text{-quantile of } |\\hat x_0|\\bigr), \\qquad
       \\hat x_0 \\leftarrow \\frac{b}{s}\\,\\operatorname{clip}(\\hat x_0, -s, s) $$

    for each image by itself. Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding" (Imagen), section 2.3, arXiv:2205.11487. It is meant for models of pixels in [-1, 1], where b = 1;
    latents have no such range, so give b the largest value that is still natural for them.

    Cost: none.
    """

    name: ClassVar[str] = "dynamic_threshold"

    ratio: float = parameter(0.995, "Quantile p of the absolute values.", ge=0, le=1)
    bound: float = parameter(
        1.0,
        "Bound b of clean data, which lie in [-b, b]; infinity switches it off.",
        ge=0,
        finite=False,
        off=math.inf,
    )
    max_value: float = parameter(
        math.inf, "Largest s, as `sample_max_value` of Diffusers' schedulers; b makes it plain clipping.", ge=0,
        finite=False,
    )  # fmt: skip

    def setup(self, run: Run) -> None:
        run.check_step(self.check)

    def check(self, step: Step) -> None:
        """Say that a bound of pixels is none of latents."""
        if self.bound == 1 and not step.in_pixels:
            logger.warning(
                "%s: bound=1 is the range of pixels, and this model's samples are latents, which reach further; give "
                "the largest value that is natural for them, or leave it out.",
                self.label,
            )

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        if math.isinf(self.bound):
            return x0
        magnitudes = x0.flatten(1).abs().float()
        s = torch.quantile(magnitudes, self.ratio, dim=1).clamp(min=self.bound, max=max(self.bound, self.max_value))
        s = s.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s) * (self.bound / s)
