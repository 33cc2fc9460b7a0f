"""`python -m benchmarks.posterior`: gradient guidances against posteriors that are known in closed form.

Data in the plane, a Gaussian or a mixture of two, with the exact denoiser; one linear observation `y = h.x + s e`. The
posterior is a Gaussian or a mixture again, so the mean and the covariance of the samples can be compared with its own.
With the exact gradient of `log p(y | x_t)` the conditional is sampled; every training-free method puts something else
in its place, and the table shows what that costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

import trimtab
from trimtab.guidance.noise import noise_algebra


@dataclass(frozen=True)
class Mixture:
    """`sum_k w_k N(m_k, C_k)` in the plane: weights `[k]`, means `[k, 2]`, covariances `[k, 2, 2]`."""

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    def observed(self, h: torch.Tensor, y: float, s: float) -> Mixture:
        """Given `y = h.x + s e`."""
        spread = torch.einsum("i,kij,j->k", h, self.covariances, h) + s**2
        gain = self.covariances @ h / spread[:, None]
        off = y - self.means @ h
        logits = self.weights.log() - 0.5 * spread.log() - off**2 / (2 * spread)
        covariances = self.covariances - torch.einsum("ki,kj->kij", gain, self.covariances @ h)
        return Mixture(logits.softmax(0), self.means + gain * off[:, None], covariances)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[2]` and covariance `[2, 2]`."""
        mean = self.weights @ self.means
        off = self.means - mean
        between = torch.einsum("k,ki,kj->ij", self.weights, off, off)
        return mean, between + torch.einsum("k,kij->ij", self.weights, self.covariances)

    def given(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of x_0 given x_t `[n, 2]`: logarithms of the weights `[n, k]`, means `[n, k, 2]`, covariances `[k, 2, 2]`."""
        total = alpha**2 * self.covariances + sigma**2 * torch.eye(2)
        gain = alpha * self.covariances @ torch.linalg.inv(total)
        off = x[:, None] - alpha * self.means
        quadratic = torch.einsum("nki,kij,nkj->nk", off, torch.linalg.inv(total), off)
        logits = self.weights.log() - 0.5 * torch.logdet(total) - 0.5 * quadratic
        covariances = self.covariances - alpha * gain @ self.covariances
        return logits.log_softmax(1), self.means + torch.einsum("kij,nkj->nki", gain, off), covariances


GAUSSIAN = Mixture(torch.ones(1), torch.tensor([[0.2, -0.3]]), torch.tensor([[[0.6, 0.3], [0.3, 0.4]]]))
TWO = Mixture(
    torch.tensor([0.6, 0.4]),
    torch.tensor([[-0.8, 0.2], [0.9, -0.4]]),
    torch.tensor([[[0.2, 0.05], [0.05, 0.15]], [[0.15, -0.06], [-0.06, 0.2]]]),
)
H, Y, S = torch.tensor([1.0, 0.5]), 0.7, 0.3


class ExactDenoiser(ModelMixin, ConfigMixin):
    """Predicts the noise in x_t `[n, 1, 1, 2]`, exactly."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.data = GAUSSIAN
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, sample: torch.Tensor, timestep: Any, alpha: float, sigma: float) -> tuple[torch.Tensor]:
        x = sample.flatten(1) * self.one
        logits, means, _ = self.data.given(x, alpha, sigma)
        x0 = (logits.exp()[..., None] * means).sum(1)
        return (((x - alpha * x0) / sigma).view_as(sample),)


class PlanePipeline(DiffusionPipeline):
    """Samples points of the plane by DDIM."""

    def __init__(self, unet: ExactDenoiser, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, num_inference_steps: int = 100, generator: Any = None) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        algebra = noise_algebra(self.scheduler)
        for timestep in self.scheduler.timesteps:
            level = algebra.level(timestep)
            prediction = self.unet(latents, timestep, alpha=level.alpha, sigma=level.sigma)[0]
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return latents


