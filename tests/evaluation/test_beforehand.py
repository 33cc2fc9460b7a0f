"""Which measures will be taken of images is known from what is asked for, before there are images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trimtab.evaluation.beforehand import check, measures_of
from trimtab.evaluation.evaluate import Evaluation
from trimtab.evaluation.features import EvaluationError
from trimtab.pipelines.generate.request import Request

GARMENTS = [Request(class_label="Bag"), Request(class_label="8"), Request(class_label="ankle boot")]
PROMPTS = [Request(prompt="a red fox"), Request(prompt="a blue boat")]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    for index in range(8):
        Image.effect_noise((16, 16), 20.0 + index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_options_and_classes_tell_what_is_measured(real: Path, clip: Path) -> None:
    assert measures_of(Evaluation(), GARMENTS) == ["accuracy", "confidence"]
    assert measures_of(Evaluation(), PROMPTS) == measures_of(Evaluation(), [*GARMENTS, *PROMPTS]) == []
    assert measures_of(Evaluation(), [Request(class_label="cat")]) == []
    assert measures_of(Evaluation(clip=str(clip)), PROMPTS) == ["clip_score"]
    assert measures_of(Evaluation(pairs=real), PROMPTS) == ["psnr", "ssim", "feature_distance"]
    assert measures_of(Evaluation(real), PROMPTS) == [
        "kernel_distance", "frechet_distance", "precision", "recall", "density", "coverage",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("requests", "quality", "message"),
    [
        (PROMPTS, None, "nothing to measure: give --reference FOLDER"),
        (GARMENTS, "istd", "--quality: istd cannot be taken of these images; what will be measured: accuracy, conf"),
        (GARMENTS, "psnr", "--quality: psnr cannot be taken of these images"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    requests: list[Request], quality: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=message):
        check(Evaluation(), requests, tmp_path, quality)


def test_images_of_classes_are_like_no_prompt(clip: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(clip=str(clip))
    check(evaluation, PROMPTS, tmp_path, "clip_score")
    with pytest.raises(EvaluationError, match="--clip: images of classes have no prompt; leave it out"):
        check(evaluation, GARMENTS, tmp_path)


def test_too_few_images_to_be_compared_as_a_set_are_refused(real: Path) -> None:
    with pytest.raises(EvaluationError, match=r"the 3 images of out are too few"):
        check(Evaluation(real), GARMENTS, Path("out"))
