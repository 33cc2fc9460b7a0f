"""Palettes and symmetry: guidances for Diffusers pipelines, as plug-ins of trimtab."""

from .palette import Palette
from .symmetry import Symmetry

__all__ = ["Palette", "Symmetry"]
