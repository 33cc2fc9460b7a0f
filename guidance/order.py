"""In which order guidances act, and which cannot act together."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Guidance
from .errors import ConflictError
from .registry import identify


def ordered(guidances: Mapping[str, Guidance]) -> list[str]:
    """The names of attached guidances in the order of phases 4 to 6.

    That is the order in which they were attached, changed only where `before` and `after` of a plug-in ask for it: of
    those that may come next, the one attached first does. Plug-ins named there that are not attached do not matter.

    Raises:
        ConflictError: `before` and `after` contradict each other; the message shows the cycle.
    """
    predecessors = {name: _predecessors(name, guidances) for name in guidances}
    order: list[str] = []
    waiting = list(guidances)
    while waiting:
        ready = next((name for name in waiting if predecessors[name] <= set(order)), None)
        if ready is None:
            raise _cycle_error(guidances, predecessors, waiting)
        order.append(ready)
        waiting.remove(ready)
    return order


def check_conflicts(guidances: Mapping[str, Guidance]) -> None:
    """Refuse guidances that claim the same exclusive slot.

    Raises:
        ConflictError: naming both, with their plug-ins, distributions and versions.
    """
    holders: dict[str, str] = {}
    for name, guidance in guidances.items():
        if guidance.exclusive is None:
            continue
        holder = holders.setdefault(guidance.exclusive, name)
        if holder != name:
            both = f"{_describe(holder, guidances)} and {_describe(name, guidances)}"
            raise ConflictError(
                f"Only one guidance may claim the slot {guidance.exclusive!r}, but {both} do; "
                f"attach one of them: remove_guidance({holder!r})."
            )


def _predecessors(name: str, guidances: Mapping[str, Guidance]) -> set[str]:
    """The attached guidances that must come before this one."""
    plugin = guidances[name].name
    return {
        other
        for other, guidance in guidances.items()
        if other != name and (guidance.name in guidances[name].after or plugin in guidance.before)
    }


def _cycle_error(
    guidances: Mapping[str, Guidance], predecessors: Mapping[str, set[str]], waiting: list[str]
) -> ConflictError:
    # Each that still waits has a predecessor that waits too, so walking backwards must come round.
    path = [waiting[0]]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in waiting if name in predecessors[path[-1]]))
    cycle = path[path.index(path[-1]) :][::-1]
    steps = " before ".join(_describe(name, guidances) for name in cycle)
    return ConflictError(
        f"These guidances cannot be ordered: {steps}. Remove one of them: remove_guidance({cycle[0]!r})."
    )


def _describe(name: str, guidances: Mapping[str, Guidance]) -> str:
    cls = type(guidances[name])
    plugin = identify(cls)
    return f"{name!r} = {plugin or f'{cls.name or cls.__name__} (not registered, from {cls.__module__})'}"
