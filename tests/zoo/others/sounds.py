"""Tiny pipelines for sound with a UNet: AudioLDM 2 and MusicLDM."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel

from trimtab.conformance.tiny import (
    CROSS,
    CROSS_UP,
    LENGTH,
    PLAIN,
    PLAIN_UP,
    WIDTH,
    ddim,
    t5_encoder,
    t5_tokenizer,
    unet,
    vae,
)  # fmt: skip

from .case import Case

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PIECES = (*SPECIAL, *string.ascii_lowercase, "Ġ")


def _roberta() -> transformers.RobertaTokenizer:
    """One of single letters; Ġ stands for a space."""
    return transformers.RobertaTokenizer(
        vocab={piece: index for index, piece in enumerate(PIECES)}, merges=[], model_max_length=LENGTH
    )


def _clap() -> transformers.ClapModel:
    text = transformers.ClapTextConfig(
        vocab_size=len(PIECES), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=LENGTH + 8, projection_dim=WIDTH,
    )  # fmt: skip
    audio = transformers.ClapAudioConfig(
        spec_size=8, window_size=4, num_mel_bins=8, intermediate_size=16, depths=[1, 1], num_attention_heads=[1, 1],
        patch_embeds_hidden_size=8, hidden_size=16, num_hidden_layers=2, projection_dim=WIDTH, patch_size=2,
        patch_stride=2, patch_embed_input_channels=4,
    )  # fmt: skip
    return transformers.ClapModel(
        transformers.ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=WIDTH)
    )


def _vocoder() -> transformers.SpeechT5HifiGan:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )  # fmt: skip


def _components() -> dict[str, Any]:
    return {
        "vae": vae(in_channels=1, out_channels=1),
        "text_encoder": _clap(),
        "tokenizer": _roberta(),
        "feature_extractor": None,
        "scheduler": ddim(),
        "vocoder": _vocoder(),
    }


def audioldm2() -> DiffusionPipeline:
    """Each layer attends to what a language model makes of both encoders, and to T5; the last row of blocks to both."""
    language = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=8, n_positions=2 * LENGTH + 16, n_embd=WIDTH, n_layer=1, n_head=2)
    )
    denoiser = AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=(PLAIN, CROSS), up_block_types=(CROSS_UP, PLAIN_UP), norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=((None, WIDTH, WIDTH),) * 2,
    )  # fmt: skip
    return diffusers.AudioLDM2Pipeline(
        **_components(),
        text_encoder_2=t5_encoder(),
        projection_model=AudioLDM2ProjectionModel(WIDTH, WIDTH, WIDTH),
        language_model=language,
        tokenizer_2=t5_tokenizer(),
        unet=denoiser,
    )


def musicldm() -> DiffusionPipeline:
    """The UNet is given the prompt as its class."""
    return diffusers.MusicLDMPipeline(
        **_components(),
        unet=unet(
            block_out_channels=(8, 16), down_block_types=(PLAIN, CROSS), up_block_types=(CROSS_UP, PLAIN_UP),
            cross_attention_dim=(8, 16), class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=WIDTH, class_embeddings_concat=True,
        ),
    )  # fmt: skip


def _embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


CALL: dict[str, Any] = {
    "guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np", "audio_length_in_s": 0.004,
}  # fmt: skip
CASES = {
    "AudioLDM2Pipeline": Case(
        audioldm2, {**CALL, "prompt": "a red fox", "negative_prompt": "blurry", "max_new_tokens": 4}
    ),
    # Its way of encoding a text fails with transformers 5, whose CLAP returns an object where a tensor is expected.
    "MusicLDMPipeline": Case(musicldm, {**CALL, "prompt_embeds": _embeds(0), "negative_prompt_embeds": _embeds(1)}),
}
