"""Skip layer guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Guidance
from ..branch import COND, Branch, Predictions, SkippedBlocks
from ..parameters import parameter
from ..run import Run, Step


@dataclass
class SLG(Guidance):
    """Skip layer guidance: away from what the model predicts when some of its blocks are left out.

    $$ \\tilde\\epsilon = \\epsilon_c + s\\,(\\epsilon_c - \\hat\\epsilon_c) $$

    where `\\hat\\epsilon_c` is the conditional prediction with whole blocks skipped. With classifier-free guidance the
    same term is added to its result. Stability AI, Stable Diffusion 3.5; for video, Hyung et al., "Spatiotemporal Skip
    Guidance", arXiv:2411.18664. The defaults are those for Stable Diffusion 3.5 medium, whose blocks 7, 8 and 9 are
    left out; `"auto"` takes the same part of another transformer, and the middle block's of a UNet.

    Cost: one more evaluation a step, none before its first skipped block; none at scale 0 and outside its window.
    """

    name: ClassVar[str] = "slg"

    scale: float = parameter(2.8, "Strength s; 0 switches it off.", ge=0, off=0.0)
    layers: str | tuple[str, ...] = parameter(
        "auto", "Skipped blocks: 'auto', a block by name or pattern such as 'blocks.(7|8|9)', or a list."
    )
    start: float = parameter(
        0.01, "First part of the run in which it acts, as a fraction of the noise levels.", ge=0, le=1
    )
    stop: float = parameter(0.2, "End of that part: it acts while start <= index / count < stop.", ge=0, le=1)

    def setup(self, run: Run) -> None:
        run.state.skipped = Branch("cond", SkippedBlocks(run.skippable_blocks(self.layers)))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, step.state.skipped) if self.scale > 0 else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if self.scale == 0:
            return None
        return self.scale * (predictions[COND] - predictions[step.state.skipped])
