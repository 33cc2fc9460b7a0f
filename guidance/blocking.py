"""Which plug-ins may be used.

The environment variables `TRIMTAB_PLUGINS_BLOCKED` and `TRIMTAB_PLUGINS_ALLOWED` hold names or patterns (`acme.*`)
separated by commas; `set_blocked` and `set_allowed` do the same from within. Where something is allowed, only that can
be used; what is blocked never can. `TRIMTAB_PLUGINS_BLOCKED=*` blocks all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

BLOCKED, ALLOWED = "TRIMTAB_PLUGINS_BLOCKED", "TRIMTAB_PLUGINS_ALLOWED"

_blocked: tuple[str, ...] = ()
_allowed: tuple[str, ...] = ()


def set_blocked(*names: str) -> None:
    """Block these plug-ins (names or patterns) in this process, in place of those of the call before."""
    global _blocked
    _blocked = names


def set_allowed(*names: str) -> None:
    """Allow only these plug-ins (names or patterns) in this process; without names, all that are not blocked again."""
    global _allowed
    _allowed = names


def blocked_by(name: str) -> str | None:
    """What blocks a plug-in, in words; `None` where nothing does."""

    def listed(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)

    if listed(_blocked):
        return "trimtab.set_blocked"
    if listed(os.environ.get(BLOCKED, "").split(",")):
        return f"the environment variable {BLOCKED}"
    if _allowed and not listed(_allowed):
        return f"trimtab.set_allowed, which lists only {', '.join(_allowed)}"
    allowed = os.environ.get(ALLOWED, "").strip()
    if allowed and not listed(allowed.split(",")):
        return f"the environment variable {ALLOWED}, which lists only {allowed}"
    return None
