"""The conformance kit's fingerprints, under a short name for these tests."""

from __future__ import annotations

from trimtab.conformance.fingerprint import fingerprint, of_pipeline

__all__ = ["fingerprint", "of_pipeline"]
