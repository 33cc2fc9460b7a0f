"""The measurement of learned controls as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.evaluation.distances import Estimate

from .rows import Row, interval

PAGE = """# Learned controls measured

Made by

    {command}

{count} held-out drawings, which neither the models nor the controls have seen, {steps} denoising steps, classifier-free
guidance {guidance:g}, the noise of an image by its number. F1 is that of edges (Sobel, above a fifth of the steepest)
within a pixel; means with their 95% intervals (bootstrap over drawings).
"""
EASYCONTROL = """
## EasyControl: edges

| | F1 against its own edges | F1 against another drawing's |
| --- | --- | --- |
{table}

![A row of images for each line](images/easycontrol.png)
"""
JOINT = """
## UniCon: edges in every mode

The second column is the chance level: the same edges against those of another drawing.

| | F1 | F1 against another drawing's |
| --- | --- | --- |
{table}

![Images and their partners in every mode](images/joint.png)
"""
SMOOTH = """
## Smooth: even steps

{ways} ways between two noises with one caption, nine images each. ISTD: lower is more even. Fréchet distance on
features of EfficientNet-Lite0 between {count} images and the training drawings (no FID), with its 95% interval
(jackknife over ten groups of images).

| | ISTD | difference, paired by way | Fréchet distance | difference, paired by seed |
| --- | --- | --- | --- | --- |
{table}

![Two ways, without the LoRA and with it](images/smooth.png)
"""


def page(rows: Mapping[str, Row], command: str, settings: Mapping[str, Any]) -> str:
    """The page's measured part, of the parts that were measured."""
    text = PAGE.format(command=command, **settings)
    for name, part, table in (("easycontrol", EASYCONTROL, edges), ("joint", JOINT, edges), ("smooth", SMOOTH, steps)):
        text += part.format(table=table(rows[name]), **settings) if name in rows else ""
    return text


def edges(part: Row) -> str:
    """The lines of a part that is judged by its edges."""
    return "\n".join(f"| {name} | {ranged(row['own'])} | {ranged(row['other'])} |" for name, row in part.items())


def steps(part: Row) -> str:
    """The lines of the part that is judged by its steps; the first is what the others differ from."""
    lines = []
    first = next(iter(part.values()))
    for name, row in part.items():
        distance = Estimate(*row["frechet"])
        further = distance - Estimate(*first["frechet"])
        evener = [a - b for a, b in zip(row["each"], first["each"], strict=True)]
        cells = [ranged(row["istd"]), _difference(evener), interval(distance.value, distance.error, 1)]
        cells.append(interval(further.value, further.error, 1))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ranged(value: Sequence[float]) -> str:
    """A value with its interval."""
    middle, low, high = value
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _difference(values: Sequence[float]) -> str:
    count = len(values)
    middle = sum(values) / count
    error = (sum((value - middle) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return interval(middle, error, 3)
