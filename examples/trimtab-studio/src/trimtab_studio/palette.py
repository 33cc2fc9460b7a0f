"""Palette guidance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from trimtab import Guidance, ParameterError, Step, parameter

LUMA = (0.299, 0.587, 0.114)


@dataclass
class Palette(Guidance):
    r"""Steers an image towards given colours, each pixel towards those that its neighbourhood is nearest to.

    $$ L = \frac{s}{2} \sum_p \Bigl\| y_p - \sum_k w_{pk}\, c_k \Bigr\|^2, \qquad
       w_{pk} = \operatorname{softmax}_k\bigl(-\| \bar y_p - c_k \|^2 / 2 \tau^2 \bigr) $$

    with the pixels $y_p$ of the decoded clean estimate, their means $\bar y_p$ over a small square, and the colours
    $c_k$, in units of the range from black to white. The weights count as constant, so that a step is one of mean shift
    towards the palette (Comaniciu & Meer, "Mean Shift", TPAMI 2002). Where $\tau$ is wide against the distance of two
    colours, pixels go to the middle between them. Images of one channel are given the luma of each colour.

    Cost: no further evaluation and no gradient through the denoiser; where there is an autoencoder, a decoding and its
    gradient a step.
    """

    name: ClassVar[str] = "studio.palette"
    api_version: ClassVar[str] = "1.0"

    colours: tuple[str, ...] = parameter(("#000000", "#808080", "#ffffff"), "Colours as '#rrggbb', at least one.")
    scale: float = parameter(
        0.6, "Strength s; 0 switches it off, 1 moves a pixel onto its colour.", ge=0, le=1, off=0.0
    )
    width: float = parameter(0.1, "Width tau of a colour's reach.", ge=0.01, le=1, unit="of the range black to white")
    grain: int = parameter(1, "Half the side of the square that chooses together.", ge=0, le=8, unit="pixels")

    def validate(self) -> None:
        super().validate()
        wrong = [colour for colour in self.colours if not re.fullmatch("#[0-9a-fA-F]{6}", colour)]
        if wrong or not self.colours:
            raise ParameterError(
                f"{self.name}: colours={self.colours!r}: allowed: one or several written like '#1e90ff'."
            )

    def palette(self, like: torch.Tensor) -> torch.Tensor:
        """The colours `[colours, channels]` for images `[batch, channels, ...]` between -1 and 1."""
        values = [[int(colour[i : i + 2], 16) / 127.5 - 1 for i in (1, 3, 5)] for colour in self.colours]
        colours = torch.tensor(values, dtype=like.dtype, device=like.device)
        return colours if like.shape[1] == 3 else (colours @ colours.new_tensor(LUMA))[:, None]

    def nearest(self, image: torch.Tensor) -> torch.Tensor:
        """Each pixel's weighted mean of the colours, for images `[batch, channels, height, width]`."""
        colours = self.palette(image)
        side = 2 * self.grain + 1
        mean = functional.avg_pool2d(image, side, stride=1, padding=self.grain, count_include_pad=False)
        apart = (mean[:, None] - colours[None, :, :, None, None]).square().sum(dim=2)
        weights = torch.softmax(-apart / (2 * (2 * self.width) ** 2), dim=1)  # the range is 2 wide here
        return torch.einsum("bkhw,kc->bchw", weights, colours)

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        image = step.decode(x0)
        return self.scale / 2 * (image - self.nearest(image.detach())).square().flatten(1).sum(dim=1)
