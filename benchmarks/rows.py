"""A table that grows by rows: each is kept as soon as it is measured, so that an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.guidance.files import replacing

Row = Mapping[str, Any]


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
        with replacing(self.file) as file:
            file.write(json.dumps({"settings": self.settings, "rows": self}, indent=2).encode() + b"\n")


def interval(value: float, error: float, digits: int) -> str:
    """A value with half its 95% interval, from its standard error."""
    return f"{value:.{digits}f} ± {1.96 * error:.{digits}f}"
