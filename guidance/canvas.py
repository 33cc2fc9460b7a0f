"""What diagrams are drawn on: lines, dots and text, with PIL alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A4FBF")
INK, FAINT, GRID = "#222222", "#777777", "#E4E4E4"
TWICE = 2  # drawn twice as large and scaled down, which smooths the lines


def nice(value: float) -> float:
    """A round number at or above the value, which divides well by four."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if step * power >= value)


class Canvas:
    """A white sheet of so many pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self._image = Image.new("RGB", (width * TWICE, height * TWICE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        """What was drawn."""
        return self._image.resize(self.size, Image.Resampling.LANCZOS)

    def text(self, x: float, y: float, text: str, colour: str, size: int = 13, anchor: str = "la") -> None:
        """Text, of which the anchor (as PIL names them) is at this point."""
        font = ImageFont.load_default(size=size * TWICE)
        self._draw.text((x * TWICE, y * TWICE), text, fill=colour, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """A line through these points."""
        scaled = [(x * TWICE, y * TWICE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * TWICE), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """A filled rectangle."""
        self._draw.rectangle([left * TWICE, top * TWICE, right * TWICE, bottom * TWICE], fill=colour)

    def dot(self, x: float, y: float, colour: str, radius: float) -> None:
        """A filled disc."""
        x, y, radius = x * TWICE, y * TWICE, radius * TWICE
        self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
