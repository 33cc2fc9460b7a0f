"""Rows of the evidence page that other benchmarks measured, read from their JSON in `docs/`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trimtab.evaluation.distances import Estimate, Interval
from trimtab.evaluation.evaluate import HIGHER, LOWER

from .evidence_words import cell, verdict
from .rows import Row, paired

DOCS = Path(__file__).parents[1] / "docs"
PLAIN = "no control"

GRADIENTS = """## Guidance by gradients

Taken from [steering](steering.md) and [classifiers](classifiers.md), where the commands stand that repeat them; what
was found, also of what does not help, is said in [gradient guidance measured](gradient-guidance.md). The Fashion-MNIST
model without classes. The gradient of `tfg` goes through the denoiser, one backward pass a step; the other rows need
none. Differences of distances are paired, by the jackknife. Where only the interval of each side was kept, that of the
difference is the widest that pairs can have ("within"). Time is that of an image against one without guidance, core
seconds of all images of a row.

| plug-in | | measure | before | after | difference | evaluations a step | time |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
CONTROLS = """## Learned controls

What they do is taken from [EasyControl](controls-easycontrol.md), [UniCon](controls-unicon.md) and
[Smooth](controls-smooth.md), where the commands stand that repeat it and a sheet of images each; the shipped weights on
the shipped models, held-out drawings, 20 steps, classifier-free guidance 2. Evaluations are those of a whole image, of
both prompts. Time is measured side by side, {count} images a turn: median, least and most of {turns} turns, by
`python -m benchmarks.evidence_controls{options}`. "Within" as above.

| plug-in | | measure | before | after | difference | evaluations | time |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
FOUND = """
* `easycontrol` bends the outlines of what the model does not know by heart, and no more: the LoRA was trained for less
  than half an hour on one core.
* `smooth` makes the steps between two noises more even. It does not make images better: the Fréchet distance is the
  same within its error.
"""


@dataclass(frozen=True)
class Taken:
    """A row that another benchmark measured.

    Args:
        plugin: what is shown.
        source: file in `docs/`, without its ending; there is a page of this name.
        before, after: names of its rows.
        measure: as the source calls it, what readers are told, and which direction is better.
        evaluations: of the denoiser a step, before and after; a control's are measured.
    """

    plugin: str
    source: str
    before: str
    after: str
    measure: tuple[str, str, str]
    evaluations: tuple[int, int] | None = None


PSNR = ("psnr", "PSNR of the hidden half, dB", HIGHER)
FRECHET = ("frechet", "Fréchet distance, judge", LOWER)
EACH = ("psnr", "istd")
"""Measures of which their benchmarks keep every image's value."""
EDGES = ("own", "F1 of the given edges", HIGHER)
TAKEN = (
    Taken("steered", "steering", "inpainting: no guidance", "inpainting: steered, recurrence=3", PSNR, (1, 3)),
    Taken("tfg", "steering", "inpainting: no guidance", "inpainting: DPS", PSNR, (1, 1)),
    Taken("classifier", "classifiers", "no guidance", "+ sine schedule (EluCD)", FRECHET, (1, 1)),
    Taken("classifier", "classifiers", "no guidance", "noise-aware classifier at x_t", FRECHET, (1, 1)),
    Taken("ppap", "classifiers", "no guidance", "PPAP, 5 experts", FRECHET, (1, 1)),
)
CONTROLLED = (
    Taken("easycontrol", "controls-easycontrol", PLAIN, "its edges, strength=1", EDGES),
    Taken("joint", "controls-unicon", PLAIN, "condition: its edges", EDGES),
    Taken("smooth", "controls-smooth", "scale=0", "scale=1", ("istd", "ISTD", LOWER)),
    Taken("smooth", "controls-smooth", "scale=0", "scale=1", ("frechet", "Fréchet distance, EfficientNet", LOWER)),
)


def gradients(rows: Sequence[Taken] = TAKEN, docs: Path = DOCS) -> str:
    """The part on guidance by gradients; a row that its benchmark does not have now is said to be missing."""
    return "\n".join([GRADIENTS, *_gradients(rows, docs), ""])


def _gradients(rows: Sequence[Taken], docs: Path) -> Iterator[str]:
    for one in rows:
        known = json.loads((docs / f"{one.source}.json").read_text())["rows"]
        label = one.after.partition(": ")[2] or one.after.removeprefix("+ ")
        if one.before not in known or one.after not in known:
            yield f"| `{one.plugin}` | {label} | {one.measure[1]} | not measured now |  |  |  |  |"
            continue
        before, after = known[one.before], known[one.after]
        strength = after.get("weight") or after.get("scale")
        label += f", {'weight' if 'weight' in after else 'scale'} {strength:g}" if strength else ""
        evaluations = " → ".join(map(str, one.evaluations or ()))
        ratio = after["seconds"] / before["seconds"]
        # A row whose images were kept from a run that was stopped has only the time of the rest.
        time = f"{ratio:.2f}" if ratio >= 1 else "not taken"
        yield _line(one, label, before, after, evaluations, time)


def controls(rows: Sequence[Taken] = CONTROLLED, docs: Path = DOCS) -> str:
    """The part on learned controls."""
    costs = json.loads((docs / "evidence-controls.json").read_text())
    lines = []
    for one in rows:
        known: Mapping[str, Any] = json.loads((docs / f"{one.source}.json").read_text())["rows"][one.plugin]
        cost = costs["rows"].get(one.plugin, {"evaluations": (), "times": ()})
        evaluations, times = " → ".join(map(str, cost["evaluations"])), cost["times"]
        time = f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if times else "not taken"
        lines.append(_line(one, one.after, known[one.before], known[one.after], evaluations, time))
    turns = costs["settings"]["turns"]
    head = CONTROLS.format(**costs["settings"], options="" if turns == 5 else f" --turns {turns}")
    return "\n".join([head, *lines, FOUND])


def _line(one: Taken, label: str, before: Row, after: Row, evaluations: str, time: str) -> str:
    key, title, direction = one.measure
    sides = [cell(side(row, key)) for row in (before, after)]
    change, bound = difference(before, after, key, one.before)
    said = f"{cell(change, 'within ' * bound)}, {verdict(vars(change), direction)}"
    return f"| {' | '.join((f'`{one.plugin}`', label, title, *sides, said, evaluations, time))} |"


def side(row: Row, key: str) -> Interval:
    """A measure of a row with its interval, whichever way its benchmark kept it."""
    value, *kept = row[key]
    if len(kept) == 2:
        return Interval(value, *kept)
    if isinstance(kept[0], list):
        return Estimate(value, tuple(kept[0])).interval.within(0.0, math.inf)
    return Interval(value, value - 1.96 * kept[0], value + 1.96 * kept[0])


def difference(before: Row, after: Row, key: str, name: str) -> tuple[Interval, bool]:
    """The difference of two rows with its interval, and whether this is a bound, as no pairs were kept.

    Args:
        name: of the first row, under which the second may have its paired difference.
    """
    if key in EACH and "each" in after and "each" in before:
        middle, error = paired(after["each"], before["each"])
        return Interval(middle, middle - 1.96 * error, middle + 1.96 * error), False
    if key == "own" and name in after.get("more", {}):
        return Interval(*after["more"][name]), False
    if isinstance(after[key][1], list):
        first, second = (Estimate(row[key][0], tuple(row[key][1])) for row in (before, after))
        return (second - first).interval, False
    one, other = side(before, key), side(after, key)
    return Interval(other.value - one.value, other.low - one.high, other.high - one.low), True
