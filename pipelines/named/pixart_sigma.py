"""`PixArtSigmaPipeline` as a guidable pipeline.

The import is absolute because Diffusers copies this file out of its package when it is given as `custom_pipeline`.
"""

from diffusers import PixArtSigmaPipeline

from trimtab.pipelines.named import NamedPipeline


class GuidedPixArtSigmaPipeline(NamedPipeline, PixArtSigmaPipeline):
    """Diffusers' `PixArtSigmaPipeline` with `add_guidance` and its companions."""
