"""Tiny pipelines that hand the frames of a video to the scheduler as images: text to video, I2VGen-XL."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from transformers import CLIPImageProcessor

from trimtab.conformance.tiny import WIDTH, clip_text, clip_tokenizer, ddim, vae

from .. import picture
from ..text import clip_vision
from .case import Case, on_the_video

_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": WIDTH, "attention_head_dim": 4, "sample_size": 16,
}  # fmt: skip


def _components() -> dict[str, Any]:
    return {"vae": vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "scheduler": ddim()}


def i2vgen_xl() -> DiffusionPipeline:
    return diffusers.I2VGenXLPipeline(
        **_components(),
        image_encoder=clip_vision(),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
        unet=I2VGenXLUNet(**_UNET),
    )


def text_to_video() -> DiffusionPipeline:
    return diffusers.TextToVideoSDPipeline(**_components(), unet=diffusers.UNet3DConditionModel(**_UNET))


def video_to_video() -> DiffusionPipeline:
    return diffusers.VideoToVideoSDPipeline(**_components(), unet=diffusers.UNet3DConditionModel(**_UNET))


CALL: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "num_inference_steps": 2,
    "output_type": "latent",
}  # fmt: skip
SMALL: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 3}
CASES = {
    "I2VGenXLPipeline": Case(i2vgen_xl, {**CALL, **SMALL, "image": picture(), "clip_skip": None}, arrives=on_the_video),
    "TextToVideoSDPipeline": Case(text_to_video, {**CALL, **SMALL}, arrives=on_the_video),
    "VideoToVideoSDPipeline": Case(
        video_to_video, {**CALL, "video": [picture(16)] * 3, "strength": 1.0}, arrives=on_the_video
    ),
}
