"""Who makes which image of a batch: each takes the next one as soon as it is done, so nobody waits for a slower one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

FILE = ".turns"


class Turns:
    """A file in a folder with a line for each piece of work that was taken: the number of the group that took it.

    The processes of a group do the same, so the n-th piece of one is that of the others, whoever asks first.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._lock = FileLock(folder / f"{FILE}.lock")

    def clear(self) -> None:
        """Nothing is taken; to be called once, before anybody takes."""
        self._file.write_bytes(b"")

    def take(self, group: int, count: int) -> Iterator[int]:
        """The pieces of work, out of `count`, that fall to a group, each taken when it is asked for."""
        turn = 0
        while (piece := self._taken(group, turn)) < count:
            yield piece
            turn += 1

    def _taken(self, group: int, turn: int) -> int:
        with self._lock, self._file.open("ab+") as file:
            file.seek(0)
            groups = file.read().split()
            own = [piece for piece, of in enumerate(groups) if int(of) == group]
            if turn < len(own):
                return own[turn]
            file.seek(0, os.SEEK_END)
            file.write(b"%d\n" % group)
            return len(groups)
