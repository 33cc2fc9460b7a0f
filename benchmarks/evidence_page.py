"""The measurements of all plug-ins as a page of Markdown: a table a model, and the rows that other benchmarks took."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from trimtab.evaluation.distances import Interval
from trimtab.evaluation.evaluate import MEASURES

from .evidence_taken import DOCS, controls, gradients
from .evidence_words import cell, verdict
from .rows import Row

SHOWN = ("kernel_distance", "clip_score", "accuracy")
"""Measures that have lines, where they were taken; the others stand in the JSON."""
OF_SETS = ("kernel_distance", "frechet_distance")
"""Those that have lines where no measure says whether an image is what was asked for."""
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
    },
    "trimtab/emoji-flux": {
        "dynamic_threshold": "as on `trimtab/emoji-sd`: its bound of 1 is the range of pixels, and these are latents.",
        "perp_neg": "the plain negative prompt does no harm here: it leaves the images as near to the drawings (the "
        "kernel distance of `cfg:scale=3` without it is 0.304). Perp-Neg leaves more of the contrast, and no distance "
        "can tell which is better.",
        "guider": "what scale 7.5 hardens it softens again: neighbouring pixels differ by 0.029 and not by 0.035 (in "
        "the drawings by 0.030), and specks go. With 270 images no distance can tell.",
        "interval": "images change by 0.028 of their range on average, to neither side that can be told, for a quarter "
        "of the evaluations less.",
        "rescale": "images change by 0.020 of their range on average: their contrast falls (a standard deviation of "
        "0.289, with `cfg:scale=5` alone 0.294, without guidance 0.267), which is no fault of theirs yet.",
        "pag": "images change by 0.033 of their range on average (with `cfg:scale=3` by 0.062), outlines get a little "
        "firmer; what has no shape gets none. With 270 images no distance can tell.",
        "seg": "away from the blurred attention of one block, the second of four single ones, colours and parts become "
        "clear where they were washed out; `pag` in the same block does so less.",
    },
    "trimtab/emoji-sd": {
        "dynamic_threshold": "nothing is left of the pictures: its bound of 1 is the range of pixels, and these are "
        "latents, which reach further where nothing is wrong. On latents it needs a bound of their own, as its page "
        "says.",
        "guider": "images change by 0.046 of their range on average, to neither side that can be told.",
        "rescale": "it does what it is for, the images' contrast falls (a standard deviation of 0.293, with "
        "`cfg:scale=5` alone 0.302, without guidance 0.266), but scale 5 does not hurt this model yet.",
        "cfg": "clearer colours and outlines. What the model has no word for, such as a cactus or a herb, it draws as "
        "something else under any guidance.",
        "pag": "faces get clearer eyes and mouths and rounder outlines, while hearts, food and animals, which were "
        "smooth, get a mottled skin. The Fréchet distance counts that as worse, the kernel distance cannot tell.",
        "perp_neg": "`face` is a word of many captions, and to the model it means yellow: away from it most images "
        "turn blue, on both sides, far from the drawings (the kernel distance of `cfg:scale=3` without a negative "
        "prompt is 0.32). Perp-Neg leaves more of what a prompt says: the mean colour is 0.67, 0.71, 0.75 of white in "
        "red, green and blue, with the plain negative prompt 0.64, 0.73, 0.81, without it 0.85, 0.78, 0.71, and faces "
        "keep eyes. It makes a bad negative prompt less harmful, not the images good.",
        "sag": "images change little, by 0.019 of their range on average: outlines a little smoother, faces the same.",
        "seg": "the attention that is blurred by default, in the middle, decides little in this model: images change "
        "by 0.001 of their range on average, with `cfg:scale=3` by 0.072.",
        "slg": "the block that is left out by default, the middle one, does little in this model: images change by "
        "0.003 of their range on average, with `cfg:scale=3` by 0.072.",
    },
}
"""Why a row is as it is, by model: found out from runs, and to be found out again where a row is measured anew."""
WEAKER = (
    "is not measured: it needs a weaker model that reads the same text encoder, and none of this model's earlier "
    "checkpoints was kept."
)
ABSENT: Mapping[str, Mapping[str, str]] = {
    "trimtab/emoji-flux": {"autoguidance": WEAKER},
    "trimtab/emoji-sd": {"autoguidance": WEAKER},
}
"""Why there is no row, by model."""
HEAD = """# Evidence

