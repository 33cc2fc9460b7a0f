"""Which plug-ins may be used.

The environment variables `TRIMTAB_PLUGINS_BLOCKED` and `TRIMTAB_PLUGINS_ALLOWED` hold names or patterns (`acme.*`)
separated by commas. Where the second is set, only what it lists can be used; what is blocked never can.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

BLOCKED, ALLOWED = "TRIMTAB_PLUGINS_BLOCKED", "TRIMTAB_PLUGINS_ALLOWED"

_blocked: tuple[str, ...] = ()


def set_blocked(*names: str) -> None:
    """Block these plug-ins (names or patterns) in this process, in place of those of the call before."""
    global _blocked
    _blocked = names


def blocked_by(name: str) -> str | None:
    """What blocks a plug-in, in words; `None` where nothing does."""

    def listed(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)

    if listed(_blocked):
        return "trimtab.set_blocked"
    if listed(os.environ.get(BLOCKED, "").split(",")):
        return f"the environment variable {BLOCKED}"
    allowed = os.environ.get(ALLOWED, "").strip()
    if allowed and not listed(allowed.split(",")):
        return f"the environment variable {ALLOWED}, which lists only {allowed}"
    return None
