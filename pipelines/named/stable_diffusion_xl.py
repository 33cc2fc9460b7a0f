"""`StableDiffusionXLPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import StableDiffusionXLPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedStableDiffusionXLPipeline(NamedPipeline, StableDiffusionXLPipeline):
    """Diffusers' `StableDiffusionXLPipeline` with `add_guidance` and its companions."""
