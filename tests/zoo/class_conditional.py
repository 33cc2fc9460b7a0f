"""This package's own class-conditional pipeline, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from trimtab.pipelines.embedded import ClassConditionalPipeline


def class_conditional(names: Sequence[str], side: int = 8, **scheduler: Any) -> ClassConditionalPipeline:
    """A pipeline of the classes `names` and grey images of `side` pixels, always the same weights.

    Args:
        **scheduler: options of its DDIM scheduler.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=side,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=len(names) + 1,
    ).eval()
    pipe = ClassConditionalPipeline(unet, DDIMScheduler(clip_sample=False, **scheduler), list(names))
    pipe.set_progress_bar_config(disable=True)
    return pipe
