"""The log that a training writes beside its model, one row of JSON a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..guidance.files import replacing

FILE = "log.jsonl"
PLAIN = ("step", "loss", "lr", "seconds")
"""What every row holds; anything else in it was validated."""


def append(output: Path, row: Mapping[str, Any]) -> None:
    """Add the row of a step."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / FILE).open("a") as log:
        log.write(json.dumps(row) + "\n")


def keep(output: Path, step: int) -> None:
    """Leave the rows up to a step, from which the training goes on: those after it are taken again.

    What a killed run left unfinished goes too.
    """
    if not (output / FILE).exists():
        return
    rows = [row for row in read_log(output) if row["step"] <= step]
    with replacing(output / FILE) as log:
        log.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_log(output: str | Path) -> list[dict[str, Any]]:
    """The training log of a run, one row a step, without a last line that a killed run left unfinished."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (Path(output) / FILE).read_text().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["step"]] = row
    return list(rows.values())


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a model card says of a run: mean loss of the last 100 steps, the last validation, hours.

    Args:
        rows: of `read_log`.
    """
    last = rows[-100:]
    found = {"loss": sum(row["loss"] for row in last) / len(last), "hours": sum(row["seconds"] for row in rows) / 3600}
    return found | {name: points[-1][1] for name, points in validations(rows).items()}


def validations(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """What was validated, by name, in the order of the log: pairs of step and value.

    Args:
        rows: of `read_log`.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in (name for name in row if name not in PLAIN):
            found.setdefault(name, []).append((row["step"], row[name]))
    return found
