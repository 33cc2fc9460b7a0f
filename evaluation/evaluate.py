"""`trimtab evaluate`: images in files against references.

| measure | needs |
| --- | --- |
| Frechet and kernel distance, precision, recall, density, coverage | references |
| accuracy and confidence of the requested class | images of garments with their settings inside, as `generate` writes |
| likeness of image and prompt (CLIP score) | images with their settings inside, and `--clip` |
| PSNR, SSIM, feature distance, and with `--lpips` LPIPS | `--pairs`: references with the same file names, or one |
| ISTD | strips with their settings inside, as `interpolate` writes |

Every value has a 95 % interval by the bootstrap over images, with fixed draws; those of the Frechet distance,
recall and coverage are the jackknife's, since these measure how varied a set is, and one with repetitions is less so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..guidance import pins
from .coverage import NEIGHBOUR, Coverage
from .distances import Gaussian, Interval, KernelDistance, bootstrap, frechet_distance, jackknife
from .each import Likeness, Measure, clip_score, evenness, garments
from .features import EvaluationError, feature_network
from .folders import Pictures, read_folder
from .processes import shared

HIGHER, LOWER = "higher is better", "lower is better"
MEASURES = {
    "kernel_distance": LOWER,
    "frechet_distance": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "density": HIGHER,
    "coverage": HIGHER,
    "accuracy": HIGHER,
    "confidence": HIGHER,
    "clip_score": HIGHER,
    "psnr": HIGHER,
    "ssim": HIGHER,
    "feature_distance": LOWER,
    "lpips": LOWER,
    "istd": LOWER,
}
"""All measures, in the order in which they are reported; the first is unbiased."""

OPTIONS = dict.fromkeys(list(MEASURES)[:6], "reference") | {
    "clip_score": "clip", "psnr": "pairs", "ssim": "pairs", "feature_distance": "pairs", "lpips": "lpips",
}  # fmt: skip
"""The option without which a measure is not taken; whether there is what the others need, only the images tell."""

NOTHING = (
    "nothing to measure: give --reference FOLDER, --pairs FOLDER or --clip MODEL, or images of garments that trimtab "
    "generate --class-balanced N made."
)

OF_VARIETY = {"frechet_distance": math.inf, "recall": 1.0, "coverage": 1.0}
"""Measures that an image drawn twice would falsify, each with the most that it can be; the least is 0."""


Statistic = tuple[Callable[[torch.Tensor], float], int]
"""A function of the indices of the images that it may use, and how many there are."""


class Evaluation:
    """What images are measured by; in several processes each takes its share, and all of them know the result.

    Args:
        reference: folder of images that they should be like, as a set.
        features: see `feature_network`.
        pairs: folder of images that each should be like, by file name; or one image.
        clip: folder or repository of a CLIP.
        lpips: the backbone of LPIPS, for pairs: `"alex"`, `"vgg"` or `"squeeze"`.
        repetitions, seed: of the bootstrap.

    Raises:
        EvaluationError: a folder holds no images, or what a measure needs is not at hand.
    """

    def __init__(
        self,
        reference: Path | None = None,
        features: str = "judge",
        pairs: Path | None = None,
        clip: str | None = None,
        lpips: str | None = None,
        repetitions: int = 200,
        seed: int = 0,
    ) -> None:
        if lpips is not None and pairs is None:
            raise EvaluationError("--lpips: it compares images with those of --pairs; give these too.")
        self.repetitions, self.seed = repetitions, seed
        self.reference = None if reference is None else read_folder(reference)
        self.network = None if reference is None and pairs is None else feature_network(features)
        self.likeness = None if pairs is None or self.network is None else Likeness(pairs, self.network, lpips)
        networks = {} if self.network is None else {"features": self.network.name}
        networks |= {} if clip is None else {"clip": clip}
        # Now, as they are loaded: one that is written anew while images are made is not the one that measures them.
        self._networks = pins.fingerprints(networks)
        self.each: list[Measure] = [garments(), evenness]
        self.each += [clip_score(clip)] if clip is not None else []
        self.each += [self.likeness] if self.likeness is not None else []
        given = {"reference": reference, "pairs": pairs, "clip": clip, "lpips": lpips}
        self.about: dict[str, Any] = {name: str(value) for name, value in given.items() if value is not None}
        if self.network is not None:
            self.about["features"] = self.network.title
        self.about |= {"repetitions": repetitions, "seed": seed}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the networks, references and pairs that are on this machine: each may be written anew under its name."""
        pairs = None if self.likeness is None else self.likeness.pictures
        images = {"reference": self.reference, "pairs": pairs}
        return self._networks | {name: one.fingerprint for name, one in images.items() if one is not None}

    def __call__(self, images: Pictures) -> dict[str, Any]:
        """All measures for which there is what they need: `about`, and `measures` with value, low and high each.

        Of one image there is the value alone.

        Raises:
            EvaluationError: nothing to compare with, or things that cannot be compared.
        """
        about: dict[str, Any] = {"images": str(images.folder), "count": len(images), **self.about}
        if self.reference is not None:
            about["reference_count"] = len(self.reference)
        return {"about": about, "measures": self._intervals(self._statistics(images))}

    def check(self, count: int, folder: Path) -> None:
        """Whether so many images of a folder can be measured, there or still to be made.

        Raises:
            EvaluationError: they, or the references, are too few to be compared as a set.
        """
        if self.reference is None:
            return
        # One more than has a neighbour, for the intervals leave images out in turn.
        for given, where in ((count, folder), (len(self.reference), self.reference.folder)):
            if given <= NEIGHBOUR + 1:
                raise EvaluationError(
                    f"--reference: the {given} images of {where} are too few to be compared as a set; needed: more "
                    f"than {NEIGHBOUR + 1}."
                )

    def check_takes(self, name: str, option: str) -> None:
        """Whether a measure can be taken, as far as that is known before there are images.

        Args:
            name: of the measure.
            option: that asked for it.

        Raises:
            EvaluationError: there is no such measure, or it needs an option that was not given.
        """
        if name not in MEASURES:
            raise EvaluationError(f"{option}: {name!r} is no measure; allowed: {', '.join(MEASURES)}.")
        if (needed := OPTIONS.get(name)) is not None and needed not in self.about:
            raise EvaluationError(f"{option}: {name} needs --{needed}; give it too.")

    def difference(self, images: Pictures, others: Pictures) -> dict[str, dict[str, float]]:
        """All measures of images minus those of others, each a value, low and high.

        Image i of one is drawn with image i of the other: where these are the same but for a guidance (in the order of
        their names), the interval is that of the paired difference, narrower than the intervals of both.

        Raises:
            EvaluationError: see `__call__`, or not as many images.
        """
        if len(images) != len(others):
            raise EvaluationError(f"{images.folder}: {len(images)} images, {others.folder} {len(others)}.")
        here, there = self._statistics(images), self._statistics(others)
        return self._intervals({name: (_minus(one, there[name][0]), n) for name, (one, n) in here.items()}, signed=True)

    def _intervals(self, statistics: Mapping[str, Statistic], signed: bool = False) -> dict[str, dict[str, float]]:
        found: dict[str, Interval] = {}
        for name in (name for name in MEASURES if name in statistics):
            statistic, count = statistics[name]
            if name in OF_VARIETY:
                most = OF_VARIETY[name]
                spread = jackknife(statistic, count, groups=min(10, count)).interval
                found[name] = spread.within(-most if signed else 0.0, most)
            else:
                found[name] = bootstrap(statistic, count, self.repetitions, self.seed)
        # A single image says nothing of how much others would differ.
        return {
            name: asdict(interval) if statistics[name][1] > 1 else {"value": interval.value}
            for name, interval in found.items()
        }

    def _statistics(self, images: Pictures) -> dict[str, Statistic]:
        self.check(len(images), images.folder)
        if self.likeness is not None:
            self.likeness.check(images)
        values, features = self._of(images)
        statistics = {} if features is None else self._of_sets(features)
        for name, found in values.items():
            if not found.isnan().any():
                statistics[name] = _mean_of(found), len(found)
        if not statistics:
            raise EvaluationError(NOTHING)
        return statistics

    def _of(self, images: Pictures) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The measures that each image has by itself, and the features where there are references."""

        @torch.no_grad()
        def compute(index: int) -> dict[str, torch.Tensor]:
            batch = images.batch(index)
            found = {name: value for measure in self.each for name, value in measure(batch).items()}
            if self.network is not None and self.reference is not None:
                found["features"] = self.network(batch.images)
            return found

        parts = shared(compute, images.batches, f"measure {images.folder.name}")
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return joined, joined.pop("features", None)

    @cached_property
    def _real(self) -> tuple[torch.Tensor, Gaussian, KernelDistance]:
        """The references' features, and what the distances need of them."""
        network, reference = self.network, self.reference
        assert network is not None and reference is not None
        parts = shared(
            lambda index: network(reference.batch(index).images), reference.batches, f"measure {reference.folder.name}"
        )
        features = torch.cat(parts)
        return features, Gaussian(features), KernelDistance(features)

    def _of_sets(self, here: torch.Tensor) -> dict[str, Statistic]:
        there, real, kernel = self._real
        cover, count = Coverage(here, there), len(here)
        return {
            "frechet_distance": (lambda rows: frechet_distance(Gaussian(here[rows]), real), count),
            # Drawn twice, an image is its own nearest neighbour; kernels of a pair with itself stay out.
            "kernel_distance": (kernel.resampled(here), count),
            "precision": (cover.precision, count),
            "recall": (cover.recall, count),
            "density": (cover.density, count),
            "coverage": (cover.coverage, count),
        }


def _minus(
    one: Callable[[torch.Tensor], float], other: Callable[[torch.Tensor], float]
) -> Callable[[torch.Tensor], float]:
    return lambda rows: one(rows) - other(rows)


def _mean_of(values: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda rows: values[rows].double().mean().item()
