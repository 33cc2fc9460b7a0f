"""Tiny stock pipelines with random weights that are of no further kind: one case a class, by its name."""

from __future__ import annotations

from . import transformers, unets
from .case import Case

__all__ = ["OTHERS", "Case"]

OTHERS: dict[str, Case] = {**unets.CASES, **transformers.CASES}
