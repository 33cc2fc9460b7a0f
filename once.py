"""What one of several processes does or says for all of them."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

Told = TypeVar("Told")

RUN = "TORCHELASTIC_RUN_ID"
"""The environment variable by which PyTorch's launcher, and so Accelerate's, tells processes what they belong to."""
RECENT = 60.0
"""Seconds for which a note counts: a launcher that gives no number to its runs may have left an older one."""


def by_main(act: Callable[[], Told]) -> Told:
    """What the main process gets by an act, told to all; what it refuses, all refuse."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from .guidance.errors import TrimtabError

    told: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            told = [act()]
        except TrimtabError as error:
            told = [error]
    if PartialState().num_processes > 1:
        broadcast_object_list(told)
    if isinstance(told[0], TrimtabError):
        raise told[0]
    result: Told = told[0]
    return result


def notes(run: str, launcher: int) -> Path:
    """The folder in which the processes of a run note what was said.

    Args:
        run: its number.
        launcher: the process that started them.
    """
    return Path(tempfile.gettempdir()) / f"trimtab-{run}-{launcher}"


def complain(message: str) -> None:
    """Print a line on stderr, unless another process of the same run on this machine has just printed it.

    Which of them fail nobody knows beforehand, and one that fails ends the others, so the first to come speaks, and
    notes that it did.
    """
    run = os.environ.get(RUN)
    if run is None:
        print(message, file=sys.stderr)
        return
    folder = notes(run, os.getppid())
    note = folder / hashlib.sha256(message.encode()).hexdigest()
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock", timeout=RECENT):
            if not note.exists() or time.time() - note.stat().st_mtime > RECENT:
                print(message, file=sys.stderr, flush=True)  # before the note: who is ended meanwhile has not noted it
                note.touch()
    except OSError:  # said twice is better than not at all
        print(message, file=sys.stderr)
