"""The measurement of learned controls as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.evaluation.distances import Estimate

from .controls_edges import ALONE, PLAIN, WRONG
from .rows import Row, interval, paired

PAGE = """# Learned controls measured

Made by

    {command}

{count} held-out drawings, which neither the models nor the controls have seen, {steps} denoising steps, classifier-free
guidance {guidance:g}, the noise of an image by its number. F1 is that of edges (Sobel, above a fifth of the steepest)
within a pixel; means with their 95% intervals (bootstrap over drawings). "More than" is the mean of the differences
drawing by drawing, of one caption and one noise.
"""
EASYCONTROL = """
## EasyControl: edges

| | F1 against its own edges | against another's | more than no control | more than with another's edges |
| --- | --- | --- | --- | --- |
{table}

With a classifier at scale {steer:g} that is asked for the drawing's category. How many images are of it, another
classifier says, trained by another seed:

| | of the requested category | more than no control | more than with its edges alone |
| --- | --- | --- | --- |
{categories_table}

![A row of images for each line](images/easycontrol.png)
"""
JOINT = """
## UniCon: edges in every mode

The second column is the chance level: the same edges against those of another drawing, which in the row "condition:
another drawing's edges" are the given ones. Of edges that are made, "more than with another's edges" is more than this.

| | F1 | against another's | more than no control | more than with another's edges |
| --- | --- | --- | --- | --- |
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
    if (part := rows.get("easycontrol")) is not None:
        text += EASYCONTROL.format(table=edges(part), categories_table=categories(part), **settings)
    for name, layout, table in (("joint", JOINT, edges), ("smooth", SMOOTH, steps)):
        text += layout.format(table=table(rows[name]), **settings) if name in rows else ""
    return text


def edges(part: Row) -> str:
    """The lines of a part that is judged by its edges."""
    more = (PLAIN, WRONG)
    return "\n".join(
        " | ".join([f"| {name}", ranged(row["own"]), ranged(row["other"]), *_cells(row["more"], more)]) + " |"
        for name, row in part.items()
    )


def categories(part: Row) -> str:
    """The lines that say how many images are of the category that was requested."""
    more = (PLAIN, ALONE)
    return "\n".join(
        " | ".join([f"| {name}", ranged(row["category"]), *_cells(row["more of the category"], more)]) + " |"
        for name, row in part.items()
    )


def steps(part: Row) -> str:
    """The lines of the part that is judged by its steps; the first is what the others differ from."""
    lines = []
    first = next(iter(part.values()))
    for name, row in part.items():
        distance = Estimate(*row["frechet"])
        further = distance - Estimate(*first["frechet"])
        evener = paired(row["each"], first["each"])
        cells = [ranged(row["istd"]), interval(*evener, 3), interval(distance.value, distance.error, 1)]
        cells.append(interval(further.value, further.error, 1))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ranged(value: Sequence[float], sign: str = "") -> str:
    """A value with its interval; with "+" as `sign`, one above 0 says so."""
    middle, low, high = (f"{one:{sign}.3f}" for one in value)
    return f"{middle} ({low} to {high})"


def _cells(differences: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[str]:
    """Differences with their intervals, in the order of these names; nothing where there is none."""
    return [ranged(differences[name], "+") if name in differences else "" for name in names]
