"""The file of `--prompts`: a prompt a line, or an object a line; what is wrong with one is said with its number."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .request import Request, RequestError, option
from .samples import resolve

KEYS = ("prompt", "negative_prompt", "class_label", "seed")
"""What an object of a `.jsonl` file may say."""


Rows = Sequence[tuple[int, dict[str, Any]]]
"""The fields of a request that each line says, with its number."""


def read_prompts(file: Path, base: Request, pipe: Any = None, rows: Rows | None = None) -> list[Request]:
    """The requests of a prompt file: a prompt a line, or, in a `.jsonl` file, an object a line.

    Args:
        file: text in UTF-8, whose lines end as those of any system do. An object's keys are `KEYS`.
        base: all other settings; request i has the seed `base.seed + i` unless its line says another.
        pipe: the model, which refuses what it does not take, such as a class that it does not know.
        rows: what `read_rows` gave of the file, where it was read already: what is no regular file is empty by then.

    Raises:
        RequestError: naming the line.
    """
    found: list[Request] = []
    for number, row in read_rows(file) if rows is None else rows:
        with _naming(file, number):
            one = dataclasses.replace(base, **{"seed": base.seed + len(found), **row})
            if pipe is not None:
                resolve(one, pipe)
        found.append(one)
    if not found:
        raise RequestError(f"--prompts: {file} holds no prompt.")
    return found


def read_rows(file: Path) -> Rows:
    """What the lines of a prompt file say; empty ones are left out.

    Raises:
        RequestError: naming the line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"--prompts: {file} cannot be read: {error.strerror}; give a text file.") from None
    rows = []
    # Bytes have lines, as editors do; `str.splitlines` ends one also at characters that a prompt may hold.
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        with _naming(file, number):
            text = _text(line)
            row = (_row(text) if file.suffix == ".jsonl" else {"prompt": text}) if text else None
        if row is not None:
            rows.append((number, row))
    return rows


@contextmanager
def _naming(file: Path, number: int) -> Iterator[None]:
    """Say of what is refused in which line it stands."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"--prompts: {file}, line {number}: {_of_file(str(error))}") from None


def _text(line: bytes) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise RequestError(f"{error.object[:80]!r} is not UTF-8; save the file as UTF-8.") from None


def _row(line: str) -> dict[str, Any]:
    """The fields of a request that an object says."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
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
        if message.startswith(f"{option(key)}: "):
            return f"{key}: {message.removeprefix(f'{option(key)}: ')}"
    return message
