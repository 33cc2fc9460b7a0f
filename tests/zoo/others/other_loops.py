"""Tiny pipelines that step in a way of their own: UniDiffuser, Karras et al.'s, Wuerstchen's three in one."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

from trimtab.conformance.tiny import LENGTH, WIDTH, clip_text, clip_tokenizer, ddim, vae

from ..text import clip_vision
from ..unets import ddpm
from .case import Case


def unidiffuser() -> DiffusionPipeline:
    """A picture's latents, its embedding and a text are predicted at once, and stepped as one long vector."""
    return diffusers.UniDiffuserPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        image_encoder=clip_vision(),
        clip_image_processor=transformers.CLIPImageProcessor(crop_size=224, size=224),
        clip_tokenizer=clip_tokenizer(),
        text_decoder=UniDiffuserTextDecoder(
            prefix_length=LENGTH, prefix_inner_dim=WIDTH, prefix_hidden_dim=WIDTH, vocab_size=16, n_positions=64,
            n_embd=WIDTH, n_layer=1, n_head=2,
        ),
        text_tokenizer=None,
        unet=UniDiffuserModel(
            text_dim=WIDTH, clip_img_dim=WIDTH, num_text_tokens=LENGTH, num_attention_heads=2, attention_head_dim=8,
            in_channels=4, out_channels=4, num_layers=1, sample_size=16, patch_size=2, norm_num_groups=4,
            activation_fn="gelu", block_type="unidiffuser", use_timestep_embedding=False, norm_type="layer_norm",
        ),
        scheduler=ddim(),
    )  # fmt: skip


def karras_ve() -> DiffusionPipeline:
    return diffusers.KarrasVePipeline(unet=ddpm().unet, scheduler=diffusers.KarrasVeScheduler())


def wuerstchen() -> DiffusionPipeline:
    """A prior and a decoder, each with its own denoiser and scheduler."""
    decoder = WuerstchenDiffNeXt(
        c_cond=WIDTH,
        clip_embd=WIDTH,
        c_hidden=[16, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        c_r=8,
    )
    decoder.clf[1].reset_parameters()  # a fresh one ends in zeros and hears of nothing
    return diffusers.WuerstchenCombinedPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip_text(),
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(levels=2, bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=8),
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=clip_text(),
        prior_prior=WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=2, nhead=2),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


CALL: dict[str, Any] = {"prompt": "a red fox", "num_inference_steps": 2}
CASES = {
    "UniDiffuserPipeline": Case(
        unidiffuser, {**CALL, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"},
        refused="does not follow from the denoiser",
    ),
    "KarrasVePipeline": Case(karras_ve, {"num_inference_steps": 2, "output_type": "np"}, refused="KarrasVeScheduler"),
    "WuerstchenCombinedPipeline": Case(
        wuerstchen,
        {
            **CALL, "negative_prompt": "blurry", "height": 128, "width": 128, "prior_num_inference_steps": 2,
            "output_type": "latent", "prior_guidance_scale": 3.0,
        },
        ("prior_prior", "decoder"),
    ),
}  # fmt: skip
