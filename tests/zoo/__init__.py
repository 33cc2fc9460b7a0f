"""Tiny stock Diffusers pipelines with random weights, one for each way a pipeline uses its denoiser.

`CASES[name].build()` makes the pipeline, `run(pipe, CASES[name])` calls it, `pag_twin(pipe)` gives Diffusers' own
perturbed-attention pipeline over the same components.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from trimtab.conformance.tiny import assemble, sd3, sd15

from . import diffusion_transformers as dits
from . import unets, videos
from .case import Case, Kind, run
from .pag import pag_twin

__all__ = ["CASES", "Case", "mask", "pag_twin", "picture", "run"]

LATENT: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
TEXT: dict[str, Any] = {**LATENT, "prompt": "a red fox in the snow", "negative_prompt": "blurry", "guidance_scale": 5.0}
T5: dict[str, Any] = {**TEXT, "height": 16, "width": 16, "max_sequence_length": 24}
FLUX: dict[str, Any] = {**LATENT, "prompt": "a red fox", "height": 16, "width": 16, "max_sequence_length": 24}
VIDEO: dict[str, Any] = {**TEXT, "height": 32, "width": 32, "max_sequence_length": 24}


def picture(side: int = 32) -> Image.Image:
    """A colour gradient with a bright square, `side` pixels wide and high."""
    ramp = np.linspace(0, 255, side)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 128.0), axis=-1).astype(np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = 255
    return Image.fromarray(pixels)


def mask(side: int = 32) -> Image.Image:
    """White, to be painted anew, on the left half."""
    return Image.fromarray(np.repeat([[255] * (side // 2) + [0] * (side // 2)], side, axis=0).astype(np.uint8))


CASES: dict[str, Case] = {}


def _add(name: str, build: Callable[[], DiffusionPipeline], call: dict[str, Any], kind: Kind, **rest: Any) -> None:
    CASES[name] = Case(name, partial(assemble, build), call, kind, **rest)


_add("sd15", sd15, TEXT, "batched")
_add("sdxl", unets.sdxl, TEXT, "batched")
_add("sd3", sd3, T5, "batched", denoiser="transformer")
_add("sd35", dits.sd35, T5, "batched", denoiser="transformer")
_add(
    "pixart",
    dits.pixart,
    {**T5, "use_resolution_binning": False, "clean_caption": False},
    "learned_variance",
    denoiser="transformer",
)
_add(
    "dit",
    dits.dit,
    {"class_labels": [1], "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"},
    "learned_variance",
    denoiser="transformer",
)
_add("ddpm", unets.ddpm, {"num_inference_steps": 3, "output_type": "np"}, "one_row", rows=1)
_add("flux", dits.flux, {**FLUX, "guidance_scale": 3.5}, "one_row", denoiser="transformer", rows=1)
_add(
    "flux_true_cfg",
    dits.flux,
    {**FLUX, "guidance_scale": 3.5, "negative_prompt": "blurry", "true_cfg_scale": 3.0},
    "two_calls",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add(
    "wan",
    videos.wan,
    {**VIDEO, "height": 64, "width": 64, "num_frames": 5},
    "two_calls",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add(
    "qwenimage",
    dits.qwenimage,
    {**FLUX, "negative_prompt": "blurry", "true_cfg_scale": 3.0, "max_sequence_length": 256},
    "norm_rescaled",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add(
    "ltx_condition",
    videos.ltx_condition,
    {**VIDEO, "image": picture(), "num_frames": 9},
    "sign_flipped",
    denoiser="transformer",
)
_add("if_", unets.deepfloyd_if, {**TEXT, "output_type": "pt", "clean_caption": False}, "variance_passed_on")
_add("instruct_pix2pix", unets.instruct_pix2pix, {**TEXT, "image": picture()}, "three_rows", rows=3)
_add(
    "flux_kontext",
    dits.flux_kontext,
    {**FLUX, "guidance_scale": 3.5, "image": picture(16), "max_area": 256, "_auto_resize": False},
    "joined",
    denoiser="transformer",
    rows=1,
)
_add("ltx", videos.ltx, {**VIDEO, "num_frames": 9}, "batched", denoiser="transformer")
_add(
    "svd",
    videos.svd,
    {**LATENT, "image": picture(16), "height": 16, "width": 16, "num_frames": 3, "max_guidance_scale": 3.0},
    "by_frame",
)
_add("lcm", unets.lcm, {**LATENT, "prompt": "a red fox", "guidance_scale": 8.0}, "one_row", rows=1)
_add("sd_img2img", unets.sd_img2img, {**TEXT, "image": picture(), "strength": 0.7, "num_inference_steps": 4}, "batched")
_add(
    "sd_inpaint",
    unets.sd_inpaint,
    {**TEXT, "image": picture(), "mask_image": mask(), "height": 32, "width": 32},
    "batched",
)
_add("controlnet", unets.controlnet, {**TEXT, "image": picture()}, "batched")
_add(
    "cascade_prior",
    unets.cascade_prior,
    {**TEXT, "height": 16, "width": 16, "output_type": "pt"},
    "batched",
    denoiser="prior",
)
_add(
    "kandinsky_combined",
    unets.kandinsky_combined,
    {**LATENT, "prompt": "a red fox", "height": 32, "width": 32, "prior_num_inference_steps": 2, "output_type": "pt"},
    "batched",
    denoiser="prior_prior",
)
_add("ip_adapter", unets.ip_adapter, {**TEXT, "ip_adapter_image": picture()}, "batched")
_add(
    "lumina",
    dits.lumina,
    {**TEXT, "height": 64, "width": 64, "clean_caption": False},
    "by_channel",
    denoiser="transformer",
)
_add(
    "skyreels_forcing",
    videos.skyreels_forcing,
    {**VIDEO, "num_frames": 9, "num_inference_steps": 2},
    "frame_schedulers",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add(
    "ltx2",
    videos.ltx2,
    {
        **VIDEO,
        "num_frames": 5,
        "audio_guidance_scale": 3.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "use_cross_timestep": False,
    },
    "sound_beside",
    denoiser="transformer",
)
_add(
    "cosmos_video2world",
    videos.cosmos_video2world,
    {**VIDEO, "image": picture(), "num_frames": 9},
    "rows_converted",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add("animatediff", videos.animatediff, {**TEXT, "num_frames": 2}, "batched")
_add("z_image", dits.z_image, T5, "sign_flipped", denoiser="transformer")
_add(
    "wan22",
    videos.wan22,
    {**VIDEO, "height": 64, "width": 64, "num_frames": 5},
    "two_calls",
    denoiser="transformer",
    rows=1,
    calls=2,
)
_add(
    "prx_pixel",
    dits.prx_pixel,
    {**TEXT, "height": 16, "width": 16, "output_type": "pt", "use_resolution_binning": False},
    "conversion",
    denoiser="transformer",
)
_add(
    "ltx_image2video",
    videos.ltx_image2video,
    {**VIDEO, "image": picture(), "num_frames": 17},
    "unpacked",
    denoiser="transformer",
)
_add(
    "anyflow_far",
    videos.anyflow_far,
    {**VIDEO, "num_frames": 5, "num_inference_steps": 2},
    "batched",
    denoiser="transformer",
)
_add(
    "sana_sprint",
    dits.sana_sprint,
    {
        **FLUX,
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    "conversion",
    denoiser="transformer",
    rows=1,
)
