"""Tiny pipelines with a UNet, or for sound, of classes that are of no further kind."""

from __future__ import annotations

from . import frames, kolors, sounds, subjects
from .case import Case

CASES: dict[str, Case] = {**frames.CASES, **kolors.CASES, **sounds.CASES, **subjects.CASES}
