"""Progress as a person sees it: the bars say which guidance is being prepared, and which ones act."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm

from .components import stages_of
from .taps import set_attribute

PATIENCE = 1.0
"""Seconds after which preparing is worth a bar."""


def settings_of(pipe: Any) -> dict[str, Any]:
    """What the pipeline's own progress bar is called with; a stock run leaves them on the pipeline as well."""
    settings: dict[str, Any] = pipe.__dict__.setdefault("_progress_bar_config", {})
    return settings


def name_guidances(stack: ExitStack, pipe: Any, names: Iterable[str]) -> None:
    """Have the pipeline's own progress bar say who guides, unless its user gave it another name."""
    shown = {"desc": f"guided by {', '.join(names)}"}
    for stage in stages_of(pipe):
        if hasattr(stage, "set_progress_bar_config"):
            set_attribute(stack, stage, "_progress_bar_config", {**shown, **settings_of(stage)})


def prepared(pipe: Any, names: Iterable[str]) -> Iterator[str]:
    """The names one after the other; a line says which one it is where one takes long."""
    stage = stages_of(pipe)[0]
    if not hasattr(stage, "set_progress_bar_config") or settings_of(stage).get("disable", False):
        yield from names
        return
    for name in names:
        with tqdm(desc=f"prepare {name}", bar_format="{desc}", delay=math.inf, leave=False) as line:
            shown = threading.Timer(PATIENCE, line.display)
            shown.daemon = True
            shown.start()
            try:
                yield name
            finally:
                shown.cancel()
