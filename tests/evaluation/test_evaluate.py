"""`trimtab evaluate`: the numbers of maintained libraries, from folders of images, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from trimtab import cli
from trimtab.evaluation.distances import Gaussian, KernelDistance, bootstrap, frechet_distance
from trimtab.evaluation.evaluate import evaluate, read_folder
from trimtab.evaluation.features import EvaluationError, feature_network
from trimtab.pipelines.embedded.data import CLASS_NAMES
from trimtab.pipelines.generate import pictures


def write(folder: Path, count: int, seed: int, level: float = 128, settings: dict[str, Any] | None = None) -> Path:
    """Grey noise around a level."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.normal(level, 30, (32, 32)).clip(0, 255).astype(np.uint8)
        label = {"class_label": CLASS_NAMES[i % 10]} if settings is None else settings
        pictures.save(Image.fromarray(pixels), folder / f"{i:03}.png", label)
    return folder


class Pixels(nn.Module):
    """Features for the library: a few pixels of each image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, :2, :3].flatten(1).double()


def test_distances_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randint(0, 256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    real = torch.randint(60, 200, (80, 3, 32, 32), generator=generator, dtype=torch.uint8)
    fid = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=60)
    for metric, images in ((fid, real), (kid, real[:60])):
        metric.update(images, real=True)
        metric.update(ours, real=False)
    here, there = Pixels()(ours), Pixels()(real)
    assert frechet_distance(Gaussian(here), Gaussian(there)) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert KernelDistance(there[:60])(here) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_a_resampled_kernel_distance_is_the_plain_one_where_each_image_is_drawn_once() -> None:
    here, there = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (30, 40))
    kernel = KernelDistance(there)
    assert kernel.resampled(here)(torch.randperm(30)) == pytest.approx(kernel(here))
    twice = kernel.resampled(here)(torch.arange(15).repeat(2))
    assert twice == pytest.approx(KernelDistance(there)(here[:15]), abs=0.2)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = bootstrap(lambda rows: values[rows].mean().item(), 400, repetitions=1000)
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - half, abs=0.2 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.2 * half)
    assert bootstrap(lambda rows: values[rows].mean().item(), 400, repetitions=1000) == found


def test_a_folder_is_measured_and_nobody_can_take_it_for_fid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, reference = write(tmp_path / "images", 20, seed=0), write(tmp_path / "reference", 30, seed=1)
    shifted = write(tmp_path / "shifted", 20, seed=2, level=220)
    options = ["--reference", str(reference), "--repetitions", "20", "--json"]
    found = {}
    for folder in (images, shifted):
        assert cli.main(["evaluate", str(folder), *options]) == 0
        found[folder.name] = json.loads(capsys.readouterr().out)
    near, far = (found[name]["measures"] for name in ("images", "shifted"))
    assert found["images"]["about"]["features"] == "trimtab's judge of garments (not FID)"
    assert near["frechet_distance"]["value"] < far["frechet_distance"]["value"]
    assert near["kernel_distance"]["value"] < far["kernel_distance"]["value"]
    assert near["coverage"]["value"] > far["coverage"]["value"]
    assert {"accuracy", "confidence", "precision", "recall", "density"} <= near.keys()
    assert all(one["low"] <= one["high"] for one in near.values())
    assert cli.main(["evaluate", str(images), *options[:-1]]) == 0
    assert "not FID" in capsys.readouterr().out


def test_pairs_are_compared_by_file_name(tmp_path: Path) -> None:
    images, same = write(tmp_path / "images", 12, seed=0), write(tmp_path / "same", 12, seed=0)
    other = write(tmp_path / "other", 12, seed=5)
    equal = evaluate(read_folder(images), pairs=read_folder(same), repetitions=5)["measures"]
    differing = evaluate(read_folder(images), pairs=read_folder(other), repetitions=5)["measures"]
    assert equal["ssim"]["value"] == pytest.approx(1.0) and differing["ssim"]["value"] < 0.5
    error = (read_folder(images).images.double() - read_folder(other).images.double()).square().mean(dim=(1, 2, 3))
    assert differing["psnr"]["value"] == pytest.approx(
        float((20 * np.log10(255) - 10 * error.log10()).mean()), abs=1e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure: give --reference FOLDER"),
        (["--reference", "absent"], "absent holds no images"),
        (["--reference", "{images}", "--features", "{images}"], "neither judge, efficientnet-lite0 or inception"),
        (["--clip", "nowhere"], "images that do not say their prompt"),
    ],
)
def test_what_cannot_be_measured_says_what_to_give(
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = write(tmp_path / "images", 8, seed=0, settings={"seed": 1})
    assert cli.main(["evaluate", str(images), *(option.format(images=images) for option in options)]) == 2
    assert message in capsys.readouterr().err


def test_the_judge_that_ships_knows_garments() -> None:
    network = feature_network("judge")
    assert network(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "zeros").shape == (3, 128)


def test_inception_without_its_library_says_what_to_install() -> None:
    with pytest.raises(EvaluationError, match="pip install torchmetrics torch-fidelity"):
        feature_network("inception")
