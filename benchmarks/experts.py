"""`python -m benchmarks.experts`: what PPAP owes to the number of its experts, to their training and to their LoRAs.

The setting, networks and images of `benchmarks.classifiers`; at each scale the same seeds. First, 1, 3 and 5 experts
that share a number of training steps, trained under several seeds, and 1 and 5 that share five times as many, once;
with how strongly each pushes, by noise. Second, mixtures of one expert and of five, which guide different parts of the
run. Third, how often an expert agrees with the teacher in the middle of its noise, by rank and learning rate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm.auto import tqdm

import trimtab
from trimtab.pipelines.fashion.data import CLASS_NAMES, load

from .classifiers import Attached, Configurations, Sampling, check_count, sampling_options
from .experts_page import page
from .experts_push import pushes
from .images import to_bytes
from .rows import Row, Rows

ARMS = ((1, 1), (3, 1), (5, 1), (1, 5), (5, 5))
"""Number of experts, and how many times `--expert-steps` they share."""
SCALES = (4.0, 8.0, 16.0, 32.0)
LORAS = ((1, 1e-2), (2, 1e-2), (4, 1e-2), (2, 3e-3), (2, 1e-3))
"""Rank and highest learning rate of five experts' training; the others have the second."""


@dataclass(frozen=True)
class Part:
    """A part of the run, from much noise to little, and who guides it.

    Args:
        experts: those of which training.
        start, stop: the part, as shares of the run.
        as_strong_as: they push as strongly as these do in the noisiest fifth; by default as they do.
    """

    experts: int
    start: float
    stop: float
    as_strong_as: int | None = None


MIXTURES = {
    "1 expert, 5's in the noisiest fifth": (Part(5, 0.0, 0.2), Part(1, 0.2, 1.0)),
    "1 expert, as weak there as 5's": (Part(1, 0.0, 0.2, as_strong_as=5), Part(1, 0.2, 1.0)),
    "1 expert, 5's in the two noisiest fifths": (Part(5, 0.0, 0.4), Part(1, 0.4, 1.0)),
    "5 experts, 1's in the noisiest fifth": (Part(1, 0.0, 0.2), Part(5, 0.2, 1.0)),
    "5 experts, as strong there as 1's": (Part(5, 0.0, 0.2, as_strong_as=1), Part(5, 0.2, 1.0)),
    "5 experts, 1's in the second noisiest fifth": (Part(5, 0.0, 0.2), Part(1, 0.2, 0.4), Part(5, 0.4, 1.0)),
}
"""By name: of the trainings that share `--expert-steps`, of every seed."""
MIXED_SCALES = SCALES[1:]


