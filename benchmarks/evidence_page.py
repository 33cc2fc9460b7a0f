"""The measurements of all plug-ins as a page of Markdown: a table a model, and the rows that other benchmarks took."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trimtab.evaluation.evaluate import HIGHER, MEASURES

from .classifiers_page import estimate
from .rows import Row

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = ("kernel_distance", "clip_score", "accuracy")
"""Measures that have lines, where they were taken; the others stand in the JSON."""
BETTER, WORSE, UNCLEAR = "**better**", "*worse*", "unclear"
FINDINGS: Mapping[str, Mapping[str, str]] = {
    "trimtab/fashion": {
        "dynamic_threshold": "dividing the clean estimate by its quantile turns the background grey: the images' "
        "border has a mean of -0.81, of -0.99 without it and of -1.00 in real images. It is made for colours that "
        "saturate under strong guidance, not for a black background, of which most of these pixels are.",
        "sag": "it takes detail away, of which these images have too little: an image differs from itself under a blur "
        "of one pixel by 0.083 without guidance, by 0.074 with `sag`, and by 0.103 in real images. The model draws "
        "anew what was blurred, so the two predictions of noise differ by that detail, and to add their difference to "
        "the noise subtracts it from the clean estimate: at each of the 10 steps the change of the estimate points "
        "against its detail (cosine -0.3 to -0.6). Diffusers' own pipeline computes the same.",
    }
}
"""Why a row is as it is, by model: found out from runs, and to be found out again where a row is measured anew."""
OTHERS = """## Measured elsewhere

`easycontrol`, `joint` and `smooth` need weights of their own, which do not ship.

| plug-in | what makes its weights | what measures it |
| --- | --- | --- |
| `easycontrol` | `make models`, or `trimtab train easycontrol` on a Flux model | `python -m benchmarks.controls` |
| `joint` | `make models`, or `trimtab train unicon` on a Stable Diffusion model | `python -m benchmarks.controls` |
| `smooth` | `make models`, or `trimtab train smooth` on a Stable Diffusion model | `python -m benchmarks.controls` |
"""


GRADIENTS = """## Guidance by gradients

Taken from [steering](steering.md) and [classifiers](classifiers.md), where the commands stand that repeat them; what
was found, also of what does not help, is said in [gradient guidance measured](gradient-guidance.md). The Fashion-MNIST
model without classes; ± is half the 95% interval, by the standard error for PSNR and by the jackknife for distances.
The gradient of `tfg` goes through the denoiser, one backward pass a step; the other rows need none.

| plug-in | | measure | before | after | evaluations a step | time |
| --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Taken:
    """A row that another benchmark measured.

    Args:
        plugin: what is shown.
        source: file in `docs/`, without its ending; there is a page of this name.
        before, after: names of its rows.
        measure: as the source calls it, and what readers are told.
        evaluations: of the denoiser a step, before and after.
    """

    plugin: str
    source: str
    before: str
    after: str
    measure: tuple[str, str]
    evaluations: tuple[int, int]


PSNR, FRECHET = ("psnr", "PSNR of the hidden half, dB"), ("frechet", "Fréchet distance, judge")
TAKEN = (
    Taken("steered", "steering", "inpainting: no guidance", "inpainting: steered, recurrence=3", PSNR, (1, 3)),
    Taken("tfg", "steering", "inpainting: no guidance", "inpainting: DPS", PSNR, (1, 1)),
    Taken("classifier", "classifiers", "no guidance", "+ sine schedule (EluCD)", FRECHET, (1, 1)),
    Taken("classifier", "classifiers", "no guidance", "noise-aware classifier at x_t", FRECHET, (1, 1)),
    Taken("ppap", "classifiers", "no guidance", "PPAP, 5 experts", FRECHET, (1, 1)),
)


HEAD = """# Evidence

What each built-in plug-in does to a model: measures before and after, and their difference, with 95% intervals by the
bootstrap over images (fixed draws). Both sides have the same seeds and classes, so the difference is drawn in pairs,
and its interval is the narrower one; *better* and *worse* are said where it leaves out 0. Settings were not tuned to
this table. Time is core seconds with the guidance over core seconds without, on one thread, in turns side by side:
median, least and most. `make evidence` measures what is missing.
"""


def page(folder: Path, plugins: Collection[str]) -> str:
    """The page for the files of a folder, one a model.

    Args:
        plugins: of which there should be a row for each model.
    """
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return "\n".join([HEAD, *(section(one["settings"], one["rows"], plugins) for one in found), taken(), OTHERS])


