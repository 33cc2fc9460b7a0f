"""Tiny pipelines with a UNet, or for sound, of classes that are of no further kind."""

from __future__ import annotations

from . import edits_of_images, flows, frames, kolors, other_loops, repeating, sounds, subjects, versatile
from .case import Case

MODULES = (edits_of_images, flows, frames, kolors, other_loops, repeating, sounds, subjects, versatile)
CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}