class Trained:
    """The experts that are compared, trained where they are missing, and what their images are like.

    Args:
        pipe: the Fashion-MNIST model.
        args: the command's.
    """

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        self.configurations, self.sampling = Configurations(pipe, args), Sampling(pipe, args)
        images, labels = load("t10k", args.data)
        features = self.sampling.features(to_bytes(images))
        self._means, self._variance = by_class(features, labels)
        right = self._seen(features) == labels
        _, self._variance_right = by_class(features[right], labels[right])

    def file(self, count: int, steps: int, seed: int) -> Path:
        """The weights of so many experts that share these steps."""
        name = f"experts-{count}-of-{steps}-{seed}"
        return self.configurations.experts(name, experts=count, rank=2, steps=steps // count, seed=seed)

    def guided(self, file: Path, **more: Any) -> tuple[str, dict[str, Any]]:
        """The plug-in that guides by them."""
        return "ppap", {"classifier": self.configurations.guide, "weights": str(file), "estimate": "x_t", **more}

    def pushes(self, file: Path) -> dict[str, list[float]]:
        """How strongly they push."""
        return pushes(self.pipe, self.configurations.guide, self.configurations.generated(), file)

    def scales(self, name: str, attached: Attached, scales: Sequence[float]) -> dict[str, dict[str, float]]:
        """Class, distance, and the two things that the distance holds, at each scale.

        `class_means` is the mean squared distance of a requested class's mean feature to that of the real class,
        `within` the variance of the images of one class as a share of that of real images, and `within_right` the same
        of the images, made and real, in which the judge sees that class.
        """
        found = {}
        for scale in scales:
            images = self.sampling.images(name, attached, scale, self.args.count, 0)
            requested = torch.arange(len(images)) % len(CLASS_NAMES)
            features = self.sampling.features(images)
            means, variance = by_class(features, requested)
            right = self._seen(features) == requested
            _, variance_right = by_class(features[right], requested[right])
            measured = {key: measure.value for key, measure in self.sampling.measured(images).items()}
            measured["class_means"] = (means - self._means).square().sum(1).mean().item()
            within = {"within": variance / self._variance, "within_right": variance_right / self._variance_right}
            found[f"{scale:g}"] = {**measured, **within}
        return found

    @torch.inference_mode()
    def _seen(self, features: torch.Tensor) -> torch.Tensor:
        """The class that the judge sees in each image."""
        return self.sampling.judge.head(features).argmax(1)


def by_class(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The mean feature `[classes, values]` of each class, and the variance within those of two images and more."""
    each = [features[labels == label].double() for label in range(len(CLASS_NAMES))]
    variances = [one.var(0).sum().item() for one in each if len(one) > 1]
    return torch.stack([one.mean(0) for one in each]), mean(variances)


def agreement_of(file: Path) -> list[dict[str, Any]]:
    """What the training's report says of experts and teacher, by noise."""
    rows: list[dict[str, Any]] = json.loads((file.parent / "report.json").read_text())["agreement"]
    return rows


def measure_arms(rows: Rows, trained: Trained) -> None:
    """The trainings by themselves."""
    args = trained.args
    trainings = [(seed, arm) for seed, arm in product(range(args.seeds), ARMS) if arm[1] == 1 or seed == 0]
    for seed, (count, times) in tqdm(trainings, desc="experts"):
        steps = times * args.expert_steps
        if (name := f"{count} of {steps}, seed {seed}") not in rows:
            file = trained.file(count, steps, seed)
            scales = trained.scales(f"experts-{count}-of-{steps}-{seed}", (trained.guided(file),), SCALES)
            rows[name] = {"scales": scales, "agreement": agreement_of(file), **trained.pushes(file)}


def measure_mixtures(rows: Rows, trained: Trained) -> None:
    """One expert and five in parts of the run."""
    steps = trained.args.expert_steps
    for seed, (name, parts) in tqdm(list(product(range(trained.args.seeds), MIXTURES.items())), desc="mixtures"):
        if (named := f"{name}, seed {seed}") not in rows:
            noisiest = {count: rows[f"{count} of {steps}, seed {seed}"]["push"][-1] for count in (1, 5)}
            attached = [
                trained.guided(
                    trained.file(part.experts, steps, seed), start=part.start, stop=part.stop,
                    scale=noisiest[part.as_strong_as or part.experts] / noisiest[part.experts],
                )
                for part in parts
            ]  # fmt: skip
            rows[named] = {"mixture": name, "scales": trained.scales(named, attached, MIXED_SCALES)}


def measure_loras(rows: Rows, trained: Trained) -> None:
    """Ranks and learning rates."""
    total = trained.args.expert_steps
    for rank, rate in tqdm(LORAS, desc="LoRAs"):
        if (name := f"rank {rank}, rate {rate:g}") not in rows:
            folder = f"experts-rank-{rank}-rate-{rate:g}" if (rank, rate) != LORAS[1] else f"experts-5-of-{total}-0"
            file = trained.configurations.experts(folder, experts=5, rank=rank, steps=total // 5, learning_rate=rate)
            report = json.loads((file.parent / "report.json").read_text())
            row: Row = {"agreement": report["agreement"], "share": report["trainable_share"]}
            rows[name] = row


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    sampling_options(parser)
    parser.add_argument("--expert-steps", type=int, default=1500, help="of training, shared by all experts of a row")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind; of the long ones there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/experts"), help="writes OUTPUT.md and OUTPUT.json")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    check_count(parser, args.count)
    kept = ("count", "steps", "batch", "autocast", "guide_steps", "generated", "expert_steps")
    rows = Rows(args.output.with_suffix(".json"), {name: getattr(args, name) for name in kept})
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    pipe.set_progress_bar_config(disable=True)
    trained = Trained(pipe, args)
    for measured in (measure_arms, measure_mixtures, measure_loras):
        measured(rows, trained)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.experts", *given]), args)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
