"""`QwenImagePipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import QwenImagePipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedQwenImagePipeline(NamedPipeline, QwenImagePipeline):
    """Diffusers' `QwenImagePipeline` with `add_guidance` and its companions."""
