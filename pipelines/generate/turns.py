"""Who makes which image of a batch: each takes the next one as soon as it is done, so nobody waits for a slower one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .request import RequestError

FILE = ".turns"


class Turns:
    """A file in a folder: the launch whose turns they are, and a line for each piece of work, with who took it.

    The processes of a group do the same, so the n-th piece of one is that of the others, whoever asks first. A process
    that outlived an earlier launch finds another one here, and goes no further.

    Args:
        folder: of the batch.
        launch: told to all processes of one launch.
    """

    def __init__(self, folder: Path, launch: str) -> None:
        self._folder, self._file, self._launch = folder, folder / FILE, launch
        self._lock = FileLock(folder / f"{FILE}.lock")

    def begin(self) -> None:
        """From now on turns are those of this launch, and nothing is taken; to be called once, before anybody takes."""
        with self._lock:
            self._file.write_text(f"{self._launch}\n")

    def take(self, group: int, count: int) -> Iterator[int]:
        """The pieces of work, out of `count`, that fall to a group, each taken when it is asked for.

        Raises:
            RequestError: another launch has begun.
        """
        turn = 0
        while (piece := self._taken(group, turn)) < count:
            yield piece
            turn += 1

    def _taken(self, group: int, turn: int) -> int:
        with self.held() as groups:
            own = [piece for piece, of in enumerate(groups) if int(of) == group]
            if turn < len(own):
                return own[turn]
            with self._file.open("a") as file:
                file.write(f"{group}\n")
            return len(groups)

    @contextmanager
    def held(self) -> Iterator[list[str]]:
        """The groups in the order of their turns; nobody takes one, and no other launch begins, within the block.

        Raises:
            RequestError: another launch has begun.
        """
        with self._lock:
            launch, *groups = self._file.read_text().split()
            if launch != self._launch:
                raise RequestError(f"{self._folder}: another command has begun to make images there; this one ends.")
            yield groups
