"""`trimtab train emoji-sd`: a text-to-image UNet of emoji in Stable Diffusion format, with its text encoder.

Loss: velocity prediction `min(SNR + 1, g) / (SNR + 1) |v_theta(x_t, t, c) - v|^2` with `v = alpha_t n - sigma_t x_0`
(Salimans & Ho, 2022) under a schedule whose last level is pure noise (Lin et al., 2024); the caption is dropped with
probability `caption_dropout`. The text encoder is trained with the UNet. The weight is that of min-SNR (Hang et al.,
2023) for the clean image, but never below that of the velocity: with `min(SNR, g)` the noisiest levels, which decide
what is drawn where, would count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTokenizer

from ...training import TrainingSettings, option, train
from .card import write_card
from .data import EmojiData
from .latents import Drawings, go_on_from, half, keep_card, load_autoencoder
from .text import WIDTH, clip_encoder, clip_tokenizer, kept

ABOUT = (
    "A text-to-image model of emoji in Stable Diffusion format: latents of 16x16x4 for images of 64x64, a UNet with "
    "self- and cross-attention at two resolutions, a CLIP text encoder of its own. It predicts velocity under a "
    "schedule whose last level is pure noise."
)
USAGE = """import trimtab

pipe = trimtab.GuidedPipeline.from_pretrained("FOLDER")
pipe.add_guidance("pag", scale=2.0, layers="up")
pipe("red apple, noto style", guidance_scale=4.0, num_inference_steps=25).images[0]"""


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(TrainingSettings):
    """What a training run of a text-to-image denoiser of emoji is made of."""

    data: str = option("runs/emoji.safetensors", "the packed data set")
    autoencoder: str = option("runs/emoji-autoencoder/model", "folder of the trained autoencoder")
    steps: int = option(40000, "optimizer steps")
    batch_size: int = option(128, "images a step and process")
    learning_rate: float = option(6e-4, "its highest value")
    warmup: int = option(500, "steps until it is reached")
    caption_dropout: float = option(0.1, "share of empty captions")
    categories: str = option("", "only emoji of these, with commas between; all by default")
    copies: int = option(1, "of each image: the first as it is, the others moved, and every second one mirrored")
    start: str = option("", "folder of a trained model to go on from, with its autoencoder and its words")
    compile: int = option(0, "1 to compile the denoiser: minutes at the start, then faster steps")
    checkpoint_every: int = option(1000, "steps")
    validate_every: int = option(1000, "steps")


@dataclass(frozen=True, kw_only=True)
class SDSettings(DenoiserSettings):
    """What a training run of `emoji-sd` is made of."""

    output: str = option("runs/emoji-sd", "folder for the model, its checkpoints and its log")
    snr_limit: float = option(5.0, "g, the highest SNR + 1 that counts")
    width: int = option(112, "channels at the outer resolution; a multiple of 16")
    inner_width: int = option(160, "channels at the inner resolution; a multiple of 16")


class TextUNet(nn.Module):
    """The UNet with its text encoder, trained as one.

    Args:
        tokenizer: of the captions.
        widths: channels at the outer and at the inner resolution.
    """

    def __init__(self, tokenizer: CLIPTokenizer, widths: tuple[int, int] = (112, 160)) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = clip_encoder(self.tokenizer)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=16,
            cross_attention_dim=WIDTH,
        )
        if not torch.accelerator.is_available():
            # Plain matrix products train a fifth faster on a CPU than fused attention, which is made for longer rows.
            self.unet.set_attn_processor(AttnProcessor())
            # Convolutions of few channels are faster on a CPU with the channels last, above all compiled.
            self.unet.to(memory_format=torch.channels_last)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The predicted velocity `[batch, 4, 16, 16]`."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = self.text_encoder(tokens.to(x_t.device)).last_hidden_state
        velocity: torch.Tensor = self.unet(x_t, t, encoder_hidden_states=states).sample
        return velocity


def build_scheduler() -> DDIMScheduler:
    """A schedule whose last level is pure noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def level_weight(alphas: torch.Tensor, limit: float) -> torch.Tensor:
    """`min(SNR + 1, g) / (SNR + 1)`: how much the velocity's error counts at levels with `alpha_t^2` of the signal."""
    return (limit * (1 - alphas)).clamp(max=1)


def train_sd(settings: SDSettings) -> Path:
    """Train, or continue; returns the folder of the pipeline in Diffusers format."""
    torch.manual_seed(settings.seed)
    folder, scheduler = Path(settings.output) / "model", build_scheduler()
    widths = settings.width, settings.inner_width
    trained = Path(settings.start) / "vae" if settings.start else Path(settings.autoencoder)
    autoencoder = load_autoencoder(trained)
    drawings, held_out = (
        Drawings(EmojiData(settings.data, split, settings.categories), autoencoder, copies)
        for split, copies in ((False, settings.copies), (True, 1))
    )

    def error(model: Any, source: Drawings, chosen: torch.Tensor, dropout: float, generator: Any) -> torch.Tensor:
        x0, captions = source.draw(chosen, dropout, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        t = torch.randint(1000, (len(x0),), generator=generator, device=x0.device)
        alphas = scheduler.alphas_cumprod.to(x0.device)[t]
        weight = level_weight(alphas, settings.snr_limit)
        v = model(scheduler.add_noise(x0, noise, t), t, captions).float()
        squared = (v - scheduler.get_velocity(x0, noise, t)).square().mean(dim=(1, 2, 3))
        return (weight * squared).mean() / weight.mean()

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return error(model, drawings, batch[0], settings.caption_dropout, generator)

    def validate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        chosen = held_out.indices.tensors[0][:256]
        return {"validation_loss": float(error(model, held_out, chosen, 0.0, generator))}

    def export(model: nn.Module) -> None:
        assert isinstance(model, TextUNet)
        pipe = StableDiffusionPipeline(
            vae=half(autoencoder), text_encoder=model.text_encoder, tokenizer=model.tokenizer,
            unet=half(model.unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipe.save_pretrained(folder)
        keep_card(trained, folder / "vae")
        write_card(folder, model, settings, "emoji-sd", title="emoji-sd", about=ABOUT, usage=USAGE, library="diffusers")

    tokenizer = kept(folder / "tokenizer", CLIPTokenizer, clip_tokenizer, drawings.captions, settings.start)
    model = TextUNet(tokenizer, widths)
    if settings.start:
        go_on_from(settings.start, unet=model.unet, text_encoder=model.text_encoder)
    if settings.compile:
        model.unet.compile()
    train("emoji-sd", model, drawings.indices, loss, settings, export, validate)
    return folder
