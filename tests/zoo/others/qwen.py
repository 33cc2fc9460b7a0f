"""Qwen-Image's pipelines that edit pictures, or take them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from recorder import SchedulerStep
from torch import Tensor

from trimtab.conformance.tiny import HEAD_DIM, HEADS, WIDTH, flow

from .. import mask, picture
from . import shrinking
from .case import Case
from .vision_text import Processor, qwen25, tokenizer

SCALE = 3.0
EDIT: dict[str, Any] = {
    "image": picture(), "prompt": "a red fox", "negative_prompt": "blurry", "true_cfg_scale": SCALE,
    "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 256,
}  # fmt: skip


def _edit(kind: Callable[..., DiffusionPipeline], **config: Any) -> DiffusionPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip
    return kind(
        transformer=transformer,
        vae=shrinking.qwen_image(),
        text_encoder=qwen25(),
        tokenizer=tokenizer(),
        processor=Processor(),
        scheduler=flow(),
    )


def _edits() -> DiffusionPipeline:
    return _edit(diffusers.QwenImageEditPipeline)


def _inpaint() -> DiffusionPipeline:
    return _edit(diffusers.QwenImageEditInpaintPipeline)


def _plus() -> DiffusionPipeline:
    return _edit(diffusers.QwenImageEditPlusPipeline)


def _layered() -> DiffusionPipeline:
    return _edit(diffusers.QwenImageLayeredPipeline, use_additional_t_cond=True, use_layer3d_rope=True)


def _rescaled(step: SchedulerStep, delta: Tensor) -> Tensor:
    """The delta is part of the sum that the pipeline then gives the norm of its conditional prediction."""
    cond, uncond = (forward.output[:, : delta.shape[1]] for forward in step.forwards)
    total = uncond + SCALE * (cond - uncond) + delta
    return total * cond.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)


CASES = {
    "QwenImageEditPipeline": Case(_edits, EDIT, ("transformer",), arrives=_rescaled),
    "QwenImageEditInpaintPipeline": Case(
        _inpaint,
        {**EDIT, "mask_image": mask(), "strength": 0.7, "num_inference_steps": 3},
        ("transformer",),
        arrives=_rescaled,
    ),
    "QwenImageEditPlusPipeline": Case(
        _plus, {**EDIT, "image": [picture(), picture()]}, ("transformer",), arrives=_rescaled
    ),
    "QwenImageLayeredPipeline": Case(_layered, {**EDIT, "layers": 2, "output_type": "pt"}, ("transformer",)),
}
