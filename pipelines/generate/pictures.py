"""Image files: what a PNG says about its own making, writing that never leaves half a file, and labelled sheets."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ...guidance.errors import TrimtabError
from ...guidance.files import replacing

KEY = "trimtab"
"""The PNG text chunk that holds the settings, as one JSON object."""

SMALLEST_CELL, LARGEST_CELL = 96, 512
"""Edge lengths in pixels between which a sheet shows an image; metadata and single files are never resized."""

_FONT_SIZE, _GAP, _LABEL_CHARACTERS = 16, 8, 22
_ENDS = {".png": (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"), ".gif": (b"GIF8", b"\0;")}
"""What a file of a kind begins and ends with."""


class PictureError(TrimtabError, ValueError):
    """A file that is no PNG of this package."""


def save(image: Image.Image, path: Path, metadata: dict[str, Any]) -> Path:
    """Write a PNG with its settings inside. The file appears complete or not at all, also when the machine stops."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(KEY, json.dumps(metadata, ensure_ascii=False, allow_nan=False))
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=chunk)
    return path


def whole(path: Path) -> bool:
    """Whether there is a PNG or a GIF with its beginning and its end, which an emptied or a truncated one is not.

    What lies between is not read: many thousands are looked at when a batch is continued.
    """
    if path.suffix not in _ENDS:
        return False
    first, last = _ENDS[path.suffix]
    try:
        with path.open("rb") as file:
            start = file.read(len(first))
            file.seek(-len(last), os.SEEK_END)
            return start == first and file.read() == last
    except OSError:  # also of a file that is shorter than its end
        return False


def load(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """An image and the settings that it was made with.

    Raises:
        FileNotFoundError: no such file.
        PictureError: the file is no PNG, or was not made by this package.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            opened.load()
            image, text = opened.copy(), getattr(opened, "text", {})
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"{path} is not a PNG file that can be read: {error}") from error
    if KEY not in text:
        raise PictureError(f"{path} carries no settings: it was not made by trimtab, or another program dropped them.")
    try:
        metadata = json.loads(text[KEY])
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{path}: its settings are not valid JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise PictureError(f"{path}: its settings are a {type(metadata).__name__}, not a JSON object.")
    return image, metadata


@dataclass(frozen=True)
class Row:
    """One line of a sheet: what its images have in common, and the images."""

    label: str
    images: Sequence[Image.Image]


def sheet(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """A grid of images with a label on each row and column.

    Small images are enlarged by a whole factor without smoothing, so that their pixels stay what they are.

    Args:
        title: the line above everything.
        columns: one label a column.
        rows: rows of as many images as there are columns, all of one size.
    """
    for row in rows:
        if len(row.images) != len(columns):
            raise ValueError(f"rows: {row.label!r} has {len(row.images)} images for {len(columns)} columns.")
    font = ImageFont.load_default(size=_FONT_SIZE)
    labels = [_wrapped(row.label) for row in rows]
    width, height = _cell_size(rows[0].images[0])
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = max(_extent(canvas, label, font)[0] for label in labels) + 2 * _GAP
    line = _extent(canvas, "Ag", font)[1] + _GAP
    top = 2 * line + 2 * _GAP
    pitch = max(height, *(_extent(canvas, label, font)[1] for label in labels)) + _GAP
    column = max(width, *(_extent(canvas, label, font)[0] for label in columns)) + _GAP
    needed = _extent(canvas, title, font)[0] + 2 * _GAP

    result = Image.new("RGB", (max(left + column * len(columns), needed), top + pitch * len(rows)), "white")
    draw = ImageDraw.Draw(result)
    draw.text((_GAP, _GAP), title, fill="black", font=font)
    for x, label in enumerate(columns):
        draw.text((left + column * x, _GAP + line), label, fill="black", font=font)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.multiline_text((_GAP, top + pitch * y), label, fill="black", font=font)
        for x, image in enumerate(row.images):
            result.paste(_fitted(image, (width, height)), (left + column * x, top + pitch * y))
    return result


def _cell_size(image: Image.Image) -> tuple[int, int]:
    if min(image.size) < SMALLEST_CELL:
        factor = math.ceil(SMALLEST_CELL / min(image.size))
        return image.width * factor, image.height * factor
    shrink = min(1.0, LARGEST_CELL / max(image.size))
    return round(image.width * shrink), round(image.height * shrink)


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    larger = size[0] >= image.width
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, _LABEL_CHARACTERS)) or label


def _extent(draw: ImageDraw.ImageDraw, text: str, font: Any) -> tuple[int, int]:
    box = draw.multiline_textbbox((0, 0), text, font=font)
    return math.ceil(box[2]), math.ceil(box[3])
