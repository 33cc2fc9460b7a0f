"""`FluxPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import FluxPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedFluxPipeline(NamedPipeline, FluxPipeline):
    """Diffusers' `FluxPipeline` with `add_guidance` and its companions."""
