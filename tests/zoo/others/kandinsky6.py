"""Kandinsky 6: videos with sound, and their enlargement."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from trimtab.conformance.tiny import WIDTH, flow

from .case import Case
from .edits import modulated
from .vision_text import Processor, long_clip, qwen25


def _video() -> DiffusionPipeline:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, model_dim=WIDTH,
        ff_dim=WIDTH, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=4, out_audio_dim=4,
        model_dim_a=WIDTH, time_dim_a=16, ff_dim_a=WIDTH, axes_dims_a=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=modulated(transformer),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        ),
        text_encoder=qwen25(),
        tokenizer=Processor(),
        scheduler=flow(),
        audio_vae=diffusers.MMAudioVAE(
            mel_bins=8, latent_channels=4, hidden_channels=64, channel_multipliers=(1, 1, 1), layers_per_block=1,
            sample_rate=16000, n_fft=64, hop_length=160,
        ),
        vocoder=diffusers.MMAudioVocoder(
            num_mels=8, upsample_initial_channel=64, upsample_rates=(2,), upsample_kernel_sizes=(4,),
            resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),),
        ),
        **long_clip(),
    )  # fmt: skip


def _enlarged() -> DiffusionPipeline:
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=WIDTH, ff_dim=WIDTH, num_visual_blocks=2,
        axes_dims=(4, 6, 6), tile_sizes=((128, 128),),
    )  # fmt: skip
    return diffusers.Kandinsky6SRPipeline(
        transformer=modulated(transformer),
        vae=diffusers.Kandinsky6SRVAE(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
        ),
        scheduler=flow(),
    )  # fmt: skip


TEXT: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "num_inference_steps": 2,
    "output_type": "latent", "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 512,
}  # fmt: skip
CASES = {
    "Kandinsky6TI2VAPipeline": Case(_video, TEXT, ("transformer",)),
    "Kandinsky6SRPipeline": Case(
        _enlarged,
        {"video": torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), "resolution_scale": 2,
         "num_inference_steps": 2, "output_type": "pt"},
        ("transformer",),
        unmapped="attention is given a BlockMask",
    ),
}  # fmt: skip
