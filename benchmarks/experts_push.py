"""How experts push: their gradient of `log p(c | x_t)` by noise, beside the exact one of the images they learnt from.

For clean images `x_i` with class probabilities `p_i(c)`, as experts are taught them, drawn with equal chance,

    grad log p(c | x_t) = alpha / sigma^2 (E[x_0 | x_t, c] - E[x_0 | x_t])

whose expectations are means of the images, weighted by `N(x_t; alpha x_i, sigma^2)`, and by `p_i(c)` in the first. At
little noise one image has all of the weight and nothing is left of the gradient; so it is asked for where much is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.adapters.ppap.experts import load_experts
from trimtab.adapters.ppap.noise import noised
from trimtab.adapters.ppap.train import TEMPERATURE
from trimtab.adapters.weights import load_weights
from trimtab.guidance.images import Preprocessing
from trimtab.pipelines.fashion.data import CLASS_NAMES

RANGES = 5
EXACT = 2
"""The noisiest of the ranges, where the exact gradient is asked for."""
PUSHED = 200
"""Images of which gradients are taken."""


class Exact:
    """The exact gradient of `log p(c | x_t)` for some images as the only ones that there are.

    Args:
        images: clean `[n, ...]`.
        probabilities: of their classes, `[n, classes]`.
        alphas: `alpha_t^2` of all timesteps.
    """

    def __init__(self, images: torch.Tensor, probabilities: torch.Tensor, alphas: torch.Tensor) -> None:
        self.images, self.probabilities, self.alphas = images.flatten(1), probabilities, alphas

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """`[batch, values]` at `x_t` `[batch, ...]`, timesteps `t` and classes `wanted` `[batch]`."""
        alpha, variance = self.alphas[t].sqrt()[:, None], 1 - self.alphas[t][:, None]
        squares = self.images.square().sum(1)
        near = ((alpha * x_t.flatten(1) @ self.images.T - alpha.square() * squares / 2) / variance).softmax(1)
        of_class = near * self.probabilities[:, wanted].T
        of_class = of_class / of_class.sum(1, keepdim=True)
        return alpha / variance * (of_class @ self.images - near @ self.images)


def pushes(pipe: Any, guide: nn.Module, images: torch.Tensor, file: Path) -> dict[str, list[float]]:
    """By range of timesteps, from little noise to much.

    Args:
        pipe: whose scheduler adds the noise.
        guide: the classifier of clean images whose experts are in `file`.
        images: clean `[n, ...]` in -1..1, that the experts learnt from.

    Returns:
        `push`: the mean norm of the experts' gradient; and of the `EXACT` noisiest ranges `exact`, that of the exact
        gradient, and `cosine`, the mean cosine of the two.
    """
    experts, preprocessing = load_experts(guide, load_weights(file)), Preprocessing()
    with torch.no_grad():
        logits = torch.cat([guide(preprocessing(part)) for part in images.split(PUSHED)])
    true = Exact(images, (logits / TEMPERATURE).softmax(1), pipe.scheduler.alphas_cumprod)
    x0 = images[:PUSHED]
    wanted = torch.arange(len(x0)) % len(CLASS_NAMES)
    generator, found = torch.Generator().manual_seed(0), {"push": [], "exact": [], "cosine": []}
    for index in range(RANGES):
        low, high = (experts.timesteps * edge // RANGES for edge in (index, index + 1))
        t = torch.randint(low, high, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = noised(pipe.scheduler, x0, noise, t).requires_grad_()
        score = experts(preprocessing(x_t), t).log_softmax(1).gather(1, wanted[:, None]).sum()
        gradient = torch.autograd.grad(score, x_t)[0].flatten(1)
        found["push"].append(gradient.norm(dim=1).mean().item())
        if index >= RANGES - EXACT:
            exact = true(x_t.detach(), t, wanted)
            found["exact"].append(exact.norm(dim=1).mean().item())
            found["cosine"].append(torch.cosine_similarity(gradient, exact, dim=1).mean().item())
    return found
