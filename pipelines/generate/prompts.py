"""The file of `--prompts`: a prompt a line, or an object a line; what is wrong with one is said with its number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .request import Request, RequestError
from .samples import resolve

KEYS = ("prompt", "negative_prompt", "class_label", "seed")
"""What an object of a `.jsonl` file may say."""


def read_prompts(file: Path, base: Request, pipe: Any = None) -> list[Request]:
    """The requests of a prompt file: a prompt a line, or, in a `.jsonl` file, an object a line.

    Args:
        file: text. An object's keys are `KEYS`.
        base: all other settings; request i has the seed `base.seed + i` unless its line says another.
        pipe: the model, which refuses what it does not take, such as a class that it does not know.

    Raises:
        RequestError: naming the line.
    """
    found: list[Request] = []
    for number, line in _lines(file):
        try:
            row = _row(line) if file.suffix == ".jsonl" else {"prompt": line}
            one = dataclasses.replace(base, **{"seed": base.seed + len(found), **row})
            if pipe is not None:
                resolve(one, pipe)
        except RequestError as error:
            raise RequestError(f"--prompts: {file}, line {number}: {_of_file(str(error))}") from None
        found.append(one)
    if not found:
        raise RequestError(f"--prompts: {file} holds no prompt.")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    return ((number, line.strip()) for number, line in lines if line.strip())


def _row(line: str) -> dict[str, Any]:
    """The fields of a request that an object says."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"this is not JSON: {error}") from None
    if not isinstance(row, dict) or not row or row.keys() - set(KEYS):
        raise RequestError(f"{line[:80]!r} is not allowed; allowed: an object with some of {', '.join(KEYS)}.")
    if type(row.get("class_label")) is int:
        row["class_label"] = str(row["class_label"])
    for name, value in row.items():
        wanted = int if name == "seed" else str
        if type(value) is not wanted:
            raise RequestError(
                f"{name}={value!r} is not allowed; allowed: {'a whole number' if wanted is int else 'a text'}."
            )
    return row


def _of_file(message: str) -> str:
    """What is said of an option, said of the key in the file."""
    for key in KEYS:
        option = f"--{key.removesuffix('_label').replace('_', '-')}: "
        if message.startswith(option):
            return f"{key}: {message.removeprefix(option)}"
    return message
