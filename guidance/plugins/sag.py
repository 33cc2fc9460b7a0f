"""Self-attention guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..base import Guidance
from ..branch import COND, UNCOND, AttentionTokens, Branch, Point, Predictions
from ..errors import GuidanceRuntimeError, UnsupportedPipelineError
from ..parameters import parameter
from ..run import Run, Step


@dataclass(frozen=True)
class Degraded(Point):
    """x_t as it would be if the clean estimate were blurred where the model attends most.

    Args:
        threshold: a token is blurred if it gets more attention than this, in parts of the mean.
        sigma, size: of the Gaussian and its kernel, in latent pixels.
    """

    threshold: float = 1.0
    sigma: float = 1.0
    size: int = 9

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        tokens: AttentionTokens,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """The attention that each image token gets from all others, `[batch, height, width]`; its mean is 1."""
        image = slice(tokens.start, tokens.stop)
        query, key = query[..., image, :], key[..., image, :]
        if tokens.grid is None or len(tokens.grid) != 2:
            raise GuidanceRuntimeError("sag: it is not known where the image tokens lie in the picture.")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        attention = torch.softmax(factor * (query @ key.transpose(-1, -2)), dim=-1)
        return attention.mean(dim=1).sum(dim=1).unflatten(1, tokens.grid)

    def sample(self, step: Step, prediction: torch.Tensor, watched: Mapping[str, torch.Tensor]) -> torch.Tensor:
        x0, noise = step.x0(prediction), step.epsilon(prediction)
        maps = [F.interpolate(watched[layer][:, None], x0.shape[-2:]) for layer in self.layers]
        masked = (torch.stack(maps).mean(dim=0) > self.threshold).to(x0.dtype)
        x0 = masked * _blurred(x0, self.sigma, self.size) + (1 - masked) * x0
        return step.level.alpha * x0 + step.level.sigma * noise


def _blurred(picture: torch.Tensor, sigma: float, size: int) -> torch.Tensor:
    """`[batch, channels, height, width]` under a Gaussian of `size` by `size` pixels, reflected at the edges."""
    size = min(size, 2 * min(picture.shape[-2:]) - 1)  # what a small picture's own reflection can reach
    x = torch.arange(size, dtype=torch.float32, device=picture.device) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(picture.dtype)
    channels = picture.shape[1]
    plane = (kernel[:, None] * kernel).expand(channels, 1, size, size)
    return F.conv2d(F.pad(picture, [size // 2] * 4, mode="reflect"), plane, groups=channels)


@dataclass
class SAG(Guidance):
    """Self-attention guidance: away from what the model predicts when what it looks at is blurred.

    $$ \\tilde\\epsilon = \\epsilon(x_t) + s\\,(\\epsilon(x_t) - \\epsilon(\\hat x_t)) $$

    $$ \\hat x_t = \\alpha_t\\,[M \\odot G\\hat x_0 + (1 - M) \\odot \\hat x_0] + \\sigma_t\\,\\epsilon(x_t) $$

    with the Gaussian blur G and the mask M of the tokens that get more than an average share of self-attention. The
    unconditional prediction is taken where the pipeline computes one, and the term is added to classifier-free
    guidance; otherwise the conditional one. It is noise that is subtracted, whatever the model predicts. Hong et al.,
    "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023, arXiv:2210.00939.

    Cost: one more evaluation a step, always a denoiser call of its own, since its input depends on the first.
    """

    name: ClassVar[str] = "sag"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "level"})

    scale: float = parameter(0.75, "Strength s; 0 switches it off.", ge=0, off=0.0)
    sigma: float = parameter(1.0, "Standard deviation of the blur.", ge=0.1, unit="latent pixels")
    threshold: float = parameter(1.0, "Attention, in parts of the mean, above which a token is blurred.", ge=0)
    layers: str | tuple[str, ...] = parameter(
        "auto", "Self-attentions whose maps are averaged: 'auto', 'mid', a block or attention by name, or a list."
    )

    def setup(self, run: Run) -> None:
        if not run.pictures:
            raise UnsupportedPipelineError(
                f"{self.label}: the latents of this pipeline are no picture that could be blurred: they are packed "
                "into tokens, or a video. Guidances that need no picture: 'pag', 'seg', 'slg'."
            )
        run.state.seen = parent = UNCOND if UNCOND in run.own else COND
        point = Degraded(parent, run.attention_layers(self.layers), self.threshold, self.sigma)
        run.state.degraded = Branch(parent.condition, point=point)

    def acts_at(self, step: Step) -> bool:
        """Whether there is anything to do: pure noise holds no picture that could be degraded."""
        return self.scale > 0 and step.level.holds_signal

    def branches(self, step: Step) -> Sequence[Branch]:
        return (step.state.seen, step.state.degraded) if self.acts_at(step) else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        if not self.acts_at(step):
            return None
        prediction, degraded = predictions[step.state.seen], predictions[step.state.degraded]
        noise = step.epsilon(prediction)
        further = noise + self.scale * (noise - step.epsilon(degraded, step.points[step.state.degraded]))
        return step.from_epsilon(further) - prediction
