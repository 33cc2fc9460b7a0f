"""`trimtab train smooth`: a LoRA under which the image changes evenly with the noise.

Beside the usual loss, step-wise variation regularisation: with `v ~ N(0, I) / sqrt(C H W)` and

    r = || d/d epsilon <x0_hat(x_t(epsilon)), sqrt(1 - abar_t) v> ||

the loss is `mse + lambda mean (r - a)^2`, where a is the running mean `a <- a + 0.01 (mean r - a)`. It is
differentiated twice, so attention is computed by its definition. Of an oblong image a square at a random place is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...guidance.shipped import located
from ...training import TrainingSettings, option, train
from ..allowed import check_range
from ..cuts import random_parts, side_to_cut_from
from ..low_rank import LowRank
from ..pairs import Pairs
from ..trained import Trained
from ..weights import save_weights
from .unet import projections_of

FILE = "smooth_lora.safetensors"


@dataclass(frozen=True, kw_only=True)
class SmoothSettings(TrainingSettings):
    """What a training run of a Smooth Diffusion LoRA is made of; stored beside the weights."""

    output: str = option(
        "runs/smooth", "folder for the LoRA, its checkpoints and its log; a stopped run continues there"
    )
    base: str = option("stable-diffusion-v1-5/stable-diffusion-v1-5", "the base model, a folder or Hub repository")
    data: str = option("data", "JSONL file, or folder with the folder target")
    size: int = option(512, "side of the images, in pixels")
    crop: float = option(
        1.0, "least area of the square that is cut out at random, of the largest; 0 for the middle of all"
    )
    rank: int = option(8, "of the LoRA")
    regularisation: float = option(1.0, "lambda, the weight of the regularisation")
    batch_size: int = option(3, "images a step and process")
    accumulate: int = option(8, "batches whose gradients make one step")
    learning_rate: float = option(1e-4, "its highest value")
    weight_decay: float = option(1e-2, "of AdamW")
    ema_decay: float = option(0.0, "of the averaged weights; 0 for none")

    def __post_init__(self) -> None:
        check_range("smooth", "crop", self.crop, 0, 1)


class SmoothTraining(Trained):
    """The LoRA around the projections of the UNet's attentions, and the running mean of the variation.

    Args:
        unet: a `UNet2DConditionModel`; its projections are called through this module's LoRA.
        rank: of the LoRA.
    """

    def __init__(self, unet: Any, rank: int) -> None:
        super().__init__()
        self.__dict__["unet"] = unet.requires_grad_(False)
        self.register_buffer("mean_variation", torch.zeros(()))
        self.mean_variation: torch.Tensor
        self.loras: dict[str, LowRank] = {}
        for name in projections_of(unet):
            linear = unet.get_submodule(name)
            self.loras[name] = self.low_rank(rank, linear.in_features, linear.out_features, 1 / rank)
            linear.forward = _adapted(linear.forward, self.loras[name])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction under the LoRA."""
        return self.__dict__["unet"](sample, timestep, text, return_dict=False)[0]


def train_smooth(settings: SmoothSettings) -> Path:
    """Train, or continue where the last checkpoint in `settings.output` stopped; returns the LoRA's file."""
    torch.manual_seed(settings.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(located(settings.base), torch_dtype=dtype, use_safetensors=True)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    model = SmoothTraining(pipe.unet, settings.rank)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    file = Path(settings.output) / FILE

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return smooth_loss(model, pipe, scheduler, cut(batch, settings, generator), settings.regularisation, generator)

    def export(model: Any) -> None:
        save_weights(file, written(model.loras))

    train("smooth", model, pictures_of(settings), loss, settings, export)
    return file


def pictures_of(settings: SmoothSettings) -> Pairs:
    """The training data, as what is cut from them asks for them."""
    side = side_to_cut_from(settings.size, 1.0, settings.crop or 1.0)
    return Pairs(settings.data, side, source="", whole=settings.crop > 0)


def cut(batch: Any, settings: SmoothSettings, generator: torch.Generator) -> Any:
    """The batch with what is seen of its images."""
    if settings.crop == 0:
        return batch
    parts = random_parts(batch["aspect"], (settings.size, settings.size), settings.crop, 0.0, generator)
    return {**batch, "target": parts(batch["target"])}


def written(loras: dict[str, LowRank]) -> dict[str, torch.Tensor]:
    """The tensors in the published format, by the names of Diffusers' older attention processors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, lora in loras.items():
        attention, projection = name.removesuffix(".0").rsplit(".", 1)
        for part in ("down", "up"):
            tensors[f"{attention}.processor.{projection}_lora.{part}.weight"] = getattr(lora, part)
    return tensors


def smooth_loss(
    model: Any, pipe: Any, scheduler: Any, batch: Any, weight: float, generator: torch.Generator
) -> torch.Tensor:
    """The loss of one batch of `target` and `caption`."""
    pipe.to(generator.device)
    with torch.no_grad():
        pixels = batch["target"].to(generator.device, pipe.vae.dtype)
        clean = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
        text = pipe.encode_prompt(batch["caption"], pipe.device, 1, False)[0]
    shape = {"size": clean.shape, "generator": generator, "device": clean.device, "dtype": clean.dtype}
    noise = torch.randn(**shape).requires_grad_(True)
    v = torch.randn(**shape)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator, device=clean.device)
    with sdpa_kernel(SDPBackend.MATH):
        noised = scheduler.add_noise(clean, noise, t)
        prediction = model(noised, t, text)
        error = F.mse_loss(prediction.float(), _wanted(scheduler, clean, noise, t).float())
        r = variation(scheduler, prediction, noised, noise, v, t)
        running = _inner(model).mean_variation
        running += 0.01 * (r.detach().mean() - running)
        return error + weight * (r - running.clone()).square().mean()


def variation(
    scheduler: Any, prediction: torch.Tensor, noised: torch.Tensor, noise: torch.Tensor, v: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """r `[batch]`, differentiable: how much the clean estimate changes with the noise in a random direction."""
    alpha_bar = scheduler.alphas_cumprod.to(noise.device)[t].to(noise.dtype).view(-1, *[1] * (noise.ndim - 1))
    if scheduler.config.prediction_type == "v_prediction":
        x0 = alpha_bar.sqrt() * noised - (1 - alpha_bar).sqrt() * prediction
    else:
        x0 = (noised - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    direction = v / noise[0].numel() ** 0.5 * (1 - alpha_bar).sqrt()
    (gradient,) = torch.autograd.grad((x0 * direction).sum(), noise, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def _wanted(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise.detach(), t)
    return noise.detach()


def _inner(model: nn.Module) -> Any:
    """The model without what Accelerate wrapped around it."""
    return getattr(model, "module", model)


def _adapted(forward: Any, lora: LowRank) -> Any:
    def adapted(states: torch.Tensor, *args: Any) -> torch.Tensor:
        return forward(states, *args) + lora(states)

    return adapted
