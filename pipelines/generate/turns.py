"""Who makes which image of a batch: each takes the next one as soon as it is done, so nobody waits for a slower one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
        self._folder, self._file, self._launch = folder, folder / FILE, f"{launch}\n".encode()
        self._lock = FileLock(folder / f"{FILE}.lock")
        self._pieces: defaultdict[int, list[int]] = defaultdict(list)
        self._count, self._read = 0, len(self._launch)

    def begin(self) -> None:
        """From now on turns are those of this launch, and nothing is taken; to be called once, before anybody takes."""
        with self._lock:
            self._file.write_bytes(self._launch)

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
        with self._open() as file:
            own = self._pieces[group]
            if turn == len(own):
                file.truncate(self._read)  # a line that a killed process left unfinished goes
                file.seek(self._read)
                file.write(b"%d\n" % group)
                self._read_on(file)
            return own[turn]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody takes a turn, and no other launch begins, within the block.

        Raises:
            RequestError: another launch has begun.
        """
        with self._open():
            yield

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file while the lock is held, with all turns known that were taken."""
        with self._lock, self._file.open("r+b") as file:
            if file.readline() != self._launch:
                raise RequestError(f"{self._folder}: another command has begun to make images there; this one ends.")
            self._read_on(file)
            yield file

    def _read_on(self, file: BinaryIO) -> None:
        """Read the turns that were taken since this was last called."""
        file.seek(self._read)
        for line in file:
            if line.endswith(b"\n"):
                self._pieces[int(line)].append(self._count)
                self._count += 1
                self._read += len(line)
