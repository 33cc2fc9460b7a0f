"""The picture of a sweep: quality against cost, a dot with its interval for each cell, the Pareto front joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..guidance.canvas import COLOURS, FAINT, GRID, INK, Canvas, nice

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 1100, 640, 90, 330, 84, 64
SIDE = 20
FRONT, OTHER = COLOURS[1], "#9AA3AD"


def draw(cells: Sequence[Mapping[str, Any]], quality: str, direction: str) -> Image.Image:
    """The picture, 1100 pixels wide.

    Args:
        cells: as in `sweep.json`.
        quality: the measure on the upright axis.
        direction: what is said about it.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    values = [cell["measures"][quality] for cell in cells]
    costs = [cell["evaluations"] for cell in cells]
    ends = [end for one in values for end in one.values()]
    low, high = min(ends), max(ends)
    step = nice((high - low) / 4)
    low, right, bottom = math.floor(low / step) * step, WIDTH - RIGHT, HEIGHT - FOOT
    ticks = math.ceil((high - low) / step - 1e-9) or 1
    furthest = nice(1.1 * max(costs))

    def x(cost: float) -> float:
        return LEFT + cost / furthest * (right - LEFT)

    def y(value: float) -> float:
        return bottom - (value - low) / (ticks * step) * (bottom - TOP)

    canvas.text(24, 14, f"{quality.replace('_', ' ')} against cost", INK, 20)
    how = "bars: 95 % intervals; equal costs stand side by side; joined: the Pareto front"
    canvas.text(24, 44, f"{direction}; {how}", FAINT, 14)
    for tick in range(ticks + 1):
        value = low + tick * step
        canvas.line([(LEFT, y(value)), (right, y(value))], GRID, 1)
        canvas.text(LEFT - 8, y(value), f"{value:.4g}", FAINT, 12, "rm")
    for tick in range(5):
        cost = furthest * tick / 4
        canvas.line([(x(cost), TOP), (x(cost), bottom)], GRID, 1)
        canvas.text(x(cost), bottom + 8, f"{cost:g}", FAINT, 12, "ma")
    canvas.text((LEFT + right) / 2, bottom + 32, "evaluations of the denoiser an image", INK, 14, "ma")

    points = []
    for place, (cost, one) in enumerate(zip(costs, values, strict=True)):
        beside = costs[:place].count(cost) - (costs.count(cost) - 1) / 2
        points.append((x(cost) + SIDE * beside, y(one["value"])))
    front = sorted({point for point, cell in zip(points, cells, strict=True) if cell["pareto"]})
    canvas.line(front, FRONT, 1.5)
    for number, (cell, point, one) in enumerate(zip(cells, points, values, strict=True), start=1):
        colour = FRONT if cell["pareto"] else OTHER
        if "low" in one:
            canvas.line([(point[0], y(one["low"])), (point[0], y(one["high"]))], colour, 1)
        canvas.dot(*point, colour, 9)
        canvas.text(*point, str(number), "white", 11, "mm")
    _legend(canvas, cells, right)
    return canvas.finished()


def _legend(canvas: Canvas, cells: Sequence[Mapping[str, Any]], left: float) -> None:
    """The cells by number, as many as there is room for; `sweep.json` has them all."""
    pitch, room = 20, (HEIGHT - TOP - FOOT) // 20
    for number, cell in enumerate(cells[:room], start=1):
        colour = FRONT if cell["pareto"] else FAINT
        canvas.text(left + 44, TOP + pitch * number - pitch, str(number), colour, 13, "ra")
        canvas.text(left + 54, TOP + pitch * number - pitch, cell["label"][:44], colour, 13)
    if len(cells) > room:
        canvas.text(left + 54, TOP + pitch * room, f"and {len(cells) - room} more", FAINT, 13)
