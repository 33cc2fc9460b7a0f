"""`trimtab evaluate`: of a folder, or of images that are made for it, in one process or several."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..pipelines.generate import jobs
from ..pipelines.generate.batch import make_batch, read_prompts
from ..pipelines.generate.jobs import Job
from ..pipelines.generate.samples import load_pipeline
from ..pipelines.interpolate import make
from .evaluate import Evaluation
from .features import EvaluationError
from .folders import of_files, read_folder
from .processes import shared

MAKING = ("guidance", "recipe", "classes", "seeds", "prompts", "class_balanced", "frames")
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
    return lambda: evaluate_made(job, evaluation, args.output, args.prompts, args.class_balanced, args.frames)


def evaluation_of(args: Namespace) -> Evaluation:
    """What the options of a command say about measuring."""
    options = ("reference", "features", "pairs", "clip", "lpips", "repetitions")
    return Evaluation(**{name: getattr(args, name) for name in options})


def evaluate_made(
    job: Job, evaluation: Evaluation, folder: Path, prompts: Path | None, count: int | None, frames: int | None = None
) -> dict[str, Any]:
    """Make a batch and measure it; what is there is not made again.

    Args:
        job: the settings of all images.
        evaluation: what they are measured by.
        folder: for the images.
        prompts, count: see `trimtab.pipelines.generate.batch.expand`.
        frames: make strips of so many images between two seeds each instead.

    Returns:
        As `evaluation` does; `about` says the recipe, and the evaluations of the denoiser that an image took.

    Raises:
        RequestError: images failed.
        EvaluationError: see `Evaluation`.
    """
    pipe = load_pipeline(job.requests[0])
    if frames is not None:
        result = evaluation(of_files(folder, _strips(job, folder, prompts, frames, pipe)))
        return {**result, "about": {**result["about"], "frames": frames}}
    made = make_batch(job, folder, prompts, count, pipe)
    made.check()
    result = evaluation(of_files(folder, made.files))
    about = {
        "recipe": made.requests[0].guidance,
        "evaluations": jobs.plan_of(pipe, made.requests[0]).evaluations,
    }
    return {**result, "about": {**result["about"], **about}}


def _strips(job: Job, folder: Path, prompts: Path | None, frames: int, pipe: Any) -> list[Path]:
    """For each prompt an interpolation between the first two seeds, one between the next two, and so on."""
    if len(job.seeds) < 2:
        raise EvaluationError("--frames: an interpolation goes from one seed to another; give --seeds 0-9 for five.")
    requests = job.requests if prompts is None else read_prompts(prompts, job.requests[0])
    pairs = zip(job.seeds[::2], job.seeds[1::2], strict=False)
    ways = [dataclasses.replace(job, requests=[one], seeds=pair) for pair in pairs for one in requests]
    return shared(lambda index: make(ways[index], folder, frames, pipe=pipe)[0], len(ways), "strips")
