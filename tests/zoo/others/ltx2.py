"""LTX-2's pipelines of few frames: keyframes beside the video, and twice as many frames between them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from recorder import SchedulerStep

from ..videos import ltx2
from .case import Case

CALL: dict[str, Any] = {
    "prompt": "a red fox", "height": 32, "width": 32, "num_frames": 9, "sigmas": [1.0, 0.5], "output_type": "latent",
    "max_sequence_length": 24,
}  # fmt: skip
ETA = 0.5


def _parts() -> dict[str, Any]:
    """Those of LTX-2, with a transformer that knows keyframes."""
    parts = dict(ltx2().components)
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    config["use_keyframes_abs_pos_embedding"] = True
    parts["transformer"] = diffusers.LTX2VideoTransformer3DModel(**config)
    return {name: part for name, part in parts.items() if part is not None}


def _smaller(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.vae_spatial_compression_ratio = 8  # the autoencoder, which is not asked, halves once
    return pipe


def _keyframes() -> DiffusionPipeline:
    return _smaller(diffusers.LTX2DFRPipeline(**_parts()))


def _refined() -> DiffusionPipeline:
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=ETA)
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    parts = {**_parts(), "scheduler": scheduler}
    return _smaller(diffusers.LTX2DFRTemporalRefinePipeline(**parts, temporal_latent_upsampler=upsampler))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _but_for_keyframes(step: SchedulerStep, delta: torch.Tensor) -> torch.Tensor:
    """The tokens of the given keyframes are drawn to these whatever the denoiser says, so nothing is added there."""
    followed = torch.isclose(step.model_output, step.forwards[0].output, rtol=0, atol=1e-4).all(dim=-1, keepdim=True)
    assert 0 < int(followed.sum()) < followed.numel()
    return step.model_output + delta * followed


CASES = {
    "LTX2DFRPipeline": Case(_keyframes, CALL, ("transformer",)),
    "LTX2DFRTemporalRefinePipeline": Case(
        _refined,
        {**CALL, "latents": _noise(1, 4, 5, 4, 4), "keyframes_latents": _noise(1, 4, 1, 4, 4),
         "keyframe_positions": [8], "audio_latents": _noise(1, 2, 8, 2)},
        ("transformer",),
        arrives=_but_for_keyframes,
    ),
}  # fmt: skip
