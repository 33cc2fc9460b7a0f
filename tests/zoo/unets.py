"""Tiny image pipelines with a UNet: Stable Diffusion, its variants and XL, DDPM, IF, Stable Cascade, Kandinsky."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPImageProcessor

from trimtab.conformance.tiny import (
    BETAS,
    CROSS,
    CROSS_UP,
    PLAIN,
    PLAIN_UP,
    WIDTH,
    clip_text,
    clip_tokenizer,
    ddim,
    sd_components,
    t5_encoder,
    t5_tokenizer,
    unet,
    vae,
)

from .text import clip_vision


def sdxl() -> DiffusionPipeline:
    addition = 8
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=(PLAIN, CROSS, CROSS),
            up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=addition,
            projection_class_embeddings_input_dim=6 * addition + WIDTH,
        ),
        vae=vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def ddpm() -> DiffusionPipeline:
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )


def lcm() -> DiffusionPipeline:
    parts = sd_components(time_cond_proj_dim=WIDTH)
    parts["scheduler"] = diffusers.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    return diffusers.LatentConsistencyModelPipeline(**parts)


def sd_img2img() -> DiffusionPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(**sd_components())


def sd_inpaint() -> DiffusionPipeline:
    return diffusers.StableDiffusionInpaintPipeline(**sd_components(in_channels=9))


def instruct_pix2pix() -> DiffusionPipeline:
    return diffusers.StableDiffusionInstructPix2PixPipeline(**sd_components(in_channels=8))


def ip_adapter() -> DiffusionPipeline:
    """A picture as a further prompt, by keys and values of its own in each cross-attention."""
    pipe = diffusers.StableDiffusionPipeline(
        **{**sd_components(), "image_encoder": clip_vision(), "feature_extractor": CLIPImageProcessor(crop_size=224)}
    )
    tokens = pipe.unet.config.cross_attention_dim
    crossing = [n for n, a in pipe.unet.attn_processors.items() if "attn2" in n]
    weights: dict[str, torch.Tensor] = {}
    for place, name in enumerate(pipe.unet.attn_processors):
        if name in crossing:
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            weights[f"{place}.to_k_ip.weight"] = torch.randn(width, tokens) / tokens**0.5
            weights[f"{place}.to_v_ip.weight"] = torch.randn(width, tokens) / tokens**0.5
    projection = {
        "proj.weight": torch.randn(4 * tokens, WIDTH) / WIDTH**0.5,
        "proj.bias": torch.zeros(4 * tokens),
        "norm.weight": torch.ones(tokens),
        "norm.bias": torch.zeros(tokens),
    }
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": weights}, subfolder="", weight_name="")
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def controlled(unet: diffusers.UNet2DConditionModel, levels: int = 2) -> diffusers.ControlNetModel:
    """A ControlNet for `unet`, whose picture has `2 ** (levels - 1)` times the latents' side."""
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * levels)
    # A fresh ControlNet ends in zeroed convolutions and would leave the UNet as it is.
    for convolution in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        convolution.reset_parameters()
    control.controlnet_cond_embedding.conv_out.reset_parameters()
    return control


def controlnet() -> DiffusionPipeline:
    parts = sd_components()
    return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlled(parts["unet"]))


def deepfloyd_if() -> DiffusionPipeline:
    return diffusers.IFPipeline(
        unet=unet(
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            encoder_hid_dim=WIDTH,
            attention_head_dim=4,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def cascade_prior() -> DiffusionPipeline:
    prior = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=WIDTH,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.0, 0.0),
    )
    return diffusers.StableCascadePriorPipeline(
        prior=prior,
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        resolution_multiple=2.0,
    )


def kandinsky_combined() -> DiffusionPipeline:
    """A prior and a decoder, each with its own denoiser and scheduler."""
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=3, num_embeddings=32
    )
    prior.clip_std.data.fill_(1.0)  # at the zeros of a fresh one all images would be the same
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet(
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=(32, 32),
            addition_embed_type="image",
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=ddim(),
        movq=diffusers.VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            num_vq_embeddings=12,
            vq_embed_dim=4,
            norm_num_groups=4,
            norm_type="spatial",
        ),
        prior_prior=prior,
        prior_image_encoder=clip_vision(),
        prior_text_encoder=clip_text(projection=True),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=CLIPImageProcessor(crop_size=224, size=224),
    )
