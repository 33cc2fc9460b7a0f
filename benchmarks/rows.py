"""A table that grows by rows: each is kept as soon as it is measured, so that an interrupted run continues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trimtab.guidance.files import replacing

Row = Mapping[str, Any]

NUMBERS = re.compile(r"\[([-+.\d\se,]*)\]")
"""A list of numbers, which stands on one line, for there may be one an image."""


class Rows(dict[str, Row]):
    """Rows by name, in a JSON file beside the settings that they were measured under.

    Args:
        file: is read if it exists; rows of other settings are not taken over.
        settings: plain values.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, json.loads(json.dumps(settings))
        kept = json.loads(file.read_text()) if file.exists() else {}
        super().__init__(kept["rows"] if kept.get("settings") == self.settings else {})

    def __setitem__(self, name: str, row: Row) -> None:
        super().__setitem__(name, row)
        text = json.dumps({"settings": self.settings, "rows": self}, indent=2)
        text = NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
        with replacing(self.file) as file:
            file.write(text.encode() + b"\n")


def interval(value: float, error: float, digits: int) -> str:
    """A value with half its 95% interval, from its standard error."""
    return f"{value:.{digits}f} ± {1.96 * error:.{digits}f}"


def signed(value: float, error: float, digits: int) -> str:
    """A difference with half its 95% interval, from its standard error; one above 0 says so."""
    return f"{value:+.{digits}f} ± {1.96 * error:.{digits}f}"


def paired(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """The mean difference of two rows, image by image, and its standard error."""
    pairs = [a - b for a, b in zip(after, before, strict=True)]
    return mean(pairs), stdev(pairs) / len(pairs) ** 0.5
