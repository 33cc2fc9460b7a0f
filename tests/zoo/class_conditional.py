"""This package's own class-conditional pipeline, tiny and with random weights."""

from __future__ import annotations

from trimtab.conformance.tiny import class_conditional

__all__ = ["class_conditional"]
