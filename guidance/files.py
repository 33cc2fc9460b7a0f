"""Files that appear complete or not at all, and locks that one command holds."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")
ABANDONED = 60.0
"""Seconds after which nobody is still writing a file: a picture or a LoRA takes less."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` when the block ends, also when the machine stops meanwhile.

    After an exception `path` is what it was.

    Raises:
        IsADirectoryError: a folder has this name.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder is where this file should be; remove or rename it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove what processes that were killed within `replacing` left of these files.

    One that changed within `ABANDONED` seconds stays: another command may be writing it, and would fail without it.
    """
    for path in folder.glob(".*.tmp"):
        unfinished = _UNFINISHED.fullmatch(path.name)
        if unfinished and unfinished[1] in names:
            with suppress(FileNotFoundError):  # finished meanwhile
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


@contextmanager
def locked(file: Path, otherwise: Exception) -> Iterator[None]:
    """Hold a lock file within the block; it is free again when the process ends, however it does.

    Args:
        file: is made where it is missing, and stays.
        otherwise: what to raise where somebody else holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise otherwise from None
    try:
        yield
    finally:
        lock.release()
