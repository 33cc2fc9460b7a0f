"""The picture of a trace: how large each change was, where it pointed, and what each step cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from .canvas import COLOURS, FAINT, GRID, INK, Canvas, nice
from .trace import Trace

ALL = "#333333"
WIDTH, LEFT, RIGHT, HEAD, FOOT, GAP = 1100, 76, 250, 66, 52, 58


@dataclass(frozen=True)
class Line:
    """One curve; `None` where it does not act."""

    label: str
    colour: str
    values: Sequence[float | None]
    thick: bool = False


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps.

    Args:
        title: what is drawn.
        height: in pixels.
        lines: curves; in a panel of bars, what is stacked.
        low, high: of the axis.
        bars: numbers above the bars, which make it a panel of bars.
    """

    title: str
    height: int
    lines: Sequence[Line]
    low: float
    high: float
    bars: Sequence[str] | None = None


def draw(trace: Trace) -> Image.Image:
    """The picture of a trace, 1100 pixels wide."""
    panels = _panels(trace)
    height = HEAD + FOOT + sum(panel.height for panel in panels) + GAP * (len(panels) - 1)
    canvas = _Canvas(height, len(trace.steps))
    canvas.text(LEFT - 52, 14, f"{trace.pipeline} with {trace.scheduler}", INK, 20)
    total = f"{len(trace.steps)} steps, {trace.evaluations} evaluations an image, {trace.seconds:.2f} s"
    canvas.text(WIDTH - 24, 18, total, FAINT, 15, "ra")
    top = HEAD
    for panel in panels:
        canvas.panel(panel, top)
        top += panel.height + GAP
    canvas.steps(trace, top - GAP)
    return canvas.finished()


def _panels(trace: Trace) -> list[Panel]:
    names = list(dict.fromkeys(name for name, _ in trace.lines))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    sizes, directions, losses = [], [], []
    for name, hook in trace.lines:
        found = trace.series(name, hook)
        label = name if hook == "delta" else f"{name}, {hook}"
        changes = [None if one is None else one.change for one in found]
        if any(changes):
            sizes.append(Line(label, colours[name], [None if c is None else c.relative for c in changes]))
            # A change that is nothing points nowhere.
            aims = [c.cosine if c is not None and c.norm > 0 else None for c in changes]
            directions.append(Line(label, colours[name], aims))
        if any(one is not None and one.loss is not None for one in found):
            losses.append(Line(name, colours[name], [None if one is None else one.loss for one in found]))
    if len(trace.lines) > 1 or losses:
        totals = [step.total for step in trace.steps]
        sizes.append(Line("all together", ALL, [None if c is None else c.relative for c in totals], thick=True))
        aims = [c.cosine if c is not None and c.norm > 0 else None for c in totals]
        directions.append(Line("all together", ALL, aims, thick=True))
    panels = [
        Panel("Size of the change, relative to what it changes", 250, sizes, 0.0, _ceiling(sizes)),
        Panel("Direction: cosine between the change and what it changes", 170, directions, -1.0, 1.0),
    ]
    if losses:
        lowest = min(0.0, *(value for line in losses for value in line.values if value is not None))
        panels.append(Panel("Loss", 130, losses, lowest, _ceiling(losses)))
    hooks = [
        Line(f"hooks of {name}", colours[name], [
            sum(one.seconds for one in step.contributions.get(name, {}).values()) for step in trace.steps
        ]) for name in names
    ]  # fmt: skip
    spent = [sum(float(line.values[index] or 0) for line in hooks) for index in range(len(trace.steps))]
    rest = [max(0.0, step.seconds - own) for step, own in zip(trace.steps, spent, strict=True)]
    evaluations = [str(step.evaluations) for step in trace.steps]
    ceiling = nice(max((step.seconds for step in trace.steps), default=1.0) * 1.15)
    bars = [Line("denoiser and all else", "#B8BEC6", rest), *hooks]
    panels.append(Panel("Seconds a step; above, evaluations an image", 120, bars, 0.0, ceiling, evaluations))
    return panels


def _ceiling(lines: Sequence[Line]) -> float:
    return nice(max((value for line in lines for value in line.values if value is not None), default=1.0) * 1.02)


class _Canvas(Canvas):
    def __init__(self, height: int, steps: int) -> None:
        super().__init__(WIDTH, height)
        self._steps = steps

    def x(self, step: float) -> float:
        """The middle of a step's column."""
        return LEFT + (step + 0.5) * (WIDTH - LEFT - RIGHT) / max(self._steps, 1)

    def panel(self, panel: Panel, top: float) -> None:
        bottom = top + panel.height

        def y(value: float) -> float:
            return bottom - (value - panel.low) / ((panel.high - panel.low) or 1.0) * panel.height

        self.text(LEFT - 52, top - 24, panel.title, INK, 14)
        for tick in range(5):
            value = panel.low + (panel.high - panel.low) * tick / 4
            self.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], FAINT if value == 0 else GRID, 1)
            self.text(LEFT - 8, y(value), f"{value:.3g}", FAINT, 12, "rm")
        if panel.bars is None:
            self._curves(panel, y)
        else:
            self._bars(panel, y)

    def _curves(self, panel: Panel, y: Callable[[float], float]) -> None:
        ends = []
        for line in panel.lines:
            points = [(self.x(i), y(v)) if v is not None else None for i, v in enumerate(line.values)]
            for before, after in pairwise(points):
                if before and after:
                    self.line([before, after], line.colour, 3.5 if line.thick else 2)
            drawn = [point for point in points if point]
            for point in drawn:
                self.dot(*point, line.colour, 3 if self._steps <= 60 else 1.5)
            if drawn:
                ends.append((drawn[-1], line))
        low = -math.inf
        for (x, at), line in sorted(ends, key=lambda end: end[0][1]):
            place = max(at, low)
            low = place + 17
            edge = WIDTH - RIGHT
            self.line([(x + 5, at), (edge, at), (edge + 12, place)], line.colour, 0.5)
            self.text(edge + 17, place, line.label, line.colour, 14, "lm")

    def _bars(self, panel: Panel, y: Callable[[float], float]) -> None:
        assert panel.bars is not None
        half = 0.38 * (WIDTH - LEFT - RIGHT) / max(self._steps, 1)
        labels = max(1, math.ceil(self._steps / 40))
        for step, number in enumerate(panel.bars):
            base = 0.0
            for line in panel.lines:
                value = float(line.values[step] or 0.0)
                self.box(self.x(step) - half, y(base + value), self.x(step) + half, y(base), line.colour)
                base += value
            if step % labels == 0:
                self.text(self.x(step), y(base) - 3, number, INK, 12, "mb")
        for row, line in enumerate(panel.lines):
            at = y(panel.high) + 6 + 18 * row
            self.box(WIDTH - RIGHT + 17, at - 5, WIDTH - RIGHT + 27, at + 5, line.colour)
            self.text(WIDTH - RIGHT + 33, at, line.label, INK, 13, "lm")

    def steps(self, trace: Trace, top: float) -> None:
        """The axis below the last panel."""
        every = max(1, math.ceil(self._steps / 20))
        self.text(LEFT - 8, top + 8, "step", FAINT, 12, "ra")
        self.text(LEFT - 8, top + 24, "timestep", FAINT, 12, "ra")
        for position, step in enumerate(trace.steps):
            if position % every == 0:
                self.text(self.x(position), top + 8, str(step.index), FAINT, 12, "ma")
                self.text(self.x(position), top + 24, f"{step.timestep:.4g}", FAINT, 12, "ma")
