"""Tiny BLIP-Diffusion pipelines: what a picture shows of a subject is put among the words of the prompt."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

from trimtab.conformance.tiny import WIDTH, clip_text, clip_tokenizer, sd_components

from .. import picture
from ..unets import controlled
from .case import Case

QUERIES = 4
"""Patches of 8 by 8 pixels in a picture of 16 by 16."""


class QFormer(transformers.PreTrainedModel):
    """A picture's patches become words. In place of Diffusers' own, which calls what transformers 5 has no longer."""

    config_class = transformers.Blip2Config

    def __init__(self) -> None:
        super().__init__(transformers.Blip2Config(num_query_tokens=QUERIES))
        self.patches = torch.nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)

    def forward(self, image_input: torch.Tensor, text_input: list[str], return_dict: bool) -> torch.Tensor:
        return self.patches(image_input).flatten(2).transpose(1, 2)


def _components() -> dict[str, Any]:
    parts = sd_components()
    return {
        **{name: parts[name] for name in ("unet", "vae", "scheduler")},
        "text_encoder": ContextCLIPTextModel(clip_text().config),
        "tokenizer": clip_tokenizer(),
        "qformer": QFormer(),
        "image_processor": BlipImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }


def blip() -> DiffusionPipeline:
    return diffusers.BlipDiffusionPipeline(**_components())


def blip_controlnet() -> DiffusionPipeline:
    parts = _components()
    return diffusers.BlipDiffusionControlNetPipeline(**parts, controlnet=controlled(parts["unet"], levels=3))


CALL: dict[str, Any] = {
    "prompt": ["in snow"], "reference_image": picture(), "source_subject_category": ["fox"],
    "target_subject_category": ["fox"], "prompt_reps": 1, "neg_prompt": "blurry", "guidance_scale": 3.0, "height": 64,
    "width": 64, "num_inference_steps": 2, "output_type": "pt",
}  # fmt: skip
CASES = {
    "BlipDiffusionPipeline": Case(blip, CALL),
    "BlipDiffusionControlNetPipeline": Case(blip_controlnet, {**CALL, "condtioning_image": picture()}),
}
