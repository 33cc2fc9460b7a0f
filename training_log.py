"""The log that a training writes beside its model, one row of JSON a step: how it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "log.jsonl"
PLAIN = ("step", "loss", "lr", "seconds")
"""What every row holds; anything else in it was validated."""


def read_log(output: str | Path) -> list[dict[str, Any]]:
    """The training log of a run, one row a step."""
    rows = [json.loads(line) for line in (Path(output) / FILE).read_text().splitlines()]
    # Steps after the last checkpoint are taken again when a killed run continues: the later row counts.
    return list({row["step"]: row for row in rows}.values())


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
