"""One clean-image network as noise, velocity, sample and flow prediction, through levels of equal noise per signal.

All four deterministic samplers then visit the same states up to a factor, `x' = alpha' x_0 + sigma' n`, and end with
the same image, so a guidance that is written once for all of them must lead to one image as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel

from ..pipelines.fashion import ClassConditionalPipeline
from .stages import Stage
from .tiny import assemble

SPAN = 9.0
RATIOS = (SPAN, 1.0, 1 / SPAN)
"""sigma / alpha at the three levels."""
FLOW_SIGMAS = (0.9, 0.5, 0.1)
FLOW_TIMESTEPS = 10
STRIDE = 25
"""Timesteps of the variance-preserving schedule between two levels; three strides are all that it has."""
SIDE = 8


class CleanImageUNet(UNet2DModel):
    """Reads `x_t / sqrt(alpha^2 + sigma^2)`, computes x_0, and returns it in the parametrisation `kind`."""

    kind = "epsilon"

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        time = float(torch.as_tensor(timestep).flatten()[0])
        if self.kind == "flow":
            index = FLOW_SIGMAS.index(round(time / FLOW_TIMESTEPS, 4))
        else:
            index = len(RATIOS) - 1 - int(time) // STRIDE
        norm = (1 + RATIOS[index] ** 2) ** 0.5
        alpha, sigma = 1 / norm, RATIOS[index] / norm
        size = (1 - FLOW_SIGMAS[index]) / alpha if self.kind == "flow" else 1.0
        unit = sample / size
        output = super().forward(unit, torch.tensor(300.0 * index), *args, **kwargs)
        x0 = output[0]
        noise = (unit - alpha * x0) / sigma
        prediction = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x0,
            "sample": x0,
            "flow": noise - x0,
        }[self.kind]
        return (prediction,) if isinstance(output, tuple) else type(output)(sample=prediction)


def _build(kind: str) -> ClassConditionalPipeline:
    unet = CleanImageUNet(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    unet.kind = kind
    return ClassConditionalPipeline(unet, _flow() if kind == "flow" else _variance_preserving(kind), ["Cat", "Dog"])


def _flow() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_TIMESTEPS)
    scheduler.sigma_max = FLOW_SIGMAS[0]  # where its schedule begins: at 1 there would be no signal to compare
    return scheduler


def _variance_preserving(kind: str) -> Any:
    ratios = [SPAN ** (time / STRIDE - 1) for time in range(len(RATIOS) * STRIDE)]
    alphas_cumprod = [1 / (1 + ratio**2) for ratio in ratios]
    before = [1.0, *alphas_cumprod[:-1]]
    betas = [1 - now / previous for now, previous in zip(alphas_cumprod, before, strict=True)]
    return diffusers.DDIMScheduler(
        num_train_timesteps=len(betas), trained_betas=betas, prediction_type=kind, clip_sample=False
    )


def _start(kind: str) -> torch.Tensor:
    unit = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    first = FLOW_SIGMAS[0]
    return unit * ((1 - first) ** 2 + first**2) ** 0.5 if kind == "flow" else unit


PARAMETRISATIONS = tuple(
    Stage(
        kind,
        partial(assemble, partial(_build, kind)),
        {"class_labels": [0], "num_inference_steps": len(RATIOS), "output_type": "pt", "latents": _start(kind)},
    )
    for kind in ("epsilon", "v_prediction", "sample", "flow")
)