What each built-in plug-in does to a model: measures before and after, and their difference, with 95% intervals by the
bootstrap over images (fixed draws), those of Fréchet distances by the jackknife. Both sides have the same seeds and
classes, so the difference is drawn in pairs, and its interval is the narrower one; *better* and *worse* are said
where it leaves out 0. Settings were not tuned to this table. Time is core seconds with the guidance over core seconds
without, on one thread, in turns side by side: median, least and most. `make evidence` measures what is missing here and
on the pages from which rows are taken over; these name their commands as well.
"""


def page(folder: Path, plugins: Collection[str], taken: Path = DOCS) -> str:
    """The page for the files of a folder, one a model.

    Args:
        plugins: of which there should be a row for each model.
        taken: folder with what the other benchmarks measured.
    """
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    sections = [section(one["settings"], one["rows"], plugins) for one in found]
    return "\n".join([HEAD, *sections, gradients(docs=taken), controls(docs=taken)])


def section(settings: Mapping[str, Any], rows: Mapping[str, Row], plugins: Collection[str]) -> str:
    """The part of one model."""
    findings = FINDINGS.get(settings["model"], {})
    done = {name: rows[name] for name in sorted(rows) if "refused" not in rows[name]}
    known = ABSENT.get(settings["model"], {})
    refused = {name: rows[name] for name in sorted(rows) if "refused" in rows[name] and name not in known}
    lines = [f"## {settings['model']}\n", f"{_settings(settings)}\n", *table(done), ""]
    lines += [f"* `{name}`: {findings[name]}" for name in done if name in findings]
    lines += [f"* `{name}` cannot act on this model: {row['refused']}" for name, row in refused.items()]
    absent = {**dict.fromkeys(set(plugins) - set(rows), "is not measured yet."), **known}
    lines += [f"* `{name}` {why}" for name, why in sorted(absent.items()) if name not in done]
    lines += ["", "| plug-in | measured again by |", "| --- | --- |"]
    lines += [f"| `{name}` | `{row['command']}` |" for name, row in done.items()]
    return "\n".join([*lines, ""])


def _settings(settings: Mapping[str, Any]) -> str:
    """What all rows of a model have in common, in words."""
    said = [f"{settings['count']} images a side"]
    emoji = settings.get("emoji")
    if emoji is not None:
        said.append(f"captions of the held-out drawings of `{emoji}` in turn ({settings['categories']})")
    else:
        said.append(f"prompts of `{settings['prompts']}`" if settings["prompts"] else "classes in turn")
    said.append(f"{settings['steps']} steps{' in bfloat16' if settings['autocast'] else ''}")
    if settings["guidance_scale"] is not None:
        said.append(f"the pipeline's own guidance scale {settings['guidance_scale']:g}")
    against = f"`{settings['reference']}`" if settings["reference"] else f"{settings['references']} real test images"
    against = against if emoji is None else "these drawings"
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
        found = [name for name in SHOWN if name in row["change"]]
        for name in found if found[1:] else (name for name in OF_SETS if name in row["change"]):
            values = [cell(Interval(**side[name])) for side in (before["measures"], after["measures"], row["change"])]
            values[-1] += f", {verdict(row['change'][name], MEASURES[name])}"
            lines.append(
                f"| {' | '.join((*first, name.replace('_', ' ').replace('frechet', 'Fréchet'), *values, *cost))} |"
            )
            first, cost = ("", ""), ("", "")
    return lines
