"""Smooth Diffusion: images that change evenly as the noise changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..base import Guidance
from ..errors import ParameterError
from ..parameters import parameter
from ..pins import commit, sha256
from ..run import Run


@dataclass
class Smooth(Guidance):
    """A LoRA on all attentions of the UNet, trained so that equal steps of the noise are equal steps of the image.

    $$ \\lVert \\partial_\\epsilon \\langle \\hat x_0(x_t(\\epsilon)), v \\rangle \\rVert \\approx a
       \\quad\\text{for random } v $$

    It makes interpolation between noises even and inversion exact to less. Guo et al., "Smooth Diffusion: Crafting
    Smooth Latent Spaces in Diffusion Models", CVPR 2024, arXiv:2312.04410. `trimtab interpolate` shows it.

    Cost: no further evaluation.

    Raises:
        WeightsError: weights that do not fit the UNet; the message names file, tensor and both shapes.
    """

    name: ClassVar[str] = "smooth"

    weights: str | None = parameter(None, "File, folder or Hub repository with the LoRA.")
    scale: float = parameter(1.0, "Weight of the LoRA.", ge=0, off=0.0)
    weight_name: str | None = parameter(None, "File in the folder or repository, where there are several.")
    revision: str | None = parameter(None, "Branch, tag or commit of the repository.")
    sha256: str | None = parameter(None, "What the file must hash to.")

    def validate(self) -> None:
        super().validate()
        if self.weights is None:
            raise ParameterError("smooth: weights is missing; give it, such as weights='smooth_lora.safetensors'.")

    def pinned(self) -> Self:
        found = self.sha256 or sha256(self.weights, self.weight_name)
        return replace(self, revision=commit(self.weights, self.revision), sha256=found)

    def setup(self, run: Run) -> None:
        if self.scale > 0 and self.start < self.stop:
            run.attachment("smooth").add(self)
