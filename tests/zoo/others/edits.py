"""Image pipelines whose text encoder is Qwen-VL: LongCat, Hunyuan-Image's refiner, Kandinsky 5 from a picture, Joy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from recorder import SchedulerStep
from torch import Tensor

from trimtab.conformance.tiny import HEAD_DIM, HEADS, WIDTH, flow, vae

from .. import picture
from . import shrinking
from .case import Case
from .vision_text import Processor, long_clip, qwen3, qwen25, tokenizer

SCALE = 3.0
LATENT: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
TEXT: dict[str, Any] = {**LATENT, "prompt": "a red fox", "negative_prompt": "blurry", "guidance_scale": SCALE}


def _longcat_parts() -> dict[str, Any]:
    return {
        "transformer": diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6],
        ),
        "text_encoder": qwen25(),
        "tokenizer": tokenizer(),
        "text_processor": Processor(),
        "scheduler": flow(),
    }  # fmt: skip


def _longcat() -> DiffusionPipeline:
    return diffusers.LongCatImagePipeline(
        **_longcat_parts(), vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    )


def _longcat_edit() -> DiffusionPipeline:
    return diffusers.LongCatImageEditPipeline(**_longcat_parts(), vae=shrinking.image(16))


def _renormed(step: SchedulerStep, delta: Tensor) -> Tensor:
    """The delta is part of the sum that LongCat then gives the norm of its conditional prediction, if that is less."""
    cond, uncond = (forward.output for forward in step.forwards)
    total = uncond + SCALE * (cond - uncond) + delta
    return total * (cond.norm(dim=-1, keepdim=True) / (total.norm(dim=-1, keepdim=True) + 1e-8)).clamp(0, 1)


def _hunyuan_refiner() -> DiffusionPipeline:
    return diffusers.HunyuanImageRefinerPipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=16, out_channels=8, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1, 1), guidance_embeds=True,
            text_embed_dim=WIDTH, rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanImageRefiner(
            latent_channels=4, block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2,
            temporal_compression_ratio=1, downsample_match_channel=False, upsample_match_channel=False,
        ),
        text_encoder=qwen25(),
        tokenizer=tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


def modulated(transformer: torch.nn.Module) -> torch.nn.Module:
    """A fresh Kandinsky has zeroed gates, so that its blocks, and with them the text, would do nothing."""
    for name, layer in transformer.named_modules():
        if name.endswith("modulation.out_layer"):
            layer.reset_parameters()
    return transformer


def _kandinsky5_image() -> DiffusionPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, model_dim=WIDTH,
        ff_dim=WIDTH, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip
    pipe = diffusers.Kandinsky5I2IPipeline(
        transformer=modulated(transformer),
        vae=vae(4, levels=4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen25(),
        tokenizer=Processor(),
        scheduler=flow(),
        **long_clip(),
    )  # fmt: skip
    pipe.resolutions = [(64, 64)]  # those of the published model are of a megapixel
    return pipe


def _joy(kind: Callable[..., DiffusionPipeline], transformer: Callable[..., torch.nn.Module]) -> DiffusionPipeline:
    return kind(
        transformer=transformer(
            in_channels=4, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, text_dim=WIDTH, num_layers=2,
            rope_dim_list=[4, 6, 6],
        ),
        vae=shrinking.wan(),
        text_encoder=qwen3(),
        tokenizer=tokenizer(),
        processor=Processor(16),
        scheduler=flow(),
    )  # fmt: skip


def _joy_edit() -> DiffusionPipeline:
    return _joy(diffusers.JoyImageEditPipeline, diffusers.JoyImageEditTransformer3DModel)


def _joy_plus() -> DiffusionPipeline:
    return _joy(diffusers.JoyImageEditPlusPipeline, diffusers.JoyImageEditPlusTransformer3DModel)


def _joy_rescaled(step: SchedulerStep, delta: Tensor) -> Tensor:
    """The delta is part of the sum that Joy then gives the norm of its conditional prediction."""
    rows = [row for forward in step.forwards for row in forward.output.split(1)]
    cond, uncond = rows if len(step.forwards) == 2 else reversed(rows)
    total = uncond + SCALE * (cond - uncond) + delta
    return total * cond.norm(dim=2, keepdim=True) / total.norm(dim=2, keepdim=True)


CASES = {
    "JoyImageEditPipeline": Case(_joy_edit, {**TEXT, "image": picture()}, ("transformer",), arrives=_joy_rescaled),
    "JoyImageEditPlusPipeline": Case(
        _joy_plus, {**TEXT, "images": [[picture()]]}, ("transformer",), arrives=_joy_rescaled, unwanted=2
    ),
    "LongCatImagePipeline": Case(
        _longcat,
        {**TEXT, "height": 16, "width": 16, "enable_prompt_rewrite": False},
        ("transformer",),
        arrives=_renormed,
    ),
    "LongCatImageEditPipeline": Case(_longcat_edit, {**TEXT, "image": picture()}, ("transformer",)),
    "HunyuanImageRefinerPipeline": Case(
        _hunyuan_refiner,
        {**LATENT, "prompt": "a red fox", "image": torch.zeros(1, 8, 1, 4, 4), "height": 8, "width": 8},
        ("transformer",),
    ),
    "Kandinsky5I2IPipeline": Case(
        _kandinsky5_image, {**TEXT, "image": picture(64), "max_sequence_length": 512}, ("transformer",)
    ),
}
