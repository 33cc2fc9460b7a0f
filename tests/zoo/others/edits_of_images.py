"""Tiny pipelines with Stable Diffusion's UNet that place or edit things, some by the attention maps that they read."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

from trimtab.conformance.tiny import (
    BETAS,
    CROSS,
    CROSS_UP,
    LENGTH,
    PLAIN,
    PLAIN_UP,
    WIDTH,
    clip_tokenizer,
    sd_components,
)

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


def ledits() -> DiffusionPipeline:
    """It keeps attention maps of a quarter of the latents' side, at places that are known by the rows they have."""
    parts = sd_components(down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP))
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    pipe = diffusers.LEditsPPPipelineStableDiffusion(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(picture(), num_inversion_steps=4, skip=0.5, generator=torch.Generator().manual_seed(0))
    return pipe


def attend_and_excite() -> DiffusionPipeline:
    """Its call moves x_t so that the words of its choice are attended to."""
    return diffusers.StableDiffusionAttendAndExcitePipeline(
        **sd_components(down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP))
    )


def sag() -> DiffusionPipeline:
    """Its call blurs x_t where its own prediction attended, and asks the UNet again."""
    return diffusers.StableDiffusionSAGPipeline(**sd_components())


def _direction(seed: int) -> torch.Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


CALL: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "num_inference_steps": 2,
    "output_type": "latent",
}  # fmt: skip
SMALL = {"height": 16, "width": 16}
CASES = {
    "StableDiffusionGLIGENTextImagePipeline": Case(
        gligen_text_image,
        {
            **CALL, "gligen_phrases": ["fox"], "gligen_images": [picture()], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
            "gligen_scheduled_sampling_beta": 1.0, **SMALL,
        },
    ),
    "StableDiffusionPix2PixZeroPipeline": Case(
        pix2pix_zero, {**CALL, **SMALL, "source_embeds": _direction(0), "target_embeds": _direction(1)},
        unmapped="Pix2PixZeroAttnProcessor", renewed=True,
    ),
    "LEditsPPPipelineStableDiffusion": Case(
        ledits, {"editing_prompt": ["snow"], "output_type": "latent"}, renewed=True,
        unmapped="reads attention maps by a processor of its own, LEDITSCrossAttnProcessor",
    ),
    "StableDiffusionAttendAndExcitePipeline": Case(
        attend_and_excite,
        {**CALL, "token_indices": [2], "max_iter_to_alter": 1, "thresholds": {}, "attn_res": (4, 4)}, renewed=True,
        unmapped="reads attention maps by a processor of its own, AttendExciteAttnProcessor",
    ),
    "StableDiffusionSAGPipeline": Case(
        sag, {**CALL, "sag_scale": 0.5},
        unmapped="reads attention maps by a processor of its own, CrossAttnStoreProcessor",
    ),
    "LEditsPPPipelineStableDiffusionXL": Case(
        ledits_xl, {"editing_prompt": ["snow"], "output_type": "latent"}, steps=4
    ),
}  # fmt: skip
