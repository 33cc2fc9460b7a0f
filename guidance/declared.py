"""What the installed distributions declare; one whose metadata cannot be read costs nobody else anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distributions, entry_points

logger = logging.getLogger(__name__)


def declared(group: str) -> Iterator[tuple[EntryPoint, str, str]]:
    """The entry points of a group, with the name and version of the distribution of each; nothing is imported."""
    try:
        points = list(entry_points(group=group))
    except Exception:  # of which of them, the library does not say
        points = list(_one_by_one(group))
    for point in points:
        provider = point.dist
        yield point, (provider and provider.name) or "unknown", (provider and provider.version) or "unknown"


def _one_by_one(group: str) -> Iterator[EntryPoint]:
    """Those of all distributions that can be read; of two of one name, the one that is first on the path."""
    seen: set[str] = set()
    for distribution in distributions():
        name = distribution.name or "unknown"
        if distribution.name in seen:
            continue
        seen.add(name)
        try:
            yield from distribution.entry_points.select(group=group)
        except Exception as error:  # whatever is written there, it is no reason to be without the others
            logger.warning(
                "The entry points of %s cannot be read (%s: %s), so its plug-ins are missing. Install it anew: "
                "pip install --force-reinstall %s", name, type(error).__name__, error, name,
            )  # fmt: skip
