"""`python -m benchmarks.classifiers`: the Fashion-MNIST model, sampled unconditionally and guided by classifiers.

The requested class is judged by a network that never guides, and the distance to real test images is taken on its
features. Compared: no guidance; a plain classifier at the clean estimate, and EluCD's settings one by one; at x_t the
same clean classifier, one that was trained on noisy images, and PPAP with 1, 3 and 5 experts, trained from the model's
own images. Each row's scale is the power of two with the lowest distance on images of other seeds; it is searched from
`SCALES` outwards until a worse one lies on either side. Networks that are missing are trained first; images and rows
are kept as they come, so that an interrupted run continues, and one with a larger `--count` goes on from the images
that there are. With `--efficientnet`, EfficientNet-Lite0 guides too, by the likeness of its features to the mean ones
of each class.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import trimtab
from trimtab.adapters.ppap.train import PPAPSettings, generated, train_experts
from trimtab.adapters.weights import load_weights, save_weights
from trimtab.evaluation.distances import Estimate, Gaussian, frechet_distance, jackknife
from trimtab.evaluation.networks import JUDGE_FILE, in_batches, load_efficientnet, load_judge
from trimtab.guidance.images import Preprocessing
from trimtab.pipelines.fashion.data import CLASS_NAMES, load

from .classifiers_page import page
from .guides import load_guide
from .images import from_bytes, to_bytes
from .rows import Rows

PLAIN: Mapping[str, Any] = {"beta": None, "tau2": 1.0, "gamma": 0.0}
ABLATION: Mapping[str, Mapping[str, Any]] = {
    "plain classifier": PLAIN,
    "+ softplus": {**PLAIN, "beta": 3.0},
    "+ temperatures": {**PLAIN, "beta": 3.0, "tau2": 0.5},
    "+ sine schedule (EluCD)": {"beta": 3.0, "tau2": 0.5, "gamma": 0.3},
}
EXPERTS = (5, 1, 3)
SCALES = {"x0": (0.5, 1.0, 2.0), "x_t": (2.0, 4.0, 8.0)}
"""Where the search for each row's own begins, by what the classifier sees."""
LEAST, MOST = 1 / 16, 64.0
"""Where it ends in any case."""
TUNING_SEED = 10**6
Attached = Sequence[tuple[str, Mapping[str, Any]]]
"""Plug-ins by name, with their parameters; a `scale` among these multiplies that of the row."""


class NearestMeans(nn.Module):
    """EfficientNet-Lite0 as a classifier of garments: cosine of its features to the mean ones of each class."""

    def __init__(self, data: str | None, temperature: float = 0.05) -> None:
        super().__init__()
        self.features, self.temperature = load_efficientnet(), temperature
        images, labels = load("train", data)
        means = [
            in_batches(self.features, images[labels == label][:100], name, size=50).mean(0)
            for label, name in enumerate(CLASS_NAMES)
        ]
        self.register_buffer("means", torch.stack(means))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(self.features(images)[:, None], self.means[None], dim=-1) / self.temperature


