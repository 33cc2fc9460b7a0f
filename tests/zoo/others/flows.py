"""Tiny pipelines with a transformer, for sound and for worlds: Stable Audio 3, LongCat-Audio, Sana-WM, Helios."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

from trimtab.conformance.tiny import HEAD_DIM, HEADS, WIDTH, flow, t5_encoder, t5_tokenizer

from .. import picture
from ..videos import ltx2, wan
from .case import Case


def _stable_audio_3() -> dict[str, Any]:
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=WIDTH, depth=2, num_heads=HEADS, cond_token_dim=WIDTH, global_cond_dim=WIDTH,
        local_add_cond_dim=5, timestep_features_dim=8, ff_mult=1.0, num_memory_tokens=2,
    )  # fmt: skip
    sound = diffusers.AutoencoderSAME(
        audio_channels=2, patch_size=4, encoder_channels=8, encoder_c_mults=(1,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=4, dim_heads=4, ff_mult=1, sampling_rate=800,
    )  # fmt: skip
    return {
        "vae": sound,
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8),
        "transformer": transformer,
        "scheduler": flow(),
    }


def audio_to_audio() -> DiffusionPipeline:
    return diffusers.StableAudio3AudioToAudioPipeline(**_stable_audio_3())


def audio_inpaint() -> DiffusionPipeline:
    return diffusers.StableAudio3InpaintPipeline(**_stable_audio_3())


def longcat_audio() -> DiffusionPipeline:
    """Its scheduler counts from noise at 0 to sound at 1, and is a component that it may be made without."""
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=WIDTH, dit_depth=2, dit_heads=HEADS, dit_text_dim=WIDTH, latent_dim=4, ff_mult=1.0
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            module.reset_parameters()  # a fresh one begins and ends each block with zeros
    return diffusers.LongCatAudioDiTPipeline(
        vae=diffusers.LongCatAudioDiTVae(
            channels=4, c_mults=[1, 2], strides=[2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=2,
            sample_rate=400,
        ),
        text_encoder=t5_encoder(umt5=True),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )  # fmt: skip


def sana_wm() -> DiffusionPipeline:
    """The scheduler is given tokens of a video, their sign flipped."""
    return diffusers.SanaWMPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=ltx2().vae,
        transformer=diffusers.SanaWMTransformer3DModel(
            in_channels=4, num_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS, softmax_every_n=2,
            chunk_plucker_channels=12, chunk_plucker_post_attn_blocks=2, linear_head_dim=HEAD_DIM,
            caption_channels=WIDTH, mlp_ratio=1.0, mixed_precision="fp32", image_size=32,
        ),
        scheduler=flow(),
    )  # fmt: skip


def helios_pyramid() -> DiffusionPipeline:
    """Sizes from small to large, for each of which the pipeline sets the levels anew.

    With `gamma` of a third, as published, the noise of a block of four is not positive definite in float32 on a CPU.
    """
    parts = wan().components
    return diffusers.HeliosPyramidPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=diffusers.HeliosScheduler(stages=3, stage_range=[0, 1 / 3, 2 / 3, 1], gamma=0.3),
        transformer=diffusers.HeliosTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, text_dim=WIDTH,
            freq_dim=32, ffn_dim=WIDTH, num_layers=2, rope_dim=(4, 6, 6),
        ),
    )  # fmt: skip


def _sound(samples: int) -> torch.Tensor:
    return 0.3 * torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(0))


CALL: dict[str, Any] = {"prompt": "a red fox", "num_inference_steps": 2, "output_type": "latent"}
DIT = ("transformer",)
STABLE: dict[str, Any] = {**CALL, "duration": 0.1, "audio": _sound(80)}
CASES = {
    "StableAudio3AudioToAudioPipeline": Case(audio_to_audio, {**STABLE, "init_noise_level": 0.9}, DIT),
    "StableAudio3InpaintPipeline": Case(
        audio_inpaint, {**STABLE, "mask_start_seconds": 0.02, "mask_end_seconds": 0.06}, DIT
    ),
    "LongCatAudioDiTPipeline": Case(
        longcat_audio, {**CALL, "negative_prompt": "blurry", "guidance_scale": 3.0, "audio_duration_s": 0.1}, DIT
    ),
    "SanaWMPipeline": Case(
        sana_wm,
        {
            **CALL, "negative_prompt": "blurry", "guidance_scale": 3.0, "image": picture(),
            "c2w": np.stack([np.eye(4, dtype=np.float32)] * 5), "intrinsics": [32.0, 32.0, 16.0, 16.0], "height": 16,
            "width": 16, "num_frames": 5, "max_sequence_length": 8, "chi_prompt": ["a"],
        },
        DIT,
        unmapped="SanaWMTransformer3DModel has no self-attention that could be perturbed",
    ),
    "HeliosPyramidPipeline": Case(
        helios_pyramid,
        {
            "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "height": 64, "width": 64,
            "num_frames": 5, "num_latent_frames_per_chunk": 2, "pyramid_num_inference_steps_list": [1, 1, 1],
            "max_sequence_length": 24, "output_type": "latent",
        },
        DIT,
        refused="its levels are set by the pipeline, stage by stage",
    ),
}  # fmt: skip
