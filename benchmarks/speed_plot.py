"""The ratios of `benchmarks.speed` as a picture: a bar for each comparison, with all turns' spread and the FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from trimtab.guidance.canvas import COLOURS, FAINT, GRID, INK, Canvas

LABELS, SCALE, MOST, ROW, TOP = 470, 300, 1.3, 26, 60
"""Widths of the labels and of the scale, the ratio at its end, height of a row, and where the first one begins."""


@dataclass(frozen=True)
class Ratio:
    """One comparison: the ratios of time turn by turn, and that of the counted FLOPs."""

    label: str
    turns: Sequence[float]
    flops: float


def plot(groups: Mapping[str, Sequence[Ratio]]) -> Image.Image:
    """A bar from 0 to each median, a line over least to most, a dot at the ratio of FLOPs.

    Args:
        groups: comparisons by architecture.
    """
    rows = sum(len(group) + 1 for group in groups.values())
    canvas = Canvas(LABELS + SCALE + 90, TOP + rows * ROW + 10)
    canvas.text(12, 12, "Time of guided sampling, divided by that of the other way", INK, 16)
    canvas.text(12, 34, "bar: median; line: least to most of all turns; dot: counted FLOPs", FAINT)

    def at(ratio: float) -> float:
        return LABELS + SCALE * min(ratio, MOST) / MOST

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
        canvas.line([(at(tick), TOP), (at(tick), TOP + rows * ROW)], FAINT if tick == 1 else GRID, 1)
        canvas.text(at(tick), TOP - 4, f"{tick:g}", FAINT, 11, "mb")
    y = float(TOP)
    for colour, (name, group) in zip(COLOURS, groups.items(), strict=False):
        canvas.text(12, y + ROW / 2, name, INK, 14, "lm")
        for ratio in group:
            y += ROW
            middle, height = statistics.median(ratio.turns), y + ROW / 2
            canvas.text(LABELS - 10, height, ratio.label, INK, 12, "rm")
            canvas.box(at(0), y + 6, at(middle), y + ROW - 6, colour)
            canvas.line([(at(min(ratio.turns)), height), (at(max(ratio.turns)), height)], INK, 1.5)
            canvas.dot(at(ratio.flops), height, INK, 3)
            canvas.text(at(MOST) + 8, height, f"{middle:.3f}", INK, 12, "lm")
        y += ROW
    return canvas.finished()
