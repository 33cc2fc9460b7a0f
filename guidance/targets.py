"""Which class each image is guided to: by name, by index, or as the pipeline's call says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ParameterError, did_you_mean
from .run import Run

Target = int | str | None
"""A class by index or name; `None` for no guidance."""


def class_index(target: Target, labels: Sequence[str], plugin: str) -> int | None:
    """The index of a class given by index or name.

    Args:
        target: the class.
        labels: names of all classes, by index; whether they are written in capitals does not matter.
        plugin: for messages.

    Raises:
        ParameterError: no such class.
    """
    if not isinstance(target, str):
        return target
    lowered = [name.lower() for name in labels]
    if target.lower() in lowered:
        return lowered.index(target.lower())
    hint = did_you_mean(target.lower(), lowered)
    known = f"It knows {', '.join(labels[:20])}." if labels else "Its classes have no names; give labels=."
    raise ParameterError(f"{plugin}: target={target!r} is no class of the classifier.{hint} {known}")


def labels_of_call(run: Run) -> Any:
    """The classes that the pipeline's call was given, as indices; `None` if it was given none."""
    given = run.arguments.get("class_labels") if run.arguments else None
    if isinstance(given, (int, str)):
        given = [given]
    if not isinstance(given, (list, tuple)):
        return None
    index = getattr(run.pipeline, "class_label", None)
    return [index(label) if isinstance(label, str) and index is not None else label for label in given]
