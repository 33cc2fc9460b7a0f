"""Tiny image pipelines with a transformer: Stable Diffusion 3, PixArt, DiT, Flux, Qwen-Image, Z-Image, PRX, Sana."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from trimtab.conformance.tiny import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    clip_text,
    clip_tokenizer,
    ddim,
    flow,
    sd3,
    t5_encoder,
    t5_tokenizer,
    vae,
)

from .text import byte_tokenizer, qwen_text, qwen_vision_text


def sd35() -> DiffusionPipeline:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            caption_channels=WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=HEADS * HEAD_DIM,
        ),
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=ddim(),
    )


def dit() -> DiffusionPipeline:
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            in_channels=4,
            out_channels=8,
        ),
        vae=vae(),
        scheduler=ddim(),
    )


def flux_components() -> dict[str, Any]:
    """The components of a Flux pipeline with distilled guidance; latents of 4 channels are packed to 16."""
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        "text_encoder": clip_text(),
        "text_encoder_2": t5_encoder(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": flow(),
    }


def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(**flux_components())


def flux_kontext() -> DiffusionPipeline:
    return diffusers.FluxKontextPipeline(**flux_components())


def qwenimage() -> DiffusionPipeline:
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=qwen_vision_text(),
        tokenizer=byte_tokenizer(),
        scheduler=flow(),
    )


def z_image() -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=HEADS * HEAD_DIM,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=WIDTH,
            axes_dims=(4, 6, 6),
            axes_lens=(256, 32, 32),
        ),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        scheduler=flow(),
    )


def lumina() -> DiffusionPipeline:
    """Classifier-free guidance on three of the four channels; the last one is the conditional row's."""
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=HEADS * HEAD_DIM,
        num_layers=3,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    for block in transformer.layers:  # zeros in a fresh one, so that the text would hardly count
        block.gate.data.fill_(1.0)
    return diffusers.LuminaPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        scheduler=flow(),
    )


def lumina2() -> DiffusionPipeline:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=HEADS * HEAD_DIM,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=HEADS,
            num_kv_heads=HEADS,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(256, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        vae=vae(shift_factor=0.0),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        scheduler=flow(),
    )


def prx_pixel() -> DiffusionPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=4,
        in_channels=3,
        context_in_dim=WIDTH,
        hidden_size=HEADS * HEAD_DIM,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=3,
        axes_dim=(8, 8),
        bottleneck_size=16,
        resolution_embeds=True,
    )
    # A fresh PRX has zeroed gates, so that its blocks, and with them the text, would do nothing.
    for block in transformer.blocks:
        block.modulation.lin.reset_parameters()
    return diffusers.PRXPixelPipeline(
        transformer=transformer,
        scheduler=flow(),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        prompt_max_tokens=24,
    )


def sana_sprint() -> DiffusionPipeline:
    return diffusers.SanaSprintPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=HEADS * HEAD_DIM,
            caption_channels=WIDTH,
            sample_size=16,
            qk_norm="rms_norm_across_heads",
            guidance_embeds=True,
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        scheduler=diffusers.SCMScheduler(),
    )
