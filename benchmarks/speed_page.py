"""The results of `benchmarks.speed` as a page and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from PIL import Image

from benchmarks.speed_plot import Ratio, plot
from benchmarks.ways import Way

COMPARED = (
    ("guidable, nothing attached, CFG", "stock pipeline, CFG"),
    ("CFG + PAG", "CFG + PAG, Diffusers' PAG pipeline"),
    ("CFG + PAG", "CFG + PAG, one plain batch"),
    ("CFG + PAG", "CFG + PAG, a call each, as guiders do"),
    ("PAG alone", "PAG alone, Diffusers' PAG pipeline"),
    ("CFG + PAG", "CFG + PAG, Diffusers' guider"),
    ("CFG + PAG + SEG", "CFG + PAG + SEG, a call each, as guiders do"),
    ("CFG + PAG + SEG", "CFG + PAG + SEG, a guider of Diffusers' parts"),
)
"""Which way is divided by which."""


def ratio(ways: Sequence[Way], this: str, that: str) -> Ratio:
    """Those of time, turn by turn, and that of the FLOPs."""
    by_name = {way.name: way for way in ways}
    one, other = by_name[this], by_name[that]
    turns = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    return Ratio(f"{this} : {that}", turns, one.flops / other.flops)


def compared(ways: Sequence[Way]) -> list[tuple[str, str]]:
    """The comparisons that can be made among these ways."""
    names = {way.name for way in ways}
    return [pair for pair in COMPARED if names.issuperset(pair)]


def drawing(results: dict[str, dict[str, Any]]) -> Image.Image:
    """The ratios as a picture."""
    groups = {name: _ways(result) for name, result in results.items()}
    return plot({name: [ratio(ways, *pair) for pair in compared(ways)] for name, ways in groups.items()})


def _ways(result: dict[str, Any]) -> list[Way]:
    return [Way(**{**way, "run": lambda: None}) for way in result["ways"]]


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def page(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown page."""
    lines = [
        "# Speed", "",
        "Made by `python -m benchmarks.speed`: random weights, one process, the ways take turns, so that whatever else",
        "the machine does meets all of them. Memory is the most that a run allocates beside the weights. All figures",
        "are in `speed.json`. What they mean: [performance](performance.md#measured).", "",
        "What CFG + PAG holds beyond Diffusers' PAG pipeline (0.2% on SD1.5, 0.9% on SDXL, 4% on SD3, of long text)",
        "are the pipeline's own two rows of latents and text, which it keeps while the joined three are computed. They",
        "could go only if its tensors were exchanged under it; `guidance_max_rows` takes far less than either.", "",
        "![Ratios of time](images/speed.png)", "",
    ]  # fmt: skip
    for name, result in results.items():
        ways = _ways(result)
        about, unit = result["about"], ways[0]
        lines += [
            f"## {name}", "",
            f"{about['side']} x {about['side']} pixels, {_count(about['steps'], 'step')}, {about['dtype']}, "
            f"{about['machine']}, torch {about['torch']}, Diffusers {about['diffusers']}; "
            f"{_count(len(unit.seconds), 'turn')}{about['note']}. "
            f"Guidable with nothing attached: {about['overhead'] * 1e6:.1f} microseconds a run before the stock call.",
            "",
            "| way | FLOPs, the first = 1 | seconds (median) | peak memory, MB |", "| --- | --- | --- | --- |",
        ]  # fmt: skip
        for way in ways:
            seconds, flops = statistics.median(way.seconds), way.flops / unit.flops
            lines.append(f"| {way.name} | {flops:.3f} | {seconds:.2f} | {way.peak / 1e6:.1f} |")
        lines += ["", "| time of | divided by that of | median of turns (least to most) | FLOPs |"]
        lines.append("| --- | --- | --- | --- |")
        for this, that in compared(ways):
            found = ratio(ways, this, that)
            spread = f"{statistics.median(found.turns):.3f} ({min(found.turns):.3f} to {max(found.turns):.3f})"
            lines.append(f"| {this} | {that} | {spread} | {found.flops:.3f} |")
        lines.append("")
    return "\n".join(lines)
