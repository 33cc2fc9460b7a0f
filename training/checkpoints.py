"""The folder of a training: one command at a time, the same settings, checkpoints written to their end or not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..guidance.errors import ParameterError
from ..guidance.files import locked, replacing

WHOLE = "whole"
"""The file that a checkpoint is given last."""


def alone(folder: Path, what: str) -> AbstractContextManager[None]:
    """Let no other command train in the folder within the block.

    Args:
        folder: for all that a training writes.
        what: trains, for the message.

    Raises:
        ParameterError: one does.
    """
    return locked(
        folder / ".training.lock",
        ParameterError(
            f"{what}: output={str(folder)!r}: another command trains there; wait for it, or give another --output."
        ),
    )


def check_same(file: Path, given: Mapping[str, Any], what: str) -> None:
    """Write down what the files of a folder are made with, or compare it with what was written down there.

    Args:
        file: in that folder.
        given: plain values.
        what: is made, for the message.

    Raises:
        ParameterError: they were made with something else.
    """
    if not file.exists():
        with replacing(file) as written:
            written.write(json.dumps(given, indent=2).encode() + b"\n")
        return
    kept = json.loads(file.read_text())
    for name, value in given.items():
        if kept.get(name) != value:
            raise ParameterError(
                f"{what}: {name}={value!r}, but {file.parent} holds what was made with {name}={kept.get(name)!r}; "
                "continue with that, or give another --output."
            )


def save(accelerator: Accelerator) -> None:
    """Write a checkpoint, and last that it is whole; called on all processes."""
    folder = Path(accelerator.save_state())
    if accelerator.is_main_process:
        (folder / WHOLE).touch()
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> None:
    """Go on from the newest checkpoint that was written to its end; one that was cut off is removed."""
    folder = output / "checkpoints"
    found = list(folder.iterdir()) if folder.is_dir() else []
    whole = {int(path.name.rsplit("_", 1)[1]): path for path in found if (path / WHOLE).exists()}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in set(found) - set(whole.values()):
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
    if whole:
        accelerator.load_state(str(whole[max(whole)]))
        accelerator.project_configuration.iteration = max(whole) + 1
