"""Errors that a user meets. Each says which plug-in and parameter, the value given, and what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of all errors raised on purpose by this package."""


class ParameterError(TrimtabError, ValueError):
    """A parameter that does not exist or a value that is not allowed."""


class UnknownGuidanceError(TrimtabError, KeyError):
    """No plug-in, or no attached guidance, has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class PluginError(TrimtabError):
    """A plug-in that cannot be used: broken, too old, blocked, or in conflict with another."""


class ConflictError(TrimtabError):
    """Two guidances that cannot act together, or an order that cannot be satisfied."""


class RecipeError(TrimtabError, ValueError):
    """A recipe that is corrupt, or that needs what is not installed."""


class SourceError(TrimtabError, OSError):
    """A folder or a Hub repository that does not give the file asked for, with the reason."""


class UntrustedCodeError(TrimtabError, ValueError):
    """Code from the Hub that was not both trusted and pinned to a commit."""


class WeightsError(TrimtabError, ValueError):
    """Weights that are not safetensors, are corrupt, or are not those that were meant."""


class UnsupportedSchedulerError(TrimtabError, ValueError):
    """A scheduler whose noise levels this package does not know."""


class UnsupportedPipelineError(TrimtabError, ValueError):
    """A pipeline that cannot be guided, with the reason that was observed."""


class GuidanceRuntimeError(TrimtabError, RuntimeError):
    """Something went wrong inside a hook while a pipeline was running."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known name is close; capital letters do not matter."""
    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""
