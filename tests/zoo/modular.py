"""The modular pipeline over the same components as a tiny ordinary one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks, WanBlocks

from .case import Case

BLOCKS = {
    "StableDiffusionXLPipeline": StableDiffusionXLAutoBlocks,
    "StableDiffusion3Pipeline": StableDiffusion3AutoBlocks,
    "WanPipeline": WanBlocks,
}


def modular_twin(pipe: DiffusionPipeline, guider: BaseGuidance) -> ModularPipeline:
    """Diffusers' modular pipeline with the components of `pipe`, guided by `guider`."""
    modular = BLOCKS[type(pipe).__name__]().init_pipeline()
    shared = {name: value for name, value in pipe.components.items() if name in modular.components}
    modular.register_components(**{name: value for name, value in shared.items() if value is not None})
    modular.update_components(guider=guider)
    modular.set_progress_bar_config(disable=True)
    return modular


def run_modular(modular: ModularPipeline, case: Case, seed: int = 0, **override: Any) -> torch.Tensor:
    """Call the modular twin as `run` calls the pipeline of `case`, and return the latents; its guider has the scale."""
    call = {"height": 32, "width": 32, **case.call, **override}
    call.pop("guidance_scale", None)
    video = case.name == "wan"  # whose modular pipeline always decodes
    call["output_type"] = "pt" if video else "latent"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.as_tensor(modular(**call, generator=generator, output="latents" if video else "images"))
