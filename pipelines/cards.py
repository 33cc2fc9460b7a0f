"""What the model cards of this package share: the machine, and the training curve."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..guidance.canvas import COLOURS, FAINT, GRID, INK, Canvas
from ..training.log import validations

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 64, 28, 48, 44
POINTS = 200
"""The most points of the curve; each is a mean over as many steps as it takes."""


def machine() -> str:
    """What a model was trained on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{'one thread' if threads == 1 else f'{threads} threads'} of a CPU ({name})"


def curve(log: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The loss over the steps on a logarithmic scale, and the dots of what was validated, each on a scale of its own.

    Args:
        log: of `read_log`, at least one row.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    size = math.ceil(len(log) / POINTS)
    pieces = [log[start : start + size] for start in range(0, len(log), size)]
    losses = [(piece[-1]["step"], sum(row["loss"] for row in piece) / len(piece)) for piece in pieces]
    last = log[-1]["step"]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def heights(points: Sequence[tuple[float, float]], to: Any) -> list[tuple[float, float]]:
        low, high = min(to(v) for _, v in points), max(to(v) for _, v in points)
        span = (high - low) or 1.0
        return [(x(step), TOP + (HEIGHT - TOP - BOTTOM) * (high - to(value)) / span) for step, value in points]

    for share in (0, 0.25, 0.5, 0.75, 1):
        canvas.line([(x(last * share), TOP), (x(last * share), HEIGHT - BOTTOM)], GRID, 1)
        canvas.text(x(last * share), HEIGHT - BOTTOM + 6, f"{last * share:,.0f}", FAINT, 11, "ma")
    canvas.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "step", FAINT, 12, "mb")
    canvas.line(heights(losses, math.log), COLOURS[0], 1.5)
    for value, at in ((max, "rt"), (min, "rb")):
        extreme = value(loss for _, loss in losses)
        canvas.text(LEFT - 6, TOP if value is max else HEIGHT - BOTTOM, f"{extreme:.3g}", COLOURS[0], 11, at)
    canvas.text(LEFT, 10, "loss, logarithmic", COLOURS[0], 13)
    for i, (name, points) in enumerate(validations(log).items()):
        colour = COLOURS[1 + i]
        for place in heights(points, float):
            canvas.dot(*place, colour, 3)
        first, final = points[0][1], points[-1][1]
        canvas.text(LEFT + 150, 10 + 16 * i, f"{name.replace('_', ' ')}: {first:.4g} to {final:.4g}", colour, 13)
    canvas.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], INK, 1)
    return canvas.finished()
