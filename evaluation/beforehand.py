"""What can be measured of images that are still to be made, so that what cannot is refused before they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..pipelines.generate.request import Request
from .each import garment
from .evaluate import MEASURES, NOTHING, OPTIONS, Evaluation
from .features import EvaluationError


def measures_of(evaluation: Evaluation, requests: Sequence[Request]) -> list[str]:
    """The measures that will be taken of the images of these requests, in the order of `MEASURES`."""
    taken = {name for name, option in OPTIONS.items() if option in evaluation.about}
    if all(garment(request.class_label) is not None for request in requests):
        taken |= {"accuracy", "confidence"}
    return [name for name in MEASURES if name in taken]


def check(evaluation: Evaluation, requests: Sequence[Request], folder: Path, quality: str | None = None) -> None:
    """Whether the images of these requests can be measured.

    Args:
        evaluation: what they will be measured by.
        requests: one an image.
        folder: for the images.
        quality: a measure that is needed.

    Raises:
        EvaluationError: nothing would be measured, or not this quality; images without a prompt, whose likeness to it
            was asked for; or see `Evaluation.check`.
    """
    taken = measures_of(evaluation, requests)
    if not taken:
        raise EvaluationError(NOTHING)
    if quality is not None and quality not in taken:
        raise EvaluationError(
            f"--quality: {quality} cannot be taken of these images; what will be measured: {', '.join(taken)}."
        )
    if "clip_score" in taken and not all(request.prompt for request in requests):
        raise EvaluationError(
            "--clip: images of classes have no prompt; leave it out, or give prompts: --prompts FILE."
        )
    evaluation.check(len(requests), folder)
