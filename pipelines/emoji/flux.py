"""`trimtab train emoji-flux`: a text-to-image flow transformer of emoji in Flux format, with its text encoders.

Loss: `|u_theta(x_t, t, c) - (n - x_0)|^2` with `x_t = (1 - t) x_0 + t n`, t uniform and then shifted towards noise
(Esser et al., 2024) as in sampling; the caption is dropped with probability `caption_dropout`, so that true
classifier-free guidance works. Not distilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

from ...training import option, train
from .card import write_card
from .data import EmojiData
from .latents import Drawings, go_on_from, half, keep_card, load_autoencoder
from .sd import DenoiserSettings
from .text import WIDTH, clip_encoder, clip_tokenizer, kept, t5_encoder, t5_tokenizer

ABOUT = (
    "A text-to-image model of emoji in Flux format: latents of 16x16x4 for images of 64x64, a flow-matching "
    "transformer of double and single blocks, CLIP and T5 text encoders of its own. It is not distilled: true "
    "classifier-free guidance."
)
USAGE = """import trimtab

pipe = trimtab.GuidedPipeline.from_pretrained("FOLDER")
pipe.add_guidance("pag", scale=1.0)
call = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 25}
pipe("red apple, noto style", negative_prompt="", true_cfg_scale=4.0, **call).images[0]"""


HEAD, AXES = 64, (8, 28, 28)
"""Channels of a head, and those that turn with each axis of the position: the more there are, the more turn neither too
little over eight rows nor more than once."""
SHIFT = 2.0
"""Towards noise, where it is decided what is drawn where: flat drawings on white can still be seen at half noise."""


@dataclass(frozen=True, kw_only=True)
class FluxSettings(DenoiserSettings):
    """What a training run of `emoji-flux` is made of."""

    output: str = option("runs/emoji-flux", "folder for the model, its checkpoints and its log")
    width: int = option(192, "channels; a multiple of 64")
    double_blocks: int = option(3, "blocks with streams of their own for text and image")
    single_blocks: int = option(6, "blocks with one stream")


class TextFlux(nn.Module):
    """The transformer with its two text encoders, trained as one.

    Args:
        tokenizer, tokenizer_2: of the captions.
        settings: the transformer's size.
    """

    def __init__(self, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer, settings: FluxSettings) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.text_encoder = clip_encoder(self.tokenizer, width=96, layers=2)
        self.text_encoder_2 = t5_encoder(self.tokenizer_2)
        self.transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=settings.double_blocks, num_single_layers=settings.single_blocks,
            attention_head_dim=HEAD, num_attention_heads=settings.width // HEAD,
            joint_attention_dim=WIDTH, pooled_projection_dim=96, axes_dims_rope=AXES, guidance_embeds=False,
        )  # fmt: skip

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The predicted velocity `[batch, 4, 16, 16]`, with t in 0..1."""
        device, options = x_t.device, {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        pooled = self.text_encoder(self.tokenizer(captions, **options).input_ids.to(device)).pooler_output
        states = self.text_encoder_2(self.tokenizer_2(captions, **options).input_ids.to(device)).last_hidden_state
        batch, channels, height, width = x_t.shape
        velocity = self.transformer(
            hidden_states=FluxPipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=torch.zeros(states.shape[1], 3, device=device),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, torch.float32),
        ).sample
        # Of an image of so many pixels, at four pixels a latent.
        return FluxPipeline._unpack_latents(velocity, 4 * height, 4 * width, vae_scale_factor=4)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """`s t / (1 + (s - 1) t)`: levels of noise as the scheduler takes them, with s = `SHIFT`."""
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def train_flux(settings: FluxSettings) -> Path:
    """Train, or continue; returns the folder of the pipeline in Diffusers format."""
    torch.manual_seed(settings.seed)
    folder, scheduler = Path(settings.output) / "model", FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    trained = Path(settings.start) / "vae" if settings.start else Path(settings.autoencoder)
    autoencoder = load_autoencoder(trained)
    drawings, held_out = (
        Drawings(EmojiData(settings.data, split, settings.categories), autoencoder, copies)
        for split, copies in ((False, settings.copies), (True, 1))
    )

    def error(model: Any, source: Drawings, chosen: torch.Tensor, dropout: float, generator: Any) -> torch.Tensor:
        x0, captions = source.draw(chosen, dropout, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        t = shifted(torch.rand(len(x0), generator=generator, device=x0.device))
        mixed = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        return (model(mixed, t, captions).float() - (noise - x0)).square().mean()

    def loss(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return error(model, drawings, batch[0], settings.caption_dropout, generator)

    def validate(model: nn.Module) -> dict[str, float]:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        chosen = held_out.indices.tensors[0][:256]
        return {"validation_loss": float(error(model, held_out, chosen, 0.0, generator))}

    def export(model: nn.Module) -> None:
        assert isinstance(model, TextFlux)
        pipe = FluxPipeline(
            scheduler=scheduler, vae=half(autoencoder), text_encoder=model.text_encoder, tokenizer=model.tokenizer,
            text_encoder_2=model.text_encoder_2, tokenizer_2=model.tokenizer_2, transformer=half(model.transformer),
        )  # fmt: skip
        pipe.save_pretrained(folder)
        keep_card(trained, folder / "vae")
        write_card(
            folder, model, settings, "emoji-flux", title="emoji-flux", about=ABOUT, usage=USAGE, library="diffusers"
        )

    tokenizer = kept(folder / "tokenizer", CLIPTokenizer, clip_tokenizer, drawings.captions, settings.start)
    tokenizer_2 = kept(folder / "tokenizer_2", T5Tokenizer, t5_tokenizer, drawings.captions, settings.start)
    model = TextFlux(tokenizer, tokenizer_2, settings)
    if settings.start:
        parts = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2}
        go_on_from(settings.start, transformer=model.transformer, **parts)
    if settings.compile:
        model.transformer.compile()
    train("emoji-flux", model, drawings.indices, loss, settings, export, validate)
    return folder
