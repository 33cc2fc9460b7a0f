"""`trimtab sweep`: every cell of a grid over guidance parameters, made, measured, and set against its cost.

A cell is a folder like any other that `trimtab generate` writes, with `evaluation.json` beside its manifest. A sweep
that was stopped at any moment continues: what is made is not made again, and what was measured not measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..guidance import recipe
from ..guidance.base import Guidance
from ..guidance.errors import ParameterError, RecipeError
from ..guidance.files import replacing
from ..pipelines.generate import batch, jobs, options, pictures
from ..pipelines.generate.comparison import describe
from ..pipelines.generate.jobs import Job
from ..pipelines.generate.samples import load_pipeline
from ..pipelines.launch import first
from . import beforehand
from .command import evaluation_of
from .evaluate import HIGHER, MEASURES, Evaluation
from .features import EvaluationError
from .folders import of_files
from .sweep_plot import draw

RESULT, CELL = "sweep.json", "evaluation.json"
COLUMNS = 10
"""Most images of a cell that the sheet shows."""


@dataclass(frozen=True)
class Cell:
    """One set of guidances.

    Args:
        label: what is varied, in words.
        guidances: all of them, those that every cell has included.
    """

    label: str
    guidances: Mapping[str, Guidance]

    @property
    def folder(self) -> str:
        """A folder name for these guidances alone."""
        record = json.dumps(recipe.dump(self.guidances, {}), sort_keys=True)
        words = re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")[:60]
        return f"{words}-{hashlib.sha256(record.encode()).hexdigest()[:8]}"


def cells(texts: Sequence[str], common: Mapping[str, Guidance]) -> list[Cell]:
    """The cell without what is varied, then every combination, each once.

    Args:
        texts: of `--guidance`, see `options.variations`.
        common: guidances that every cell has.

    Raises:
        ParameterError: a value that is not allowed, or nothing to vary.
        RecipeError: a guidance that is common and varied.
    """
    varied: dict[str, list[Guidance]] = {}
    for text in texts:
        found = options.variations(text)
        name = found[0].label
        if name in common:
            raise RecipeError(f"--guidance: {name} is in the recipe already; give it in one place.")
        if name in varied:
            raise ParameterError(f"--guidance: {name} is given twice; give each guidance once.")
        varied[name] = found
    if not varied:
        raise ParameterError("trimtab sweep: nothing to vary; add a grid, such as --guidance pag:scale=1,2,3.")
    grid = [Cell("recipe alone" if common else "no guidance", common)]
    for chosen in itertools.product(*varied.values()):
        label = ", ".join(describe(one.label, one) for one in chosen)
        grid.append(Cell(label, {**common, **{one.label: one for one in chosen}}))
    return list({cell.folder: cell for cell in grid}.values())  # 2 and 2.0 are one value


def sweep(args: Namespace, names: Sequence[str]) -> Callable[[], Iterator[Path]]:
    """What `trimtab sweep` will do, with everything refused that can be refused before it does.

    Args:
        args: parsed.
        names: see `trimtab.pipelines.generate.jobs.read`.
    """
    texts, args.guidance = args.guidance or (), None
    job = jobs.read(args, names)
    grid = cells(texts, job.guidances or {})
    if args.pairs is not None and args.pairs.is_dir():
        raise EvaluationError(
            f"--pairs: {args.pairs} is a folder, but the images of each cell have names of their own; allowed: one "
            "image, that all should be like."
        )
    evaluation = evaluation_of(args)
    if args.quality is not None:
        evaluation.check_takes(args.quality, "--quality")
    made_of = args.prompts, args.class_balanced, args.branch_parallel or 1
    return lambda: run(job, grid, evaluation, args.output, *made_of, args.quality)


def run(
    job: Job,
    grid: Sequence[Cell],
    evaluation: Evaluation,
    folder: Path,
    prompts: Path | None,
    count: int | None,
    sharing: int = 1,
    quality: str | None = None,
) -> Iterator[Path]:
    """Make and measure all cells; the first process then writes and yields the results, the plot and the sheet.

    Args:
        job: the settings of all images; its guidances are replaced.
        grid: the cells.
        evaluation: what they are measured by.
        folder: for a folder a cell, and the results.
        prompts, count, sharing: see `trimtab.pipelines.generate.batch.run_batch`.
        quality: the measure that is drawn; by default the first that was taken.

    Raises:
        RequestError: images failed; the cells before are kept.
        EvaluationError: see `Evaluation`, or a quality that was not measured.
    """
    pipe = load_pipeline(job.requests[0])
    beforehand.check(evaluation, batch.expand(job, prompts, count, pipe), folder, quality)
    found, rows = [], []
    for cell in tqdm(grid, desc="cells", disable=not first()):
        place = folder / cell.folder
        job = dataclasses.replace(job, guidances=dict(cell.guidances))
        made = batch.make_batch(job, place, prompts, count, pipe, sharing)
        made.check()
        plan = jobs.plan_of(pipe, made.requests[0])
        result = measured_cell(evaluation, place, made.files)
        if quality is not None and quality not in result["measures"]:
            measured = ", ".join(result["measures"])
            raise EvaluationError(f"--quality: {quality} was not measured here; measured: {measured}.")
        found.append({"label": cell.label, "folder": cell.folder, "recipe": made.requests[0].guidance} | {
            "evaluations": plan.evaluations, "backward_passes": plan.backward_passes, **result,
        })  # fmt: skip
        shown = [pictures.load(path)[0] for path in made.files[:COLUMNS]]
        rows.append(pictures.Row(f"{cell.label}: {plan.evaluations} evaluations", shown))
    if not first():
        return
    quality = quality or next(name for name in MEASURES if name in found[0]["measures"])
    front = pareto([(one["evaluations"], one["measures"][quality]["value"]) for one in found], MEASURES[quality])
    for one, on_front in zip(found, front, strict=True):
        one["pareto"] = on_front
    with replacing(folder / RESULT) as file:
        about = {"quality": quality, "direction": MEASURES[quality], "images": len(made.requests)}
        file.write((json.dumps({"about": about, "cells": found}, indent=2, ensure_ascii=False) + "\n").encode())
    yield folder / RESULT
    yield pictures.save(draw(found, quality, MEASURES[quality]), folder / "sweep.png", {"quality": quality})
    columns = [str(request.class_label or f"seed {request.seed}") for request in made.requests[:COLUMNS]]
    sheet = pictures.sheet(f"{len(grid)} cells, the same seeds in each", columns, rows)
    yield pictures.save(sheet, folder / "sheet.png", {"rows": [row.label for row in rows]})


def pareto(points: Sequence[tuple[float, float]], direction: str) -> list[bool]:
    """Which of these `(cost, quality)` no other one beats: none is as good for less, or better for no more.

    Args:
        points: one a cell.
        direction: `HIGHER` or `LOWER`, of the quality.
    """
    signed = [(cost, -value if direction == HIGHER else value) for cost, value in points]
    return [not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in signed) for one in signed]


def measured_cell(evaluation: Evaluation, folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The measures of a cell, taken now, or before from images of the same content in the same way."""
    done, images = folder / CELL, of_files(folder, files)
    asked = {**evaluation.about, "fingerprints": {"images": images.fingerprint, **evaluation.fingerprints}}
    known = _read(done)
    if known.get("asked") == asked and "measures" in known:
        return {"measures": known["measures"]}
    measures = evaluation(images)["measures"]
    if first():
        with replacing(done) as file:
            file.write(json.dumps({"asked": asked, "measures": measures}, indent=2).encode())
    return {"measures": measures}


def _read(file: Path) -> dict[str, Any]:
    """What the file of a cell says; nothing where it is missing or damaged, for then it can be made again."""
    try:
        known = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
