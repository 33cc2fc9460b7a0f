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


def labels_of_call(run: Run, labels: Sequence[str]) -> list[Target] | None:
    """The classes that the pipeline's call was given, as the classifier knows them; `None` if it was given none.

    A class goes by its name where pipeline and classifier both have that, and else by its index.

    Args:
        run: with the call.
        labels: the classifier's, by index.
    """
    given = run.arguments.get("class_labels") if run.arguments else None
    if isinstance(given, (int, str)):
        given = [given]
    if not isinstance(given, (list, tuple)):
        return None
    known = [name.lower() for name in labels]
    return [_as_known(run.pipeline, label, known) for label in given]


def _as_known(pipeline: Any, label: Any, known: Sequence[str]) -> Target:
    """One class of a pipeline by its name if that is known, or by its index."""
    if isinstance(label, str) and (label.lower() in known or not hasattr(pipeline, "class_label")):
        return label
    index = pipeline.class_label(label) if isinstance(label, str) else label
    if index is None or index == getattr(pipeline, "null_class", None):
        return None
    names = getattr(pipeline, "class_names", ())
    named = isinstance(index, int) and 0 <= index < len(names) and names[index].lower() in known
    return str(names[index]) if named else index
