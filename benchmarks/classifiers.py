"""`python -m benchmarks.classifiers`: the embedded model, sampled unconditionally and guided by classifiers.

The requested class is judged by a network that never guides, and the distance to real test images is taken on its
features. Compared: no guidance; a plain classifier at the clean estimate, and EluCD's settings one by one; at x_t the
same clean classifier, one that was trained on noisy images, and PPAP with 1, 3 and 5 experts, trained from the model's
own images. Networks that are missing are trained first. With `--efficientnet`, EfficientNet-Lite0 guides too, by the
likeness of its features to the mean ones of each class.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import trimtab
from trimtab.adapters.ppap.train import PPAPSettings, generated, train_experts
from trimtab.evaluation.distances import Estimate, Gaussian, frechet_distance, jackknife
from trimtab.evaluation.networks import JUDGE_FILE, in_batches, load_efficientnet, load_judge
from trimtab.guidance.images import Preprocessing
from trimtab.pipelines.embedded.data import CLASS_NAMES, load

from .guides import load_guide
from .images import from_bytes, to_bytes

PLAIN: Mapping[str, Any] = {"beta": None, "tau2": 1.0, "gamma": 0.0}
ABLATION: Mapping[str, Mapping[str, Any]] = {
    "plain classifier": PLAIN,
    "+ softplus": {**PLAIN, "beta": 3.0},
    "+ temperatures": {**PLAIN, "beta": 3.0, "tau2": 0.5},
    "+ sine schedule (EluCD)": {"beta": 3.0, "tau2": 0.5, "gamma": 0.3},
}
EXPERTS = (1, 3, 5)


class Likeness(nn.Module):
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


def configurations(pipe: Any, args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]] | None]:
    """What is attached in each row of the table; networks are trained on the way."""
    guide = load_guide(args.cache / "guide.safetensors", None, args.data, args.guide_steps)
    noisy = load_guide(args.cache / "guide-noisy.safetensors", pipe.scheduler, args.data, args.guide_steps)
    clean = {"classifier": guide, "scale": args.scale}
    rows: dict[str, tuple[str, dict[str, Any]] | None] = {"no guidance": None}
    rows |= {name: ("classifier", {**clean, **parameters}) for name, parameters in ABLATION.items()}
    at_x_t = {"estimate": "x_t", "scale": args.noisy_scale}
    rows["clean classifier at x_t"] = ("classifier", {"classifier": guide, **at_x_t})
    rows["noise-aware classifier"] = ("classifier", {"classifier": noisy, **at_x_t})
    shared = PPAPSettings(output=str(args.cache), images=args.generated, batch_size=64)
    images = generated(pipe, shared)
    for count in EXPERTS:
        settings = PPAPSettings(
            output=str(args.cache / f"ppap-{count}"), images=args.generated, experts=count,
            steps=max(1, args.expert_steps // count), batch_size=64, learning_rate=1e-3, warmup=0,
        )  # fmt: skip
        file = train_experts(pipe, guide, Preprocessing(), settings, images)
        rows[f"PPAP, {count} experts"] = (
            "ppap", {"classifier": guide, "weights": str(file), "scale": args.noisy_scale}
        )  # fmt: skip
    if args.efficientnet:
        rows["EfficientNet-Lite0"] = ("classifier", {"classifier": Likeness(args.data), "scale": args.scale})
    return rows


def generate(pipe: Any, args: argparse.Namespace, name: str) -> torch.Tensor:
    """Unconditional images as bytes; image i is guided to class i modulo 10."""
    images = []
    for first in tqdm(range(0, args.count, args.batch), desc=name):
        indices = range(first, min(first + args.batch, args.count))
        if pipe.guidances:
            next(iter(pipe.guidances.values())).target = tuple(index % len(CLASS_NAMES) for index in indices)
        made = pipe(
            [None] * len(indices),
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(index) for index in indices],
            output_type="pt",
        ).images
        images.append(to_bytes(made))
    return torch.cat(images)


def measure(args: argparse.Namespace) -> dict[str, dict[str, Estimate]]:
    """Accuracy of the requested class and Fréchet distance of each row."""
    judge, _ = load_judge(args.judge, args.data)
    real = Gaussian(in_batches(judge.features, load("t10k", args.data)[0], "real"))
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/embedded")
    pipe.set_progress_bar_config(disable=True)
    rows: dict[str, dict[str, Estimate]] = {}
    for name, attached in configurations(pipe, args).items():
        pipe.clear_guidance()
        if attached is not None:
            plugin, parameters = attached
            pipe.add_guidance(plugin, target=0, **parameters)
        features = in_batches(judge.features, from_bytes(generate(pipe, args, name)), name)
        with torch.inference_mode():
            right = judge.head(features).argmax(1) == torch.arange(args.count) % len(CLASS_NAMES)
        rows[name] = {
            "accuracy": jackknife(lambda i, r=right: r[i].double().mean().item(), args.count, len(CLASS_NAMES)),
            "frechet": jackknife(
                lambda i, f=features: frechet_distance(Gaussian(f[i]), real), args.count, len(CLASS_NAMES)
            ),
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The page's table."""
    lines = ["| | accuracy of the requested class | Fréchet distance, judge |", "| --- | --- | --- |"]
    for name, row in rows.items():
        accuracy, frechet = row["accuracy"], row["frechet"]
        lines.append(
            f"| {name} | {accuracy.value:.3f} ± {accuracy.error:.3f} | {frechet.value:.1f} ± {frechet.error:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classifiers", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="images a row, a multiple of 100")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch", type=int, default=100, help="images at once")
    parser.add_argument("--scale", type=float, default=1.0, help="of guidance at the clean estimate")
    parser.add_argument("--noisy-scale", type=float, default=5.0, help="of guidance at x_t")
    parser.add_argument("--guide-steps", type=int, default=1500, help="of training each guide")
    parser.add_argument("--generated", type=int, default=5000, help="images that PPAP learns from")
    parser.add_argument("--expert-steps", type=int, default=5000, help="of training, shared by all experts of a row")
    parser.add_argument("--efficientnet", action="store_true", help="a row guided by EfficientNet-Lite0")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--cache", type=Path, default=Path("runs/classifiers"), help="folder of what is trained")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="trained where missing")
    parser.add_argument("--output", type=Path, default=Path("runs/classifiers/table"), help="its .md and .json")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.count < 100 or args.count % 100:
        parser.error(f"--count {args.count}: ten classes in ten groups need a multiple of 100.")
    rows = measure(args)
    command = shlex.join(["python", "-m", "benchmarks.classifiers", *given])
    page = f"# Classifier guidance of the embedded model\n\nMade by `{command}`.\n\n{table(rows)}\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: {key: [e.value, e.error] for key, e in row.items()} for name, row in rows.items()}
    args.output.with_suffix(".json").write_text(json.dumps(plain, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
