"""`StableDiffusionPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import StableDiffusionPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedStableDiffusionPipeline(NamedPipeline, StableDiffusionPipeline):
    """Diffusers' `StableDiffusionPipeline` with `add_guidance` and its companions."""
