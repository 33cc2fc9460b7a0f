"""Smoothed energy guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..base import Guidance
from ..branch import COND, AttentionTokens, Branch, Perturbation, Predictions
from ..errors import GuidanceRuntimeError
from ..parameters import parameter
from ..run import Run, Step


@dataclass(frozen=True)
class SmoothedQueries(Perturbation):
    """The queries of the image tokens are blurred over the picture, so that the attention map is smooth.

    Args:
        sigma: of the Gaussian, in tokens; infinity takes the mean.
    """

    sigma: float = math.inf

    def __post_init__(self) -> None:
        # A compiler makes a number symbolic once it has seen two of its values, and a text never.
        object.__setattr__(self, "_constant_sigma", repr(self.sigma))

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        image = query[..., tokens.start : tokens.stop, :]
        smooth = query.clone()
        smooth[..., tokens.start : tokens.stop, :] = self.smoothed(image, tokens.grid)
        return F.scaled_dot_product_attention(smooth, key, value, attn_mask=mask, scale=scale)

    def smoothed(self, image: torch.Tensor, grid: tuple[int, ...] | None) -> torch.Tensor:
        """Blurred queries; `image` is `[batch, heads, tokens, head_dim]`."""
        sigma = float(self.__dict__["_constant_sigma"])
        if math.isinf(sigma):
            return image.mean(dim=-2, keepdim=True).expand_as(image)
        if grid is None:
            raise GuidanceRuntimeError(
                f"seg: sigma={sigma:g}: this denoiser's arguments do not tell where its image tokens lie in the "
                "picture; allowed here: sigma=inf, the mean, which needs no place."
            )
        height, width = grid[-2:]
        picture = image.transpose(-1, -2).reshape(-1, 1, height, width)
        for axis, side in ((-2, height), (-1, width)):
            picture = _blurred(picture, axis, side, sigma)
        return picture.reshape(*image.shape[:2], image.shape[-1], image.shape[-2]).transpose(-1, -2)


def _blurred(picture: torch.Tensor, axis: int, side: int, sigma: float) -> torch.Tensor:
    """`[n, 1, height, width]` under a Gaussian along one axis, reflected at the edges, cut at 3 sigma."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(size, side - (side % 2 - 1))
    x = torch.arange(size, dtype=torch.float32, device=picture.device) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(picture.dtype)
    half = size // 2
    if axis == -2:
        return F.conv2d(F.pad(picture, (0, 0, half, half), mode="reflect"), kernel.view(1, 1, -1, 1))
    return F.conv2d(F.pad(picture, (half, half, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))


@dataclass
class SEG(Guidance):
    """Smoothed energy guidance: away from what the model predicts when its attention is blurred.

    $$ \\tilde\\epsilon = \\epsilon_c + \\gamma\\,(\\epsilon_c - \\hat\\epsilon_c) $$

    where `\\hat\\epsilon_c` is the conditional prediction with the queries of some self-attentions blurred over the
    picture by a Gaussian, which flattens the energy that attention descends. With classifier-free guidance the same
    term is added to its result. Text tokens attend as ever where text and image attend jointly. Hong, "Smoothed Energy
    Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention", NeurIPS 2024, arXiv:2408.00760.

    Cost: one more evaluation a step, none before its first blurred layer; none at scale 0 and outside its window.
    """

    name: ClassVar[str] = "seg"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    scale: float = parameter(3.0, "Strength gamma; 0 switches it off.", ge=0, off=0.0)
    sigma: float = parameter(
        math.inf, "Standard deviation of the blur; infinity takes the mean over the picture.", ge=0.1, unit="tokens",
        finite=False,
    )  # fmt: skip
    layers: str | tuple[str, ...] = parameter(
        "auto", "Blurred self-attentions: 'auto', 'mid', 'd2', a block or attention by name or pattern, or a list."
    )

    def setup(self, run: Run) -> None:
        run.state.smoothed = Branch("cond", SmoothedQueries(run.attention_layers(self.layers), self.sigma))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, step.state.smoothed) if self.scale > 0 else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if self.scale == 0:
            return None
        return self.scale * (predictions[COND] - predictions[step.state.smoothed])
