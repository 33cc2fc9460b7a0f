"""A pipeline over the exact denoiser of a Gaussian or of a mixture of Gaussians, for losses that have closed forms."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

import trimtab
from trimtab.guidance.noise import noise_algebra


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """Predicts what `kind` says, for data `sum_k weight_k N(mean_k, variance_k)` per pixel, pixels independent."""

    @register_to_config
    def __init__(self, means: list, variances: list, weights: list, kind: str = "epsilon") -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def posterior(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Responsibilities and clean estimates of the components, `[..., k]`."""
        mean, variance, weight = (torch.tensor(self.config[key], dtype=x.dtype) for key in
                                  ("means", "variances", "weights"))  # fmt: skip
        total = sigma**2 + alpha**2 * variance
        off = x[..., None] - alpha * mean
        logits = weight.log() - 0.5 * total.log() - off.square() / (2 * total)
        return logits.softmax(-1), mean + alpha * variance / total * off

    def forward(self, sample: torch.Tensor, timestep: Any, alpha: float, sigma: float) -> tuple[torch.Tensor]:
        x = sample * self.scale
        share, clean = self.posterior(x, alpha, sigma)
        x0 = (share * clean).sum(-1)
        n = (x - alpha * x0) / sigma
        return (n if self.config.kind == "epsilon" else n - x0,)


class MixturePipeline(DiffusionPipeline):
    """Samples `[batch, 1, 1, width]`."""

    def __init__(self, unet: MixtureDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, num_inference_steps: int = 50, eta: float = 0.0, generator: Any = None
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        algebra = noise_algebra(self.scheduler)
        options = {"eta": eta, "generator": generator} if isinstance(self.scheduler, DDIMScheduler) else {}
        for timestep in self.scheduler.timesteps:
            level = algebra.level(timestep)
            prediction = self.unet(latents, timestep, alpha=level.alpha, sigma=level.sigma)[0]
            latents = self.scheduler.step(prediction, timestep, latents, **options).prev_sample
        return latents


def pipeline(means: list[float], variances: list[float], weights: list[float] | None = None, flow: bool = False) -> Any:
    """A guidable one, with DDIM or, for `flow`, flow matching."""
    weights = weights or [1 / len(means)] * len(means)
    kind = "flow" if flow else "epsilon"
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=1.0)
        if flow
        else DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    )
    pipe = trimtab.guide(MixturePipeline(MixtureDenoiser(means, variances, weights, kind), scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(width: int = 4, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 1, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
