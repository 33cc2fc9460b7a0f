"""`StableDiffusion3Pipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import StableDiffusion3Pipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedStableDiffusion3Pipeline(NamedPipeline, StableDiffusion3Pipeline):
    """Diffusers' `StableDiffusion3Pipeline` with `add_guidance` and its companions."""
