"""`DiTPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import DiTPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedDiTPipeline(NamedPipeline, DiTPipeline):
    """Diffusers' `DiTPipeline` with `add_guidance` and its companions."""
