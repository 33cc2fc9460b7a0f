"""What a run puts on objects that it does not own: taken off on every path, and lifted while a user's own code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_ABSENT = object()


class Taps(ExitStack):
    """What is put on objects until it closes, and may be lifted meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._taps: list[tuple[Callable[[], object], Callable[[], bool]]] = []

    def put(self, on: Callable[[], object], off: Callable[[], bool]) -> None:
        """Call `on` now and `off` at the end, which says whether what `on` did was still there."""
        on()
        self.callback(off)
        self._taps.append((on, off))

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Leave the objects as they would be without, for as long as this lasts."""
        lifted = [on for on, off in reversed(self._taps) if off()]
        try:
            yield
        finally:
            for on in reversed(lifted):
                on()


def put(stack: ExitStack, on: Callable[[], object], off: Callable[[], bool]) -> None:
    """Call `on` now and `off` when the stack closes; see `Taps.put`."""
    if isinstance(stack, Taps):
        stack.put(on, off)
    else:
        on()
        stack.callback(off)


def set_attribute(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute until the stack closes; then put back what was there, if ours is still there.

    Writes to `__dict__` directly: wrapped modules pass an ordinary assignment on to the module inside.
    """
    previous: Any = _ABSENT

    def on() -> None:
        nonlocal previous
        previous = owner.__dict__.get(name, _ABSENT)
        owner.__dict__[name] = value

    def off() -> bool:
        if owner.__dict__.get(name, _ABSENT) is not value:
            return False
        if previous is _ABSENT:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = previous
        return True

    put(stack, on, off)
