"""`trimtab evaluate`: the numbers of maintained libraries, from folders of images, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from trimtab import cli
from trimtab.evaluation.coverage import Coverage
from trimtab.evaluation.distances import Gaussian, KernelDistance, bootstrap, frechet_distance, jackknife
from trimtab.evaluation.evaluate import OF_VARIETY, Evaluation
from trimtab.evaluation.features import EvaluationError, feature_network
from trimtab.evaluation.folders import read, read_folder
from trimtab.pipelines.fashion.data import CLASS_NAMES
from trimtab.pipelines.generate import pictures
from trimtab.pipelines.interpolate import Interpolation, istd


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


@pytest.mark.parametrize("name", OF_VARIETY)
def test_the_interval_of_a_measure_of_variety_holds_its_value_and_is_as_wide_as_samples_differ(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=generator) * 1.2 + 0.3

    def statistic_of_another_sample() -> Callable[[torch.Tensor], float]:
        sample = torch.randn(150, 4, generator=generator)
        if name != "frechet_distance":
            measure: Callable[[torch.Tensor], float] = getattr(Coverage(sample, real), name)
            return measure
        return lambda rows: frechet_distance(Gaussian(sample[rows]), Gaussian(real))

    samples = [statistic_of_another_sample() for _ in range(60)]
    found = [jackknife(statistic, 150).interval for statistic in samples]
    assert all(one.low < one.value < one.high for one in found)
    deviation = float(torch.tensor([one.value for one in found]).std())
    assert sum(one.high - one.low for one in found) / len(found) == pytest.approx(2 * 1.96 * deviation, rel=0.4)


def test_no_interval_leaves_what_its_measure_can_be(tmp_path: Path) -> None:
    images = read_folder(write(tmp_path / "images", 8, seed=0))
    others = read_folder(write(tmp_path / "others", 8, seed=3, level=160))
    evaluation = Evaluation(write(tmp_path / "reference", 8, seed=1), repetitions=20)
    found = [evaluation(images)["measures"], evaluation(others)["measures"]]
    for name in ("precision", "recall", "coverage", "accuracy", "confidence"):
        assert all(0 <= one[name]["low"] <= one[name]["value"] <= one[name]["high"] <= 1 for one in found), name
    assert all(one["frechet_distance"]["low"] >= 0 for one in found)
    assert all(evaluation.difference(images, others)[name]["low"] >= -1 for name in ("recall", "coverage"))
    equal = Evaluation(pairs=images.folder, repetitions=20)(images)["measures"]
    assert equal["feature_distance"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-6)
    assert all(end >= 0 for end in equal["feature_distance"].values()) and equal["ssim"]["high"] <= 1


def test_of_a_single_image_there_is_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write(tmp_path / "one", 1, seed=0)
    measures = Evaluation(pairs=write(tmp_path / "other", 1, seed=1))(read_folder(image))["measures"]
    assert {"accuracy", "psnr", "ssim"} <= measures.keys() and all(one.keys() == {"value"} for one in measures.values())
    assert cli.main(["evaluate", str(image), "--pairs", str(tmp_path / "other")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["feature_distance", f"{measures['feature_distance']['value']:.4f}"]


def test_a_folder_is_measured_and_nobody_can_take_it_for_fid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, reference = write(tmp_path / "images", 20, seed=0), write(tmp_path / "reference", 30, seed=1)
    shifted = write(tmp_path / "shifted", 20, seed=2, level=220)
    options = ["--reference", str(reference), "--repetitions", "40", "--json"]
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
    assert all(one["low"] <= one["value"] <= one["high"] for one in near.values())
    assert cli.main(["evaluate", str(images), *options[:-1]]) == 0
    assert "not FID" in capsys.readouterr().out


def test_pairs_are_compared_by_file_name(tmp_path: Path) -> None:
    images, same = write(tmp_path / "images", 12, seed=0), write(tmp_path / "same", 12, seed=0)
    other = write(tmp_path / "other", 12, seed=5)
    equal = Evaluation(pairs=same, repetitions=5)(read_folder(images))["measures"]
    differing = Evaluation(pairs=other, repetitions=5)(read_folder(images))["measures"]
    assert equal["ssim"]["value"] == pytest.approx(1.0) and differing["ssim"]["value"] < 0.5
    ours, theirs = (read(read_folder(folder).files).images for folder in (images, other))
    error = (ours.double() - theirs.double()).square().mean(dim=(1, 2, 3))
    assert differing["psnr"]["value"] == pytest.approx(
        float((20 * np.log10(255) - 10 * error.log10()).mean()), abs=1e-3
    )
    features = feature_network("judge")
    cosine = torch.cosine_similarity(features(ours), features(theirs))
    assert differing["feature_distance"]["value"] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
    assert equal["feature_distance"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_all_images_are_compared_with_one(tmp_path: Path) -> None:
    images = write(tmp_path / "images", 3, seed=0)
    files = read_folder(images).files
    many = write(tmp_path / "many", 3, seed=0)
    for path in many.iterdir():
        path.write_bytes(files[1].read_bytes())
    one, by_name = (Evaluation(pairs=pairs, repetitions=5)(read_folder(images)) for pairs in (files[1], many))
    assert one["measures"] == by_name["measures"]
    assert one["measures"]["psnr"]["high"] < 100.0  # which the equal one has


def test_a_difference_is_drawn_in_pairs(tmp_path: Path) -> None:
    images, lighter = (read_folder(write(tmp_path / str(level), 20, 0, level)) for level in (128, 140))
    reference = write(tmp_path / "reference", 20, 1, level=150)
    evaluation = Evaluation(reference, repetitions=40)
    near, far = evaluation(lighter)["measures"], evaluation(images)["measures"]
    found = evaluation.difference(lighter, images)
    assert found.keys() == near.keys()
    for name, one in found.items():
        assert one["value"] == pytest.approx(near[name]["value"] - far[name]["value"])
    widths = [one["frechet_distance"]["high"] - one["frechet_distance"]["low"] for one in (found, near, far)]
    assert widths[0] < min(widths[1:])
    assert all(one["low"] == one["high"] == 0 for one in evaluation.difference(images, images).values())
    with pytest.raises(EvaluationError, match=r"5 images, .* 20"):
        evaluation.difference(read_folder(write(tmp_path / "few", 5, 0)), images)


# -- LPIPS -------------------------------------------------------------------------------------------------------------
def test_lpips_without_torchvision_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(write(tmp_path, 3, seed=0))
    assert cli.main(["evaluate", images, "--pairs", images, "--lpips", "alex"]) == 2
    assert "pip install torchvision" in capsys.readouterr().err
    assert cli.main(["evaluate", images, "--lpips", "alex"]) == 2
    assert "--lpips: it compares images with those of --pairs" in capsys.readouterr().err


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet as torchvision numbers them, with random weights."""
    torch.manual_seed(0)
    sizes = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
    layers: list[nn.Module] = []
    for index, (inputs, outputs, side, stride, padding) in enumerate(sizes):
        layers += [nn.Conv2d(inputs, outputs, side, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if index in (0, 1, 4) else []
    return nn.Sequential(*layers)


def test_lpips_is_that_of_torchmetrics_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision, whose part is the backbone's weights, is not here: random ones take their place."""
    from torchmetrics.functional.image import lpips
    from torchmetrics.image import lpip

    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained=False: alexnet_features())
    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)
    images, pairs = (read_folder(write(tmp_path / str(seed), 4, seed)) for seed in (0, 1))
    found = Evaluation(pairs=pairs.folder, lpips="alex", repetitions=5)(images)["measures"]["lpips"]["value"]
    ours, theirs = (read(one.files).images.float() / 127.5 - 1 for one in (images, pairs))
    expected = lpips.learned_perceptual_image_patch_similarity(ours, theirs, net_type="alex")
    assert found == pytest.approx(float(expected), rel=1e-4) and found > 0


