"""Tiny pipelines with Stable Diffusion's UNet that place or edit things: GLIGEN, Pix2Pix-Zero, LEdits++."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

from trimtab.conformance.tiny import BETAS, LENGTH, WIDTH, clip_tokenizer, sd_components

from .. import picture
from ..text import clip_vision
from ..unets import sdxl
from .case import Case


def gligen_text_image() -> DiffusionPipeline:
    """Boxes, words and pictures are tokens of an attention of their own, which a fresh UNet lets through nothing of."""
    parts = sd_components(attention_type="gated-text-image")
    for module in parts["unet"].modules():
        if isinstance(module, GatedSelfAttentionDense):
            module.alpha_attn.data.fill_(1.0)
            module.alpha_dense.data.fill_(1.0)
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(crop_size=224, size=224), clip_tokenizer())
    return diffusers.StableDiffusionGLIGENTextImagePipeline(
        **parts, processor=processor, image_encoder=clip_vision(), image_project=CLIPImageProjection(WIDTH)
    )


def pix2pix_zero() -> DiffusionPipeline:
    """It denoises twice, first to see where the prompt's words attend; its attention processors stay in the UNet."""
    return diffusers.StableDiffusionPix2PixZeroPipeline(
        **sd_components(), inverse_scheduler=None, caption_generator=None, caption_processor=None
    )


def ledits_xl() -> DiffusionPipeline:
    """A picture has been inverted before the call."""
    parts = sdxl().components
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    pipe = diffusers.LEditsPPPipelineStableDiffusionXL(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(
        picture(), num_inversion_steps=4, skip=0.5, num_zero_noise_steps=1, generator=torch.Generator().manual_seed(0)
    )
    return pipe


def _direction(seed: int) -> torch.Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


CALL: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "num_inference_steps": 2,
    "output_type": "latent",
}  # fmt: skip
CASES = {
    "StableDiffusionGLIGENTextImagePipeline": Case(
        gligen_text_image,
        {
            **CALL, "gligen_phrases": ["fox"], "gligen_images": [picture()], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
            "gligen_scheduled_sampling_beta": 1.0,
        },
        undeclared=5,  # two rows more a step, without boxes; and the first branch of those that had to be dropped
    ),
    "StableDiffusionPix2PixZeroPipeline": Case(
        pix2pix_zero, {**CALL, "source_embeds": _direction(0), "target_embeds": _direction(1)},
        unmapped="Pix2PixZeroAttnProcessor calls neither", renewed=True,
    ),
    "LEditsPPPipelineStableDiffusionXL": Case(
        ledits_xl, {"editing_prompt": ["snow"], "output_type": "latent"}, steps=4,
        undeclared=4,  # the row of the edit
    ),
}  # fmt: skip