class Configurations:
    """What is attached in each row of the table; networks are trained when their row's turn comes."""

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        self.guide = load_guide(args.cache / "guide.safetensors", None, args.data, args.guide_steps)

    def rows(self) -> Mapping[str, Callable[[], Attached]]:
        """By name, in the order of the table."""
        found: dict[str, Callable[[], Attached]] = {"no guidance": lambda: ()}
        found |= {name: lambda p=p: (("classifier", {"classifier": self.guide, **p}),) for name, p in ABLATION.items()}
        at_x_t = {"estimate": "x_t"}
        found["clean classifier at x_t"] = lambda: (("classifier", {"classifier": self.guide, **at_x_t}),)
        found["noise-aware classifier at x_t"] = lambda: (("classifier", {"classifier": self._noisy(), **at_x_t}),)
        for count in EXPERTS:
            found[f"PPAP, {count} expert{'s' * (count > 1)}"] = lambda count=count: (
                ("ppap", {"classifier": self.guide, "weights": str(self._shared(count)), **at_x_t}),
            )
        if self.args.efficientnet:
            found["EfficientNet-Lite0"] = lambda: (("classifier", {"classifier": NearestMeans(self.args.data)}),)
        return found

    def _noisy(self) -> nn.Module:
        args = self.args
        return load_guide(args.cache / "guide-noisy.safetensors", self.pipe.scheduler, args.data, args.noisy_steps)

    def _shared(self, count: int) -> Path:
        args = self.args
        return self.experts(f"ppap-{count}", experts=count, rank=args.rank, steps=args.expert_steps // count)

    def experts(
        self, folder: str, experts: int, rank: int, steps: int, learning_rate: float = 1e-2, seed: int = 0
    ) -> Path:
        """Experts trained in a folder of the cache, with so many steps each; those that are there are kept."""
        settings = PPAPSettings(
            output=str(self.args.cache / folder), images=self.args.generated, experts=experts, rank=rank,
            alpha=float(rank), steps=steps, batch_size=32, learning_rate=learning_rate, warmup=20, seed=seed,
        )  # fmt: skip
        return train_experts(self.pipe, self.guide, Preprocessing(), settings, self.generated())

    def generated(self) -> torch.Tensor:
        """The images that experts learn from, which no guidance has touched."""
        args = self.args
        self.pipe.clear_guidance()  # that of the row before
        shared = PPAPSettings(output=str(args.cache), images=args.generated, inference_steps=args.steps, batch_size=100)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            return generated(self.pipe, shared)


class Sampling:
    """Images of one configuration at a time, kept in files.

    Args:
        pipe: the Fashion-MNIST model.
        args: the command's.
        real: features of real test images.
    """

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        self.judge, _ = load_judge(args.judge, args.data)
        self.real = Gaussian(in_batches(self.judge.features, load("t10k", args.data)[0], "real"))

    def images(self, name: str, attached: Attached, scale: float, count: int, seed: int) -> torch.Tensor:
        """Unconditional images as bytes; image i is guided to class i modulo 10, and begins from its own seed + i."""
        self.pipe.clear_guidance()
        for number, (plugin, parameters) in enumerate(attached):
            given = {**parameters, "scale": scale * parameters.get("scale", 1.0)}
            self.pipe.add_guidance(plugin, name=f"{plugin} {number}", target=0, **given)
        folder = self.args.cache / "images" / f"{name.replace(' ', '-')}-{scale:g}-{self.args.steps}"
        parts = []
        for first in tqdm(range(seed, seed + count, self.args.batch), desc=f"{name}, scale {scale:g}"):
            indices = range(first, min(first + self.args.batch, seed + count))
            file = folder / f"{first}-{len(indices)}.safetensors"
            if not file.exists():
                save_weights(file, {"images": to_bytes(self._batch(indices))})
            parts.append(load_weights(file).tensors["images"])
        return torch.cat(parts)

    def _batch(self, indices: range) -> torch.Tensor:
        for guidance in self.pipe.guidances.values():
            guidance.target = tuple(index % len(CLASS_NAMES) for index in indices)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.autocast):
            return self.pipe(
                [None] * len(indices),
                num_inference_steps=self.args.steps,
                generator=[torch.Generator().manual_seed(index) for index in indices],
                output_type="pt",
            ).images

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the judge sees in images given as bytes."""
        return in_batches(self.judge.features, from_bytes(images), "judge")

    def distance(self, name: str, attached: Attached, scale: float) -> float:
        """The Fréchet distance of some images of other seeds."""
        images = self.images(name, attached, scale, self.args.tuning, TUNING_SEED)
        return frechet_distance(Gaussian(self.features(images)), self.real)

    def measured(self, images: torch.Tensor) -> dict[str, Estimate]:
        """Accuracy of the requested class and Fréchet distance."""
        features, count = self.features(images), len(images)
        with torch.inference_mode():
            right = self.judge.head(features).argmax(1) == torch.arange(count) % len(CLASS_NAMES)
        return {
            "accuracy": jackknife(lambda i: right[i].double().mean().item(), count, len(CLASS_NAMES)),
            "frechet": jackknife(lambda i: frechet_distance(Gaussian(features[i]), self.real), count, len(CLASS_NAMES)),
        }


def search(distance: Callable[[float], float], scales: tuple[float, ...]) -> dict[float, float]:
    """The distance at these scales, and at halves and doubles of them until the lowest has a neighbour on each side."""
    found = {scale: distance(scale) for scale in scales}
    while True:
        best, lowest, highest = min(found, key=found.__getitem__), min(found), max(found)
        if best == lowest > LEAST:
            found[lowest / 2] = distance(lowest / 2)
        elif best == highest < MOST:
            found[highest * 2] = distance(highest * 2)
        else:
            return dict(sorted(found.items()))


def sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of what guides, and of the images that it makes."""
    parser.add_argument("--count", type=int, default=2000, help="images a row, a multiple of 100")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--batch", type=int, default=100, help="images at once")
    parser.add_argument("--autocast", action="store_true", help="denoise in bfloat16")
    parser.add_argument("--guide-steps", type=int, default=1200, help="of training the guide")
    parser.add_argument("--generated", type=int, default=2000, help="images that PPAP learns from")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--cache", type=Path, default=Path("runs/classifiers"), help="folder of networks and images")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="weights of the judge; trained where missing")


