"""Tiny pipelines whose call predicts more than one prompt asks for, or goes through noise levels again."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from trimtab.conformance.tiny import sd_components

from .. import mask, picture
from ..unets import ddpm, sdxl
from ..videos import skyreels_forcing
from .case import Case


def safe() -> DiffusionPipeline:
    """One row more is the concept that it steers away from."""
    return diffusers.StableDiffusionPipelineSafe(**sd_components())


def cycle() -> DiffusionPipeline:
    """The source is denoised beside the result."""
    return diffusers.CycleDiffusionPipeline(**sd_components())


def repaint() -> DiffusionPipeline:
    """It goes back to a higher noise level again and again."""
    return diffusers.RePaintPipeline(unet=ddpm().unet, scheduler=diffusers.RePaintScheduler())


def panorama() -> DiffusionPipeline:
    """Each of its views is a step, and its own property says that it has no guidance."""
    return diffusers.StableDiffusionPanoramaPipeline(**sd_components())


def zero() -> DiffusionPipeline:
    """The first frame is denoised, moved, and denoised again with all others."""
    return diffusers.TextToVideoZeroPipeline(**sd_components())


def zero_xl() -> DiffusionPipeline:
    return diffusers.TextToVideoZeroSDXLPipeline(**sdxl().components)


def skyreels_video() -> DiffusionPipeline:
    """A video is continued stretch by stretch."""
    return diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline(**skyreels_forcing().components)


CALL: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "num_inference_steps": 2,
    "output_type": "latent",
}  # fmt: skip
SOURCE = {name: value for name, value in CALL.items() if name != "negative_prompt"}
ZERO: dict[str, Any] = {
    **CALL, "num_inference_steps": 4, "t0": 1, "t1": 2, "video_length": 2, "height": 32, "width": 32,
}  # fmt: skip
CASES = {
    "StableDiffusionPipelineSafe": Case(safe, {**CALL, "height": 16, "width": 16, "output_type": "np"}),
    "CycleDiffusionPipeline": Case(
        cycle, {**SOURCE, "source_prompt": "a blue cat", "image": picture(), "strength": 1.0, "eta": 0.1}
    ),
    "RePaintPipeline": Case(
        repaint,
        {
            "image": picture(), "mask_image": mask(), "num_inference_steps": 4, "jump_length": 1,
            "jump_n_sample": 2, "output_type": "np",
        },
    ),
    "StableDiffusionPanoramaPipeline": Case(panorama, {**CALL, "height": 64, "width": 64}),
    # One step more, and the second frame in three of them.
    "TextToVideoZeroPipeline": Case(zero, ZERO, undeclared=3, unwanted=9, renewed=True),
    "TextToVideoZeroSDXLPipeline": Case(
        zero_xl, {**ZERO, "output_type": "tensor"}, undeclared=3, unwanted=9, renewed=True
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Case(
        skyreels_video,
        {
            **CALL, "video": [picture()] * 9, "height": 32, "width": 32, "num_frames": 17, "overlap_history": 5,
            "base_num_frames": 9, "max_sequence_length": 24,
        },
        ("transformer",),
        undeclared=12,  # two stretches more
    ),
}  # fmt: skip