def section(settings: Mapping[str, Any], rows: Mapping[str, Row], plugins: Collection[str]) -> str:
    """The part of one model."""
    findings = FINDINGS.get(settings["model"], {})
    done = {name: rows[name] for name in sorted(rows) if "refused" not in rows[name]}
    refused = {name: rows[name] for name in sorted(rows) if "refused" in rows[name]}
    lines = [f"## {settings['model']}\n", f"{_settings(settings)}\n", *table(done), ""]
    lines += [f"* `{name}`: {findings[name]}" for name in done if name in findings]
    lines += [f"* `{name}` cannot act on this model: {row['refused']}" for name, row in refused.items()]
    lines += [f"* `{name}` is not measured yet." for name in sorted(set(plugins) - set(rows))]
    lines += ["", "| plug-in | measured again by |", "| --- | --- |"]
    lines += [f"| `{name}` | `{row['command']}` |" for name, row in done.items()]
    return "\n".join([*lines, ""])


def _settings(settings: Mapping[str, Any]) -> str:
    """What all rows of a model have in common, in words."""
    said = [f"{settings['count']} images a side"]
    said.append(f"prompts of `{settings['prompts']}`" if settings["prompts"] else "classes in turn")
    said.append(f"{settings['steps']} steps{' in bfloat16' if settings['autocast'] else ''}")
    if settings["guidance_scale"] is not None:
        said.append(f"the pipeline's own guidance scale {settings['guidance_scale']:g}")
    against = f"`{settings['reference']}`" if settings["reference"] else f"{settings['references']} real test images"
    said.append(f"distances to {against} on features of `{settings['features']}`")
    if settings["features"] != "inception":
        said[-1] += ", so none of them is FID or KID"
    return f"{', '.join(said)}."


def table(rows: Mapping[str, Row]) -> list[str]:
    """The lines of each comparison, one a measure."""
    head = ("plug-in", "against", "measure", "before", "after", "difference", "evaluations", "time")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows.values():
        before, after, times = row["before"], row["after"], row["times"]
        first = (f"`{row['setting']}`", before["label"] if "=" not in before["label"] else f"`{before['label']}`")
        cost = (
            f"{before['evaluations']} → {after['evaluations']}",
            f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
        )
        for name in (name for name in SHOWN if name in row["change"]):
            values = [_interval(side[name]) for side in (before["measures"], after["measures"], row["change"])]
            values[-1] += f", {verdict(row['change'][name], MEASURES[name])}"
            lines.append(f"| {' | '.join((*first, name.replace('_', ' '), *values, *cost))} |")
            first, cost = ("", ""), ("", "")
    return lines


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.3g} ({one['low']:.3g} to {one['high']:.3g})"


def verdict(change: Mapping[str, float], direction: str) -> str:
    """Whether the interval of a difference leaves out 0, and on which side."""
    if change["low"] > 0:
        return BETTER if direction == HIGHER else WORSE
    if change["high"] < 0:
        return WORSE if direction == HIGHER else BETTER
    return UNCLEAR


def taken(rows: Sequence[Taken] = TAKEN) -> str:
    """The rows of other benchmarks, read from their JSON."""
    return "\n".join([GRADIENTS, *_lines(rows), ""])


def _lines(rows: Sequence[Taken]) -> Iterator[str]:
    for one in rows:
        known = json.loads((DOCS / f"{one.source}.json").read_text())["rows"]
        before, after = known[one.before], known[one.after]
        key, title = one.measure
        sides = [_plus_minus(row, key) for row in (before, after)]
        times = f"{after['seconds'] / before['seconds']:.2f}" if one.source == "steering" else "not taken"
        label = one.after.partition(": ")[2] or one.after.removeprefix("+ ")
        strength = after.get("weight") or after.get("scale")
        label += f", {'weight' if 'weight' in after else 'scale'} {strength:g}" if strength else ""
        evaluations = " → ".join(map(str, one.evaluations))
        yield f"| `{one.plugin}` | {label} | {title} | {sides[0]} | {sides[1]} | {evaluations} | {times} |"


def _plus_minus(row: Row, key: str) -> str:
    """A value of a row with half its interval, whichever way the benchmark kept its error."""
    value, kept = row[key]
    error = estimate(row, key).error if isinstance(kept, list) else kept
    return f"{value:.1f} ± {1.96 * error:.1f}"