def check_count(parser: argparse.ArgumentParser, count: int) -> None:
    """End the command where classes and groups do not come out even."""
    if count < 100 or count % 100:
        parser.error(f"--count {count}: ten classes in ten groups need a multiple of 100.")


def measure(rows: Rows, args: argparse.Namespace) -> None:
    """Fill the rows that are missing."""
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    pipe.set_progress_bar_config(disable=True)
    sampling = Sampling(pipe, args)
    for name, configured in Configurations(pipe, args).rows().items():
        if name in rows:
            continue
        attached = configured()
        parameters = attached[0][1] if attached else {}
        if not attached:
            scale, tried = 0.0, {0.0: sampling.distance(name, (), 0.0)}
        else:
            begin = SCALES["x_t" if "estimate" in parameters else "x0"]
            tried = search(lambda s, n=name, a=attached: sampling.distance(n, a, s), begin)
            scale = min(tried, key=tried.__getitem__)
        started = time.process_time()
        images = sampling.images(name, attached, scale, args.count, 0)
        row: dict[str, Any] = {"scale": scale, "tried": tried, "seconds": (time.process_time() - started) / args.count}
        row |= {key: [e.value, list(e.replicates)] for key, e in sampling.measured(images).items()}
        if "weights" in parameters:
            report = json.loads((Path(parameters["weights"]).parent / "report.json").read_text())
            row |= {key: report[key] for key in ("trainable_share", "experts", "base_parameters", "agreement")}
        rows[name] = row


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classifiers", description=__doc__)
    sampling_options(parser)
    parser.add_argument("--tuning", type=int, default=100, help="images for each scale that is tried")
    parser.add_argument("--noisy-steps", type=int, default=1500, help="of training the noise-aware one")
    parser.add_argument("--expert-steps", type=int, default=1500, help="of training, shared by all experts of a row")
    parser.add_argument("--rank", type=int, default=2, help="of the experts' LoRA")
    parser.add_argument("--efficientnet", action="store_true", help="let EfficientNet-Lite0 guide too")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/classifiers"), help="writes OUTPUT.md and OUTPUT.json"
    )
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    check_count(parser, args.count)
    kept = ("count", "tuning", "steps", "batch", "autocast", "guide_steps", "noisy_steps", "generated", "expert_steps",
            "rank")  # fmt: skip
    rows = Rows(args.output.with_suffix(".json"), {name: getattr(args, name) for name in kept})
    measure(rows, args)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.classifiers", *given]), args)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
