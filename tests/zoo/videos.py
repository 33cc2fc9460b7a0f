"""Tiny video pipelines: Wan, SkyReels, AnyFlow, LTX, LTX-2, Cosmos, SVD, AnimateDiff, CogVideoX."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import CLIPImageProcessor

from trimtab.conformance.tiny import BETAS, WIDTH, ddim, sd_components, t5_encoder, t5_tokenizer

from .diffusion_transformers import HEAD_DIM, HEADS, flow
from .text import byte_tokenizer, clip_vision, qwen_text

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": WIDTH,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def _wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**_WAN, qk_norm="rms_norm_across_heads")


def _wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _wan(**extra: Any) -> DiffusionPipeline:
    return diffusers.WanPipeline(
        transformer=_wan_transformer(),
        vae=_wan_vae(),
        text_encoder=t5_encoder(umt5=True),
        tokenizer=t5_tokenizer(),
        scheduler=flow(),
        **extra,
    )


def wan() -> DiffusionPipeline:
    return _wan()


def wan22() -> DiffusionPipeline:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.9)


def skyreels_forcing() -> DiffusionPipeline:
    """Every frame has its own noise level, and its own copy of the scheduler."""
    return diffusers.SkyReelsV2DiffusionForcingPipeline(
        transformer=diffusers.SkyReelsV2Transformer3DModel(**_WAN, qk_norm="rms_norm_across_heads"),
        vae=_wan_vae(),
        text_encoder=t5_encoder(umt5=True),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.UniPCMultistepScheduler(
            flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )


def anyflow_far() -> DiffusionPipeline:
    """Chunk after chunk; between them the denoiser is called to fill its cache of keys and values."""
    return diffusers.AnyFlowFARPipeline(
        transformer=diffusers.AnyFlowFARTransformer3DModel(
            **_WAN,
            compressed_patch_size=(1, 4, 4),
            full_chunk_limit=3,
            gate_value=0.25,
            deltatime_type="r",
            chunk_partition=(1, 1),
        ),
        vae=_wan_vae(),
        text_encoder=t5_encoder(umt5=True),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
    )


def _ltx_components() -> dict[str, Any]:
    """Space is reduced 8 times and time 8 times."""
    reduced = (True, True, True, False)
    model_vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=reduced,
        decoder_spatio_temporal_scaling=reduced,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return {
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=HEADS * HEAD_DIM,
            num_layers=3,
            caption_channels=WIDTH,
        ),
        "vae": model_vae,
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "scheduler": flow(),
    }


def ltx() -> DiffusionPipeline:
    return diffusers.LTXPipeline(**_ltx_components())


def ltx_image2video() -> DiffusionPipeline:
    return diffusers.LTXImageToVideoPipeline(**_ltx_components())


def ltx_condition() -> DiffusionPipeline:
    return diffusers.LTXConditionPipeline(**_ltx_components())


def ltx2() -> DiffusionPipeline:
    """A video with its sound: one denoiser returns both, and each is stepped by a scheduler of its own."""
    mel_bins, channels = 8, 2
    return diffusers.LTX2Pipeline(
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=HEADS * HEAD_DIM,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=HEADS,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=HEADS * 8,
            num_layers=3,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            output_channels=channels,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=channels,
            resolution=32,
            latent_channels=channels,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            sample_rate=16000,
            mel_hop_length=160,
            is_causal=True,
            mel_bins=mel_bins,
        ),
        text_encoder=qwen_text(),
        tokenizer=byte_tokenizer(),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=HEADS,
            video_connector_attention_head_dim=WIDTH // HEADS,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=HEADS,
            audio_connector_attention_head_dim=WIDTH // HEADS,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
        ),
        vocoder=LTX2Vocoder(
            in_channels=channels * mel_bins,
            hidden_channels=8,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        scheduler=flow(),
    )


class NoSafetyChecker(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of the Cosmos guardrail, which is larger than the model."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_video2world() -> DiffusionPipeline:
    """Rows become clean estimates by `scheduler.step`, given frames replace theirs, and only then they are combined."""
    return diffusers.CosmosVideoToWorldPipeline(
        transformer=diffusers.CosmosTransformer3DModel(
            in_channels=5,  # one tells which frames are given
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=3,
            mlp_ratio=2,
            text_embed_dim=WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            concat_padding_mask=False,
        ),
        vae=diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            patch_size=4,
            scaling_factor=1.0,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=NoSafetyChecker(),
    )


def svd() -> DiffusionPipeline:
    addition = 8
    return diffusers.StableVideoDiffusionPipeline(
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            num_attention_heads=4,
            addition_time_embed_dim=addition,
            projection_class_embeddings_input_dim=3 * addition,
        ),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            layers_per_block=1,
        ),
        image_encoder=clip_vision(),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
        scheduler=diffusers.EulerDiscreteScheduler(
            **BETAS,
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
    )


def animatediff() -> DiffusionPipeline:
    parts = sd_components()
    del parts["safety_checker"], parts["requires_safety_checker"]
    channels = parts["unet"].config.block_out_channels
    motion = diffusers.MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=4,
    )
    return diffusers.AnimateDiffPipeline(**{**parts, "scheduler": ddim()}, motion_adapter=motion)


def cogvideox() -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=1,
            patch_size=2,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=ddim(),
    )