def test_sets_have_one_image_more_than_the_neighbours_that_are_asked_for(tmp_path: Path) -> None:
    """For the intervals leave one out."""
    seven, six = (read_folder(write(tmp_path / str(count), count, seed=0)) for count in (7, 6))
    evaluation = Evaluation(reference=seven.folder, repetitions=5)
    assert evaluation(seven)["measures"]["recall"]["value"] == 1.0
    with pytest.raises(EvaluationError, match=r"the 6 images of .* are too few .* needed: more than 6"):
        evaluation(six)


# -- images and prompts ------------------------------------------------------------------------------------------------
def test_the_clip_score_is_the_cosine_of_each_image_and_its_prompt(clip: Path, tmp_path: Path) -> None:
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    prompts = ["a red fox", "a blue boat"]
    images = tmp_path / "images"
    for seed, prompt in enumerate(prompts):
        write(tmp_path / prompt, 1, seed, settings={"prompt": prompt})
        images.mkdir(exist_ok=True)
        (tmp_path / prompt / "000.png").rename(images / f"{seed}.png")
    found = Evaluation(clip=str(clip), repetitions=5)(read_folder(images))["measures"]["clip_score"]
    cosines = []
    for file, prompt in zip(read_folder(images).files, prompts, strict=True):
        inputs = processor(text=[prompt], images=[Image.open(file).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        cosines.append(max(0.0, float(torch.cosine_similarity(output.image_embeds, output.text_embeds))))
    assert found["value"] == pytest.approx(50 * sum(cosines), rel=1e-4)
    silent = read_folder(write(tmp_path / "silent", 2, seed=0))
    with pytest.raises(EvaluationError, match=r"000.png does not say its prompt \(2 of 2\)"):
        Evaluation(clip=str(clip))(silent)


# -- interpolations ----------------------------------------------------------------------------------------------------
def test_strips_are_measured_by_their_istd(tmp_path: Path) -> None:
    frames = [
        [
            Image.fromarray(np.random.default_rng(9 * s + i).integers(0, 255, (8, 8, 3), dtype=np.uint8))
            for i in range(4)
        ]
        for s in range(3)
    ]
    for index, strip in enumerate(frames):
        Interpolation(strip).save(tmp_path, f"strip-{index}")
    found = Evaluation(repetitions=5)(read_folder(tmp_path))["measures"]
    assert list(found) == ["istd"]
    assert found["istd"]["value"] == pytest.approx(np.mean([istd(strip) for strip in frames]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure: give --reference FOLDER"),
        (["--reference", "absent"], "There is no folder absent"),
        (["--reference", "{images}", "--features", "{images}"], "neither judge, efficientnet-lite0 or inception"),
        (["--clip", "{images}"], "is no folder or repository of a CLIP"),
        (["--features", "judge"], "--features: judge compares images with those of --reference or --pairs"),
        (["--recipe", "cfg.json"], "--recipe: it says what to make; leave out this, or"),
        (["--class", "Bag"], "--class: it says what to make"),
        (["--guidance-scale", "3"], "--guidance-scale: it says what to make"),
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


def test_draws_that_are_too_few_for_an_interval_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", str(tmp_path), "--repetitions", "39"])
    assert "--repetitions: 39 is not allowed; allowed: whole numbers from 40" in capsys.readouterr().err


def test_the_judge_that_ships_knows_garments() -> None:
    network = feature_network("judge")
    assert network(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 128)


def test_inception_without_its_library_says_what_to_install() -> None:
    with pytest.raises(EvaluationError, match="pip install torchmetrics torch-fidelity"):
        feature_network("inception")
