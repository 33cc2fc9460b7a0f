"""Symmetry guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from trimtab import Guidance, Run, Step, UnsupportedPipelineError, parameter

AXES = {"left-right": [(-1,)], "top-bottom": [(-2,)], "half-turn": [(-2, -1)], "kaleidoscope": [(-1,), (-2,), (-2, -1)]}


@dataclass
class Symmetry(Guidance):
    r"""Makes images symmetric while they are made, so that both halves still fit together.

    $$ \hat x_0 \leftarrow (1 - s)\,\hat x_0 + s\,\frac{1}{|G|} \sum_{g \in G} g\,\hat x_0 $$

    the mean of the clean estimate $\hat x_0$ over a group $G$ of reflections: the nearest symmetric image. At $s = 1$
    for the whole run the result is symmetric exactly, where the model works on pixels, and nearly so behind an
    autoencoder. A window that ends early, `stop=0.5`, lets the model add what differs, such as a signature.

    Cost: no further evaluation.
    """

    name: ClassVar[str] = "studio.symmetry"
    api_version: ClassVar[str] = "1.0"

    scale: float = parameter(1.0, "Strength s; 0 switches it off, 1 is full symmetry.", ge=0, le=1, off=0.0)
    kind: Literal["left-right", "top-bottom", "half-turn", "kaleidoscope"] = parameter(
        "left-right", "Which reflections: across one axis, a turn by 180 degrees, or all three."
    )

    def setup(self, run: Run) -> None:
        if not run.pictures:
            raise UnsupportedPipelineError(
                f"{self.name}: this pipeline packs its images into tokens, which cannot be mirrored. Use it with a "
                "pipeline whose latents are [batch, channels, height, width], such as Stable Diffusion's."
            )

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        images = [x0, *(x0.flip(axes) for axes in AXES[self.kind])]
        return x0 + self.scale * (torch.stack(images).mean(dim=0) - x0)
