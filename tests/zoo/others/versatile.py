"""Tiny pipelines of Versatile Diffusion: one UNet for pictures, whose attentions may be those of a UNet for text."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from transformers import CLIPImageProcessor

from trimtab.conformance.tiny import CROSS, CROSS_UP, PLAIN, PLAIN_UP, WIDTH, clip_text, clip_tokenizer, ddim, unet, vae

from .. import picture
from .case import Case

_WIDTHS: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4}


def _image_encoder() -> transformers.CLIPVisionModelWithProjection:
    """Of 257 tokens, a number that the pipeline has by heart."""
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1,
            num_attention_heads=2, image_size=32, patch_size=2,
        )
    )  # fmt: skip


def _components() -> dict[str, Any]:
    return {
        "image_unet": unet(**_WIDTHS, down_block_types=(PLAIN, CROSS), up_block_types=(CROSS_UP, PLAIN_UP)),
        "vae": vae(),
        "scheduler": ddim(),
    }


def _of_text() -> dict[str, Any]:
    text_unet = UNetFlatConditionModel(
        **_WIDTHS, sample_size=16, layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
    )  # fmt: skip
    return {"text_unet": text_unet, "text_encoder": clip_text(projection=True), "tokenizer": clip_tokenizer()}


def _of_images() -> dict[str, Any]:
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"image_encoder": _image_encoder(), "image_feature_extractor": processor}


def dual_guided() -> DiffusionPipeline:
    """Its blocks, in which image and text attend, are given a mask that they do not take, so it is kept from them."""
    pipe = diffusers.VersatileDiffusionDualGuidedPipeline(**_components(), **_of_text(), **_of_images())
    for module in pipe.image_unet.modules():
        if isinstance(module, DualTransformer2DModel):
            module.forward = partial(_without_mask, module.forward)
    return pipe


def _without_mask(forward: Any, *args: Any, encoder_attention_mask: None = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def image_variation() -> DiffusionPipeline:
    return diffusers.VersatileDiffusionImageVariationPipeline(**_components(), **_of_images())


def text_to_image() -> DiffusionPipeline:
    return diffusers.VersatileDiffusionTextToImagePipeline(**_components(), **_of_text())


CALL: dict[str, Any] = {
    "guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32,
}  # fmt: skip
UNET = ("image_unet",)
CASES = {
    "VersatileDiffusionDualGuidedPipeline": Case(
        dual_guided, {**CALL, "prompt": "a red fox", "image": picture()}, UNET
    ),
    "VersatileDiffusionImageVariationPipeline": Case(image_variation, {**CALL, "image": picture()}, UNET),
    "VersatileDiffusionTextToImagePipeline": Case(text_to_image, {**CALL, "prompt": "a red fox"}, UNET),
}
