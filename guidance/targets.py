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
        labels: names of all classes, by index, with or without synonyms after commas; capitals do not matter.
        plugin: for messages.

    Raises:
        ParameterError: no such class, or several.
    """
    if not isinstance(target, str):
        return target
    found = _named(target, labels)
    if len(found) == 1:
        return found[0]
    if found:
        raise ParameterError(f"{plugin}: target={target!r} names the classes {found}; give the index of the one meant.")
    hint = did_you_mean(target.lower(), [name.lower() for name in labels])
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
    return [as_known(run.pipeline, label, labels) for label in given]


def as_known(pipeline: Any, label: Any, labels: Sequence[str]) -> Target:
    """One class of a pipeline by its name if the classifier has that among its `labels`, or by its index."""
    if isinstance(label, str) and (_named(label, labels) or not hasattr(pipeline, "class_label")):
        return label
    index = pipeline.class_label(label) if isinstance(label, str) else label
    if index is None or index == getattr(pipeline, "null_class", None):
        return None
    names = getattr(pipeline, "class_names", ())
    named = isinstance(index, int) and 0 <= index < len(names) and _named(names[index], labels)
    return str(names[index]) if named else index


def _named(name: str, labels: Sequence[str]) -> list[int]:
    """The indices of the classes of a name, or else of those that have it among their synonyms."""
    lowered = [label.lower() for label in labels]
    whole = [index for index, label in enumerate(lowered) if label == name.lower()]
    # Those of ImageNet list theirs: "tabby, tabby cat".
    return whole or [index for index, label in enumerate(lowered) if name.lower() in label.split(", ")]
