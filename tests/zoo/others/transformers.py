"""Tiny pipelines with a transformer, of classes that are of no further kind."""

from __future__ import annotations

from . import edits, images, kandinsky6, ltx2, qwen, videos
from .case import Case

CASES: dict[str, Case] = {
    **edits.CASES, **images.CASES, **kandinsky6.CASES, **ltx2.CASES, **qwen.CASES, **videos.CASES,
}  # fmt: skip