class ExactLikelihood(nn.Module):
    """`log p(y | x_t)` as the only logit of a classifier that sees the noisy sample."""

    def __init__(self, data: Mixture, powers: torch.Tensor) -> None:
        super().__init__()
        self.data, self.powers = data, powers

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        power = float(self.powers[int(timestep[0])])
        logits, means, covariances = self.data.given(sample.flatten(1), power**0.5, (1 - power) ** 0.5)
        spread = torch.einsum("i,kij,j->k", H, covariances, H) + S**2
        each = logits - 0.5 * spread.log() - (Y - means @ H).square() / (2 * spread)
        return each.logsumexp(1, keepdim=True)


def energy(points: torch.Tensor) -> torch.Tensor:
    """`-log p(y | x_0)`, up to a constant."""
    return (points.flatten(1) @ H - Y).square() / (2 * S**2)


def residual(points: torch.Tensor) -> torch.Tensor:
    """`|y - h.x_0|`, for DPS."""
    return (points.flatten(1) @ H - Y).square().add(1e-12).sqrt()


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPS": ("tfg", {"preset": "dps", "energy": residual, "rho": 0.1}),
    "LGD": ("tfg", {"preset": "lgd", "energy": energy, "samples": 16}),
    "MPGD": ("tfg", {"preset": "mpgd", "energy": energy, "mu": 0.01}),
    "FreeDoM": ("tfg", {"preset": "freedom", "energy": energy, "rho": 0.01}),
    "UGD": ("tfg", {"preset": "ugd", "energy": energy, "rho": 0.5, "mu": 0.005}),
    "TFG": ("tfg", {"preset": "tfg", "energy": energy, "rho": 0.01, "mu": 0.005}),
    "steered": ("steered", {"losses": (energy,)}),
    "steered, recurrence=3": ("steered", {"losses": (energy,), "recurrence": 3}),
}


EXACT = "exact log p(y | x_t)"


def start_of(count: int) -> torch.Tensor:
    """The noise `[count, 1, 1, 2]` that sampling starts from."""
    return torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(0))


def sampled(data: Mixture, start: torch.Tensor, steps: int, method: str, **changed: Any) -> torch.Tensor:
    """Points `[n, 2]` by one method, with some of its parameters changed."""
    pipe = trimtab.guide(PlanePipeline(ExactDenoiser(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing")))
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.data = data
    exact = {
        "classifier": ExactLikelihood(data, pipe.scheduler.alphas_cumprod),
        "target": 0,
        "estimate": "x_t",
        "tau2": 0.0,
    }
    plugin, parameters = ("classifier", exact) if method == EXACT else METHODS[method]
    with pipe.guidance(plugin, **{**parameters, **changed}):
        points: torch.Tensor = pipe(start, steps, generator=torch.Generator().manual_seed(1))
    return points.flatten(1)


def errors(
    data: Mixture, count: int, steps: int, methods: Sequence[str] = (EXACT, *METHODS)
) -> dict[str, tuple[float, float, float]]:
    """By method: distance of the mean, of the covariance (Frobenius), and the share of the true variance."""
    mean, covariance = data.observed(H, Y, S).moments()
    rows = {}
    for name in methods:
        points = sampled(data, start_of(count), steps, name)
        found = torch.cov(points.T)
        share = float(found.trace() / covariance.trace())
        rows[name] = (float((points.mean(0) - mean).norm()), float((found - covariance).norm()), share)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posterior", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="samples")
    parser.add_argument("--steps", type=int, default=100, help="denoising steps")
    args = parser.parse_args(arguments)
    print("| | mean | covariance | variance, true = 1 |\n| --- | --- | --- | --- |")
    for title, data in (("Gaussian", GAUSSIAN), ("mixture", TWO)):
        for name, (mean, covariance, share) in errors(data, args.count, args.steps).items():
            print(f"| {title}, {name} | {mean:.3f} | {covariance:.3f} | {share:.2f} |")


if __name__ == "__main__":
    main()
