"""What the author of a plug-in tells the kit about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXEMPTIBLE = ("identity", "agreement", "composition", "precision", "batch", "memory")
"""Checks that a guidance may be unable to pass by its very definition; nothing excuses from the others."""


@dataclass(frozen=True)
class Example:
    """How a plug-in is used in the checks.

    Args:
        parameters: given to `add_guidance`; beside them its defaults hold. They stay as they are where the kit draws
            others.
        exempt: checks that its formula cannot pass, each with the reason, which the report shows: of `"identity"`,
            `"agreement"`, `"composition"`, `"precision"`, `"batch"` and `"memory"` (of a network that it loads once).

    Raises:
        ValueError: a check that nothing excuses from, or an exemption without a reason.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for check, reason in self.exempt.items():
            if check not in EXEMPTIBLE:
                raise ValueError(f"exempt={check!r}; allowed: {', '.join(map(repr, EXEMPTIBLE))}.")
            if not reason.strip():
                raise ValueError(f"exempt={check!r} needs a reason, which the report shows.")
