"""Tiny pipelines that encode their prompts in other ways than by an `encode_prompt` of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.shap_e.renderer import ShapERenderer

from trimtab.conformance.tiny import (
    CROSS,
    CROSS_UP,
    PLAIN,
    PLAIN_UP,
    WIDTH,
    assemble,
    clip_text,
    clip_tokenizer,
    ddim,
    sd_components,
    vae,
)

from .case import Case
from .unets import instruct_pix2pix, kandinsky_combined

CALL: dict[str, Any] = {
    "prompt": "a red fox in the snow", "negative_prompt": "blurry", "num_inference_steps": 3, "guidance_scale": 3.0,
    "output_type": "pt",
}  # fmt: skip
SMALL = {"height": 32, "width": 32}


def audio_ldm() -> DiffusionPipeline:
    """`_encode_prompt` returns one tensor of both; the UNet is given it as its class."""
    parts = sd_components(
        cross_attention_dim=(8, 16, 16), class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8, class_embeddings_concat=True,
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
        )
    )  # fmt: skip
    return diffusers.AudioLDMPipeline(
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clip_text(projection=True, width=8),  # it pads the negative prompt to as many tokens
        tokenizer=clip_tokenizer(),
        unet=parts["unet"],
        scheduler=parts["scheduler"],
        vocoder=vocoder,
    )


def kandinsky() -> DiffusionPipeline:
    """`_encode_prompt` returns three tensors, each of both prompts; embeddings of images are given to the call."""
    tokenizer = clip_tokenizer()
    text = MultilingualCLIP(
        MCLIPConfig(
            numDims=WIDTH, transformerDimensions=WIDTH, hidden_size=WIDTH, intermediate_size=WIDTH,
            num_attention_heads=4, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=128,
        )
    )  # fmt: skip
    decoder = kandinsky_combined().decoder_pipe
    unet = diffusers.UNet2DConditionModel.from_config(
        {
            **decoder.unet.config, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image",
            "cross_attention_dim": WIDTH,
        }
    )  # fmt: skip
    return diffusers.KandinskyPipeline(
        text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=ddim(), movq=decoder.movq
    )


def shap_e() -> DiffusionPipeline:
    """`_encode_prompt` takes no negative prompt: its other rows are zeros."""
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=8, embedding_proj_dim=WIDTH, time_embed_dim=16,
        num_embeddings=6, num_layers=2, additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
        embedding_proj_norm_type=None, encoder_hid_proj_type=None, added_emb_type=None, clip_embed_dim=16,
    )  # fmt: skip
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1)
    )
    return diffusers.ShapEPipeline(
        prior=prior,
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.HeunDiscreteScheduler(prediction_type="sample", use_karras_sigmas=True),
        shap_e_renderer=renderer,
    )


def ldm() -> DiffusionPipeline:
    """The prompt is encoded in the midst of the call."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=2, encoder_ffn_dim=WIDTH,
            encoder_attention_heads=2, head_dim=8,
        )
    )  # fmt: skip
    parts = sd_components()
    return diffusers.LDMTextToImagePipeline(
        vqvae=parts["vae"], bert=bert, tokenizer=tokenizer, unet=parts["unet"], scheduler=parts["scheduler"]
    )


def semantic() -> DiffusionPipeline:
    """The same, with a negative prompt."""
    return diffusers.SemanticStableDiffusionPipeline(**sd_components())


def kandinsky_prior() -> DiffusionPipeline:
    """`_encode_prompt` returns three tensors; the prompt's own negative is prepared by another run for zeros."""
    return kandinsky_combined().prior_pipe


def unclip() -> DiffusionPipeline:
    """A prior, a decoder and two enlargers, whose schedulers all have a name of their own."""
    enlarger: dict[str, Any] = {
        "sample_size": 32, "layers_per_block": 1, "block_out_channels": (8, 16), "in_channels": 6, "out_channels": 3,
        "norm_num_groups": 4, "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }  # fmt: skip
    decoder = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=16,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift", class_embed_type="identity", norm_num_groups=4,
    )  # fmt: skip
    return diffusers.UnCLIPPipeline(
        prior=kandinsky_combined().prior_pipe.prior,
        decoder=decoder,
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_proj=UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=32, cross_attention_dim=16, clip_extra_context_tokens=2
        ),
        super_res_first=diffusers.UNet2DModel(**enlarger),
        super_res_last=diffusers.UNet2DModel(**enlarger),
        prior_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log"),
    )


def controlnet_xs() -> DiffusionPipeline:
    """A UNet and its control, grown into one model."""
    parts = sd_components(
        block_out_channels=(8, 16), down_block_types=(PLAIN, CROSS), up_block_types=(CROSS_UP, PLAIN_UP),
        layers_per_block=2,
    )  # fmt: skip
    control = diffusers.ControlNetXSAdapter.from_unet(
        parts["unet"], size_ratio=1.0, conditioning_embedding_out_channels=(8, 8), num_attention_heads=4
    )
    return diffusers.StableDiffusionControlNetXSPipeline(**parts, controlnet=control)


def _embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


def _case(name: str, build: Callable[[], DiffusionPipeline], call: dict[str, Any], rows: int = 2) -> Case:
    kept = {key: value for key, value in {**CALL, **call}.items() if value is not None}
    return Case(name, partial(assemble, build), kept, "batched", rows=rows)


PROMPT_CASES = {
    case.name: case
    for case in (
        _case("audio_ldm", audio_ldm, {"output_type": "np"}),
        _case("kandinsky", kandinsky, {**SMALL, "image_embeds": _embeds(0), "negative_image_embeds": _embeds(1)}),
        _case("kandinsky_prior", kandinsky_prior, {}),
        _case("shap_e", shap_e, {"negative_prompt": None, "output_type": "latent", "frame_size": 8}),
        _case("ldm", ldm, {"negative_prompt": None, "height": 64, "width": 64}),
        _case("semantic", semantic, {"output_type": "latent", **SMALL}),
        _case("instruct_pix2pix", instruct_pix2pix, {"output_type": "latent"}, rows=3),
    )
}
