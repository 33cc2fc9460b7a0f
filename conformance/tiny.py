"""Tiny pipelines with random weights, made in memory from configurations: no files, no network, milliseconds a run."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5Tokenizer

from ..pipelines.fashion import ClassConditionalPipeline

CHARACTERS = string.ascii_lowercase + string.digits + ".,!?"
WIDTH = 32
LENGTH = 32
HEADS = 2
HEAD_DIM = 16
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def assemble(build: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """Build with fixed seeds and in eval mode, as `from_pretrained` does; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single characters, `LENGTH` tokens long, padded with the end token."""
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def clip_text(projection: bool = False, width: int = WIDTH) -> transformers.PreTrainedModel:
    """A CLIP text encoder of `width` channels, with a projection head if `projection`."""
    size = 2 * len(CHARACTERS) + 2
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer (Unigram) that knows single characters."""
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in ("▁", *CHARACTERS)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=LENGTH)


def t5_encoder(width: int = WIDTH, umt5: bool = False) -> transformers.PreTrainedModel:
    """A T5 (or UMT5) encoder of `width` channels."""
    config = (transformers.UMT5Config if umt5 else T5Config)(
        vocab_size=len(CHARACTERS) + 4,
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    return (transformers.UMT5EncoderModel if umt5 else transformers.T5EncoderModel)(config)


def vae(latent_channels: int = 4, levels: int = 2, **config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder that reduces each side by `2 ** (levels - 1)`."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion's layout with three levels: latents of 16x16, so 16 tokens in the mid block, and 4 heads."""
    defaults: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "down_block_types": (CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **config})


def ddim() -> diffusers.DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd_components(**config: Any) -> dict[str, Any]:
    """The components of a Stable Diffusion pipeline; `config` goes to the UNet."""
    return {
        "unet": unet(**config),
        "vae": vae(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd15() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**sd_components())


def flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd3(**config: Any) -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            caption_projection_dim=HEADS * HEAD_DIM,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            **config,
        ),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(projection=True),
        text_encoder_2=clip_text(projection=True),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=flow(),
    )


def class_conditional(names: Sequence[str], side: int = 8, **scheduler: Any) -> ClassConditionalPipeline:
    """A pipeline of the classes `names` and grey images of `side` pixels, always the same weights.

    Args:
        **scheduler: options of its DDIM scheduler.
    """

    def build() -> ClassConditionalPipeline:
        unet = diffusers.UNet2DModel(
            sample_size=side,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=len(names) + 1,
        )
        return ClassConditionalPipeline(unet, diffusers.DDIMScheduler(clip_sample=False, **scheduler), list(names))

    return assemble(build)
