"""`trimtab evaluate`: of a folder, or of images that are made for it, in one process or several."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pipelines.generate import jobs
from ..pipelines.generate.batch import expand, make_batch
from ..pipelines.generate.jobs import Job
from ..pipelines.generate.prompts import read_prompts
from ..pipelines.generate.samples import load_pipeline
from ..pipelines.interpolate import make
from . import beforehand
from .evaluate import Evaluation
from .features import EvaluationError
from .folders import of_files, read_folder
from .processes import shared

MAKING = ("guidance", "recipe", "classes", "seeds", "prompts", "class_balanced", "branch_parallel", "frames")
"""Options that say what to make."""


def evaluate(args: Namespace, names: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """What `trimtab evaluate` will do, with everything refused that can be refused before it does.

    Args:
        args: parsed.
        names: see `trimtab.pipelines.generate.jobs.read`.
    """
    evaluation = evaluation_of(args)
    if args.images is not None:
        given = [name for name in (*MAKING, *names) if getattr(args, name.replace("-", "_")) is not None]
        if given:
            option = {"classes": "class"}.get(given[0], given[0]).replace("_", "-")
            raise EvaluationError(f"--{option}: it says what to make; leave out this, or {args.images}.")
        pictures = read_folder(args.images)
        return lambda: evaluation(pictures)
    job = jobs.read(args, names)
    if args.frames is not None:
        for name in ("class_balanced", "branch_parallel"):
            if getattr(args, name) is not None:
                raise EvaluationError(
                    f"--{name.replace('_', '-')}: strips are not made so; leave out this, or --frames."
                )
        return lambda: evaluate_strips(job, evaluation, args.output, args.prompts, args.frames)
    sharing = args.branch_parallel or 1
    return lambda: evaluate_made(job, evaluation, args.output, args.prompts, args.class_balanced, sharing)


def evaluation_of(args: Namespace) -> Evaluation:
    """What the options of a command say about measuring.

    Raises:
        EvaluationError: features that nothing would be compared by, or see `Evaluation`.
    """
    options = ("reference", "features", "pairs", "clip", "lpips", "repetitions")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    if "features" in given and not given.keys() & {"reference", "pairs"}:
        raise EvaluationError(
            f"--features: {args.features} compares images with those of --reference or --pairs; give one of these, or "
            "leave it out."
        )
    return Evaluation(**given)


def evaluate_made(
    job: Job, evaluation: Evaluation, folder: Path, prompts: Path | None, count: int | None, sharing: int = 1
) -> dict[str, Any]:
    """Make a batch and measure it; what is there is not made again.

    Args:
        job: the settings of all images.
        evaluation: what they are measured by.
        folder: for the images.
        prompts, count, sharing: see `trimtab.pipelines.generate.batch.run_batch`.

    Returns:
        As `evaluation` does; `about` says the recipe, and the evaluations of the denoiser that an image took.

    Raises:
        RequestError: images failed.
        EvaluationError: see `Evaluation`.
    """
    pipe = load_pipeline(job.requests[0])
    beforehand.check(evaluation, expand(job, prompts, count, pipe), folder)
    if evaluation.likeness is not None and not evaluation.likeness.one:
        _, _, named, _ = jobs.prepare(jobs.pinned(job), lambda pipe: expand(job, prompts, count, pipe), pipe)
        evaluation.likeness.check_names([f"{request.file_stem()}.png" for request in named])
    made = make_batch(job, folder, prompts, count, pipe, sharing)
    made.check()
    result = evaluation(of_files(folder, made.files))
    about = {
        "recipe": made.requests[0].guidance,
        "evaluations": jobs.plan_of(pipe, made.requests[0]).evaluations,
    }
    return {**result, "about": {**result["about"], **about}}


def evaluate_strips(
    job: Job, evaluation: Evaluation, folder: Path, prompts: Path | None, frames: int
) -> dict[str, Any]:
    """Make strips, for each prompt one between the first two seeds, one between the next two, and so on; measure them.

    What is there is not made again.

    Args:
        job, evaluation, folder, prompts: see `evaluate_made`.
        frames: images of a strip, both ends included; 3 or more, for two have only one step.

    Returns:
        As `evaluation` does, with `about` the frames.

    Raises:
        EvaluationError: a seed without another, or see `Evaluation`.
    """
    if len(job.seeds) < 2 or len(job.seeds) % 2:
        raise EvaluationError(
            "--frames: an interpolation goes from one seed to another; give an even number of seeds, --seeds 0-9 for "
            "five strips."
        )
    job, pipe = jobs.pinned(job), load_pipeline(job.requests[0])
    requests = job.requests if prompts is None else read_prompts(prompts, job.requests[0], pipe, job.rows)
    pairs = zip(job.seeds[::2], job.seeds[1::2], strict=True)
    ways = [dataclasses.replace(job, requests=[one], seeds=pair) for pair in pairs for one in requests]
    evaluation.check(len(ways), folder)
    files = shared(lambda index: make(ways[index], folder, frames, pipe=pipe, anew=False)[0], len(ways), "strips")
    result = evaluation(of_files(folder, files))
    return {**result, "about": {**result["about"], "frames": frames}}


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    about = result["about"]
    lines = [f"{about['images']}: {about['count']} images"]
    if "evaluations" in about:
        lines[0] += f", {about['evaluations']} evaluations each"
    if "reference" in about:
        lines.append(f"against {about['reference']}: {about['reference_count']} images")
    if "features" in about:
        lines.append(f"features of {about['features']}")
    for name, one in result["measures"].items():
        interval = f"   ({one['low']:.4f} to {one['high']:.4f})" if "low" in one else ""
        lines.append(f"  {name:<17} {one['value']:10.4f}{interval}")
    return "\n".join(lines)
