"""Video pipelines of one transformer each: EasyAnimate, Hunyuan-Video 1.5 from a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from trimtab.conformance.tiny import HEAD_DIM, HEADS, WIDTH, flow, t5_encoder, t5_tokenizer

from .. import picture
from .case import Case
from .vision_text import qwen2, qwen25, tokenizer

TEXT: dict[str, Any] = {
    "num_inference_steps": 2, "output_type": "latent", "prompt": "a red fox", "negative_prompt": "blurry",
}  # fmt: skip
EASY: dict[str, Any] = {
    **TEXT, "guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 5,
}  # fmt: skip


def _easy(kind: Callable[..., DiffusionPipeline], in_channels: int, **config: Any) -> DiffusionPipeline:
    return kind(
        vae=diffusers.AutoencoderKLMagvit(
            down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D",
                              "SpatialTemporalDownBlock3D"),
            up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D",
                            "SpatialTemporalUpBlock3D"),
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            spatial_group_norm=False,
        ),
        text_encoder=qwen2(),
        tokenizer=tokenizer(),
        transformer=diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=in_channels, out_channels=4,
            time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=4, sample_height=4, patch_size=2,
            **config,
        ),
        scheduler=flow(),
    )  # fmt: skip


def _easy_text() -> DiffusionPipeline:
    return _easy(diffusers.EasyAnimatePipeline, 4)


def _easy_inpaint() -> DiffusionPipeline:
    return _easy(diffusers.EasyAnimateInpaintPipeline, 12, resize_inpaint_mask_directly=False)


def _hunyuan() -> DiffusionPipeline:
    siglip = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, image_size=32,
        patch_size=16,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        text_encoder=qwen25().model.language_model,
        tokenizer=tokenizer(),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6), target_size=64,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1,
            downsample_match_channel=False, upsample_match_channel=False,
        ),
        scheduler=flow(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(3.0),
        image_encoder=transformers.SiglipVisionModel(siglip),
        feature_extractor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    )  # fmt: skip
    # Less text than the published model reads.
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.prompt_template_encode_start_idx = 64, 16, 900
    return pipe


def _video(side: int, channels: int = 3) -> torch.Tensor:
    return torch.linspace(0, 1, channels * 5 * side * side).reshape(1, channels, 5, side, side)


CASES = {
    "EasyAnimatePipeline": Case(_easy_text, EASY, ("transformer",)),
    "EasyAnimateInpaintPipeline": Case(
        _easy_inpaint, {**EASY, "video": _video(32), "mask_video": 255 * _video(32, 1)}, ("transformer",)
    ),
    "HunyuanVideo15ImageToVideoPipeline": Case(
        _hunyuan, {**TEXT, "image": picture(64), "num_frames": 5}, ("transformer",)
    ),
}
