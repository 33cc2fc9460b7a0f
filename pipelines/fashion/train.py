"""`trimtab train base`: train the Fashion-MNIST model.

Loss: velocity prediction of a variance-preserving diffusion, `|| v_theta(x_t, t, y) - v ||^2` with
`x_t = alpha_t x_0 + sigma_t n` and `v = alpha_t n - sigma_t x_0` (Salimans & Ho, 2022), t uniform over 1000 levels, the
label replaced by the null class with probability `label_dropout`, and an exponential moving average of the weights.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.utils.data import TensorDataset

from ...training import TrainingSettings, option, train
from ...training.log import read_log
from .card import write_card
from .data import CLASS_NAMES, load
from .pipeline import ClassConditionalPipeline


@dataclass(frozen=True, kw_only=True)
class BaseSettings(TrainingSettings):
    """What a training run of the Fashion-MNIST model is made of; stored beside the weights."""

    output: str = option(
        "runs/base", "folder for the model, its checkpoints and its log; a stopped run continues there"
    )
    data: str | None = option(None, "folder with the four IDX files of Fashion-MNIST")
    label_dropout: float = option(0.1, "share of labels replaced by the null class")


def build_unet() -> UNet2DModel:
    """The denoiser: three resolutions, self-attention at 16x16 and 8x8, ten classes and the null class."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(CLASS_NAMES) + 1,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training; no clipping, because it would keep the unclipped epsilon and break guidance."""
    return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")


def train_base(settings: BaseSettings) -> Path:
    """Train, or continue where the last checkpoint in `settings.output` stopped; returns the model's folder."""
    torch.manual_seed(settings.seed)
    unet, scheduler, folder = build_unet(), build_scheduler(), Path(settings.output) / "model"
    held_out = load("t10k", settings.data)

    def loss(unet: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        images, labels = batch
        return velocity_loss(unet, scheduler, images, labels, settings.label_dropout, generator)

    def validate(unet: torch.nn.Module) -> dict[str, float]:
        return {"validation_loss": _validation_loss(unet, scheduler, held_out)}

    def export(unet: torch.nn.Module) -> None:
        pipe = ClassConditionalPipeline(copy.deepcopy(unet).half(), scheduler, CLASS_NAMES)
        pipe.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(settings.to_store(), indent=2) + "\n")
        write_card(folder, settings, read_log(settings.output), sum(p.numel() for p in unet.parameters()))

    data = TensorDataset(*load("train", settings.data))
    train("base", unet, data, loss, settings, export, validate)
    return folder


def velocity_loss(
    unet: Any,
    scheduler: DDIMScheduler,
    x0: torch.Tensor,
    labels: torch.Tensor,
    dropout: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared velocity error of one batch `[batch, 1, 32, 32]`."""
    count, device = len(x0), x0.device
    noise = torch.randn(x0.shape, generator=generator, device=device)
    t = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < dropout
    v = unet(scheduler.add_noise(x0, noise, t), t, class_labels=labels.masked_fill(dropped, len(CLASS_NAMES))).sample
    return torch.nn.functional.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))


def _validation_loss(unet: Any, scheduler: DDIMScheduler, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The loss on 1,000 held-out images, always with the same noise and levels."""
    device = next(unet.parameters()).device
    images, labels = (tensor[:1000].to(device).split(250) for tensor in data)
    generator = torch.Generator(device).manual_seed(0)
    losses = [velocity_loss(unet, scheduler, x, y, 0.0, generator) for x, y in zip(images, labels, strict=True)]
    return torch.stack(losses).mean().item()
