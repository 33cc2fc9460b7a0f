"""Diffusers' own perturbed-attention pipelines over the components of a stock pipeline."""

from __future__ import annotations

import inspect

import diffusers
from diffusers import DiffusionPipeline

TWINS = {
    "StableDiffusionPipeline": ("StableDiffusionPAGPipeline", "mid"),
    "StableDiffusionXLPipeline": ("StableDiffusionXLPAGPipeline", "mid"),
    "PixArtSigmaPipeline": ("PixArtSigmaPAGPipeline", "blocks.1"),
    "StableDiffusion3Pipeline": ("StableDiffusion3PAGPipeline", "blocks.2"),
}


def pag_twin(pipe: DiffusionPipeline, layers: str | list[str] | None = None) -> DiffusionPipeline:
    """Diffusers' PAG pipeline of the same family, sharing every component of `pipe`.

    Args:
        pipe: a pipeline of one of the classes in `TWINS`.
        layers: `pag_applied_layers`; by default the mid block, or block 1 of a transformer.
    """
    name, default = TWINS[type(pipe).__name__]
    twin = getattr(diffusers, name)
    accepted = inspect.signature(twin.__init__).parameters
    components = {key: value for key, value in pipe.components.items() if key in accepted}
    options = {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
    built = twin(**components, pag_applied_layers=layers or default, **options)
    built.set_progress_bar_config(disable=True)
    return built
