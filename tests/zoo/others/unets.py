"""Tiny pipelines with a UNet, or for sound, of classes that are of no further kind."""

from __future__ import annotations

from .case import Case

CASES: dict[str, Case] = {}
