"""`trimtab train emoji-autoencoder`: images of 64x64 to latents of 16x16 and back.

Loss: `|x - D(z)| + w |grad x - grad D(z)| + b KL(q(z|x) || N(0, 1))` with z drawn from q, the gradients by differences
of neighbouring pixels. The latents' scale is measured at the end, so that they have unit variance for the denoisers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import TensorDataset

from ...training import TrainingSettings, option, train
from .card import write_card
from .data import SIZE, EmojiData, to_unit

USAGE = """from diffusers import AutoencoderKL

autoencoder = AutoencoderKL.from_pretrained("FOLDER")"""


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(TrainingSettings):
    """What a training run of the autoencoder is made of."""

    output: str = option("runs/emoji-autoencoder", "folder for the model, its checkpoints and its log")
    data: str = option("runs/emoji.safetensors", "the packed data set")
    steps: int = option(6000, "optimizer steps")
    batch_size: int = option(16, "images a step and process")
    learning_rate: float = option(1e-3, "its highest value")
    ema_decay: float = option(0.999, "of the averaged weights; 0 for none")
    width: int = option(32, "channels at the highest resolution, a multiple of 8")
    gradient_weight: float = option(1.0, "w, of the differences of neighbouring pixels")
    kl_weight: float = option(1e-4, "b, of the latents' divergence from the normal distribution")
    checkpoint_every: int = option(500, "steps")
    validate_every: int = option(500, "steps")


def build_autoencoder(width: int) -> AutoencoderKL:
    """Three resolutions, four latent channels; unit scale until it is measured."""
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 3 * width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def train_autoencoder(settings: AutoencoderSettings) -> Path:
    """Train, or continue; returns the folder of the autoencoder in Diffusers format."""
    torch.manual_seed(settings.seed)
    folder = Path(settings.output) / "model"
    images, held_out = EmojiData(settings.data).images, to_unit(EmojiData(settings.data, held_out=True).images)

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        x = to_unit(batch[0])
        decoded, divergence = model(x, generator)
        pixels = (decoded - x).abs().mean()
        steps = sum((decoded - x).diff(dim=dim).abs().mean() for dim in (2, 3))
        return pixels + settings.gradient_weight * steps + settings.kl_weight * divergence.mean() / x[0].numel()

    def validate(model: nn.Module) -> dict[str, float]:
        return {"psnr": psnr(model.autoencoder, held_out)}

    def export(model: nn.Module) -> None:
        assert isinstance(model, RoundTrip)
        autoencoder = model.autoencoder
        scale = _unit_scale(autoencoder, to_unit(images[:: max(1, len(images) // 1000)]))
        autoencoder.register_to_config(scaling_factor=scale)
        autoencoder.save_pretrained(folder)
        write_card(
            folder, autoencoder, settings, "emoji-autoencoder", title="Autoencoder of emoji",
            about="Images of 64x64 to latents of 16x16x4 and back.", usage=USAGE, library="diffusers",
            task="image-to-image",
        )  # fmt: skip

    model = RoundTrip(build_autoencoder(settings.width))
    train("emoji-autoencoder", model, TensorDataset(images), loss, settings, export, validate)
    return folder


class RoundTrip(nn.Module):
    """An autoencoder whose forward call is what is trained: only through that are gradients averaged over processes."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images decoded from a draw of their posterior, and the divergence `[batch]` of that."""
        posterior = self.autoencoder.encode(x).latent_dist
        return self.autoencoder.decode(posterior.sample(generator)).sample.float(), posterior.kl()


@torch.no_grad()
def psnr(autoencoder: Any, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of images `[n, 3, 64, 64]` in -1..1 after encoding (mode) and decoding."""
    device = next(autoencoder.parameters()).device
    errors = []
    for batch in images.split(64):
        x = batch.to(device)
        decoded = autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - x).square().mean(dim=(1, 2, 3)) / 4)
    return float(-10 * torch.cat(errors).log10().mean())


@torch.no_grad()
def _unit_scale(autoencoder: Any, images: torch.Tensor) -> float:
    device = next(autoencoder.parameters()).device
    latents = [autoencoder.encode(batch.to(device)).latent_dist.mode() for batch in images.split(64)]
    return float(1 / torch.cat(latents).std())
