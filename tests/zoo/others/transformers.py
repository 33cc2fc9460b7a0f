"""Tiny pipelines with a transformer, of classes that are of no further kind."""

from __future__ import annotations

from .case import Case

CASES: dict[str, Case] = {}
