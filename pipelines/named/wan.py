"""`WanPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import WanPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedWanPipeline(NamedPipeline, WanPipeline):
    """Diffusers' `WanPipeline` with `add_guidance` and its companions."""
