"""Image pipelines with a transformer: CogView 4's control, Ernie, GLM, Bria Fibo 2, Qwen-Image 2.1, Z-Image Omni."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock, patch

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from trimtab.conformance.tiny import HEAD_DIM, HEADS, WIDTH, flow, t5_encoder, t5_tokenizer, vae

from .. import picture
from ..text import byte_tokenizer, qwen_text
from .case import Case
from .vision_text import Processor, qwen3, tokenizer

SCALE = 3.0
LATENT: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "prompt": "a red fox"}
TEXT: dict[str, Any] = {**LATENT, "negative_prompt": "blurry", "guidance_scale": SCALE}


def _flux2_vae(channels: int) -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def _cogview_control() -> DiffusionPipeline:
    return diffusers.CogView4ControlPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=qwen_text(),
        vae=vae(),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=8, out_channels=4, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, sample_size=8, rope_axes_dim=(8, 8),
        ),
        scheduler=flow(),
    )  # fmt: skip


def _ernie() -> DiffusionPipeline:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_layers=2, ffn_hidden_size=WIDTH,
        in_channels=16, out_channels=16, text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    for layer in (transformer.final_linear, transformer.adaLN_modulation[-1]):  # zeros in a fresh one
        layer.reset_parameters()
    return diffusers.ErnieImagePipeline(
        transformer=transformer,
        vae=_flux2_vae(4),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


def _glm() -> DiffusionPipeline:
    """Without the language model that writes the image's tokens first: they are given to the call."""
    return diffusers.GlmImagePipeline(
        tokenizer=t5_tokenizer(),
        processor=None,
        text_encoder=t5_encoder(),
        vision_language_encoder=None,
        vae=vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        transformer=diffusers.GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32,
        ),
        scheduler=flow(),
    )  # fmt: skip


def _fibo() -> DiffusionPipeline:
    pipe = diffusers.BriaFibo2Pipeline(
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=4, dim=HEADS * HEAD_DIM, n_layers=3, n_refiner_layers=1, n_heads=HEADS,
            cap_feat_dim=3 * WIDTH, injection_layer_ids=(0,), perceiver_num_layers=1, min_num_gist_tokens=4,
            max_num_gist_tokens=8, gist_step=4, axes_dims=(4, 6, 6), axes_lens=(2048, 64, 64),
        ),
        scheduler=flow(),
        vae=_flux2_vae(4),
        text_encoder=qwen3(),
        processor=Processor(16),
    )  # fmt: skip
    pipe.text_encoder_out_layers = ((0, 1, 2),) * 2  # of the few layers that there are
    return pipe


def _qwen21() -> DiffusionPipeline:
    return diffusers.QwenImage21Pipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=qwen3(),
        processor=Processor(16),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


def _z_omni() -> DiffusionPipeline:
    siglip = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, num_patches=16
    )
    return diffusers.ZImageOmniPipeline(
        scheduler=flow(),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06).bfloat16(),  # as the call takes it
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=HEADS * HEAD_DIM, n_layers=2, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
            cap_feat_dim=WIDTH, siglip_feat_dim=WIDTH, axes_dims=(4, 6, 6), axes_lens=(256, 32, 32),
        ),
        siglip=transformers.Siglip2VisionModel(siglip),
        siglip_processor=Siglip2ImageProcessorPil(max_num_patches=16),
    )  # fmt: skip


def _omnigen() -> DiffusionPipeline:
    # Without torchvision there is no processor; what that makes of given pictures is not asked here.
    processor = processor_omnigen.OmniGenMultiModalProcessor
    with (
        patch.object(processor_omnigen, "transforms", MagicMock(), create=True),
        patch.object(pipeline_omnigen, processor.__name__, processor, create=True),
    ):
        return diffusers.OmniGenPipeline(
            transformer=diffusers.OmniGenTransformer2DModel(
                in_channels=4, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                intermediate_size=WIDTH, num_layers=2, pad_token_id=0, vocab_size=300, time_step_dim=16,
                rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            vae=vae(levels=4),
            tokenizer=tokenizer(),
        )  # fmt: skip


def _ideogram() -> DiffusionPipeline:
    def transformer() -> torch.nn.Module:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            intermediate_size=WIDTH, adaln_dim=16, llm_features_dim=13 * WIDTH, mrope_section=(4, 2, 2),
        )  # fmt: skip

    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_flux2_vae(4),
        text_encoder=qwen3(36).model,
        tokenizer=tokenizer(),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )


SMALL: dict[str, Any] = {"height": 16, "width": 16}
CASES = {
    "CogView4ControlPipeline": Case(
        _cogview_control, {**TEXT, "control_image": picture(16), **SMALL}, ("transformer",)
    ),
    "ErnieImagePipeline": Case(_ernie, {**TEXT, **SMALL}, ("transformer",)),
    "GlmImagePipeline": Case(
        _glm,
        {**LATENT, "guidance_scale": SCALE, **SMALL, "prior_token_ids": torch.arange(16)[None]},
        ("transformer",),
    ),
    "BriaFibo2Pipeline": Case(_fibo, {**TEXT, **SMALL}, ("transformer",)),
    "QwenImage21Pipeline": Case(
        _qwen21,
        {**LATENT, "negative_prompt": "blurry", "true_cfg_scale": SCALE, "height": 64, "width": 64},
        ("transformer",),
    ),
    "ZImageOmniPipeline": Case(_z_omni, {**TEXT, "image": [picture(64)], **SMALL}, ("transformer",), unwanted=2),
    "OmniGenPipeline": Case(
        _omnigen,
        {**LATENT, "guidance_scale": SCALE, "height": 64, "width": 64},
        ("transformer",),
        unmapped="no self-attention that could be perturbed",
    ),
    "Ideogram4Pipeline": Case(
        _ideogram,
        {**LATENT, "guidance_scale": SCALE, "guidance_schedule": None, **SMALL, "max_sequence_length": 128},
        ("transformer", "unconditional_transformer"),
    ),
}
