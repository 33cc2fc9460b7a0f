"""The manifest of a batch: one JSON line an image, written by all processes, true after a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...guidance.files import replacing

FILE = "manifest.jsonl"
STATUSES = ("done", "failed")


class Manifest:
    """`manifest.jsonl` in a folder.

    A row says which image of the batch it is about (`index`), its `file` and `seed`, and its `status`: `"done"`, or
    `"failed"` with the `error`. Of several rows about one image the last counts.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lock = FileLock(folder / f".{FILE}.lock")
        self._found: dict[int, dict[str, Any]] = {}
        self._read, self._inode = 0, -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Processes take turns, and a line that a killed process left unfinished is closed first."""
        line = _line(row)
        with self._lock, self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[int, dict[str, Any]]:
        """The rows by index, in the order of the batch; lines that are no rows are left out."""
        self._read_on()
        return dict(sorted(self._found.items()))

    def count(self) -> int:
        """How many images have rows, for whoever asks after each image: it looks at the lines since it last did."""
        self._read_on()
        return len(self._found)

    def _read_on(self) -> None:
        if not self.path.exists():
            self._found, self._read = {}, 0
            return
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:  # `keep` has put another in its place
                self._found, self._read, self._inode = {}, 0, status.st_ino
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self._take(line)

    def _take(self, line: bytes) -> None:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(index := row.get("index")) is int and _says_all(row):
                self._found[index] = row

    def keep(self, files: Mapping[int, str], failed: bool = True) -> None:
        """Rewrite the file in the order of the batch, with the rows of these files alone (by index).

        Args:
            files: their names.
            failed: keep rows of failures too; of files that are there these are no longer true.
        """
        with self._lock:
            rows = [row for index, row in self.rows().items() if files.get(index) == row["file"]]
            with replacing(self.path) as file:
                file.writelines(_line(row) for row in rows if failed or row["status"] == "done")


def _says_all(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("file"), str) and row.get("status") in STATUSES


def _line(row: Mapping[str, Any]) -> bytes:
    """A row in UTF-8; what that cannot say, half of a character, as JSON spells it: `\\ud83d`."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
