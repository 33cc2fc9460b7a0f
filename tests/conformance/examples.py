"""How the built-in plug-ins that need parameters are used on the kit's pipelines."""

from __future__ import annotations

from typing import Any

from trimtab.conformance import Example


def example(name: str, pipe: Any) -> Example | None:
    """The `pytest_trimtab_example` hook; `None` for a plug-in whose defaults will do."""
    return None
