"""`python -m benchmarks.steering`: held-out images restored by the Fashion-MNIST model, unconditionally.

Inpainting (the right half from the left half) and super-resolution (32x32 from 8x8) of real test images. Compared: no
guidance, plain replacement (what was measured, at its noise level, put in after each step), DPS, and `steered`: as a
projection, with three evaluations a step, with an ancestral sampler, and together with the gradient of the residual.
Weights of gradients are those of the best PSNR on some training images. PSNR and SSIM are taken where something was
missing; the class is judged by a network that never guides.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from tqdm.auto import tqdm

import trimtab
from trimtab import Guidance, Step
from trimtab.evaluation.networks import JUDGE_FILE, load_judge
from trimtab.guidance.losses import Term
from trimtab.guidance.operators import LinearOperator, inpainting, resampling
from trimtab.pipelines.fashion.data import load

from .likeness import psnr, ssim
from .rows import Rows
from .steering_page import page

KNOWN = torch.arange(32)[None, None, None, :].expand(1, 1, 32, 32) < 16
WEIGHTS = (2.0, 4.0, 8.0, 16.0)
"""Of a gradient, from which the training images choose."""


@dataclass(frozen=True)
class Task:
    """A measurement, how `steered` is told of it, and the columns of the image that are judged."""

    operator: LinearOperator
    parameters: Mapping[str, Any]
    judged: slice

    def residual(self, measured: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """`|y - A x|` of each image, as a loss."""
        return lambda x: (self.operator.forward(x) - measured).flatten(1).norm(dim=1)


TASKS = {
    "inpainting": Task(
        inpainting(KNOWN), {"task": "inpainting", "mask": 1 - KNOWN.float()}, slice(16, None)
    ),
    "super-resolution": Task(resampling((32, 32), (8, 8)), {"task": "super_resolution"}, slice(None)),
}  # fmt: skip


class Replacement(Guidance):
    """Plain replacement: after each step the measurement is put in at that noise level."""

    needs = frozenset({"level"})

    def __init__(self, operator: LinearOperator, measured: torch.Tensor, seed: int) -> None:
        super().__init__()
        object.__setattr__(self, "operator", operator)
        object.__setattr__(self, "measured", measured)
        object.__setattr__(self, "generator", torch.Generator().manual_seed(seed))

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        noise = self.operator.forward(torch.randn(sample.shape, generator=self.generator))
        return self.operator.project(sample, step.next_level.alpha * self.measured + step.next_level.sigma * noise)


Attach = Callable[[Any, Task, torch.Tensor, int, float], None]
"""Attaches a method: to a pipeline, for a task, what was measured, the first image's index, the gradient's weight."""


def _steered(pipe: Any, task: Task, measured: torch.Tensor, **parameters: Any) -> None:
    pipe.add_guidance("steered", image=measured, **task.parameters, **parameters)


METHODS: Mapping[str, Attach] = {
    "no guidance": lambda pipe, task, y, first, weight: None,
    "plain replacement": lambda pipe, task, y, first, weight: pipe.add_guidance(
        Replacement(task.operator, y, first), name="replacement"
    ),
    "DPS": lambda pipe, task, y, first, weight: pipe.add_guidance(
        "tfg", preset="dps", energy=task.residual(y), rho=weight
    ),
    "steered": lambda pipe, task, y, first, weight: _steered(pipe, task, y),
    "steered, ancestral sampler": lambda pipe, task, y, first, weight: _steered(pipe, task, y),
    "steered, recurrence=3": lambda pipe, task, y, first, weight: _steered(pipe, task, y, recurrence=3),
    "steered, and the residual as a loss": lambda pipe, task, y, first, weight: _steered(
        pipe, task, y, losses=(Term(task.residual(y), weight),)
    ),
}
WEIGHED = ("DPS", "steered, and the residual as a loss")
"""The methods that have a weight."""


@dataclass(frozen=True)
class Restoration:
    """Restores images by one method at a time.

    Args:
        steps: of denoising.
        batch: images at once.
        autocast: denoise in bfloat16.
    """

    steps: int
    batch: int
    autocast: bool

    def __call__(self, task: Task, method: str, wanted: torch.Tensor, seed: int, weight: float) -> torch.Tensor:
        """Images like `wanted` `[n, 1, 32, 32]` from their measurements; the i-th begins from the noise of seed + i."""
        pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
        pipe.set_progress_bar_config(disable=True)
        if "ancestral" in method:
            pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        made = []
        for first in tqdm(range(0, len(wanted), self.batch), desc=method):
            chosen = wanted[first : first + self.batch]
            indices = range(seed + first, seed + first + len(chosen))
            pipe.clear_guidance()
            METHODS[method](pipe, task, task.operator.forward(chosen), indices[0], weight)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                made.append(pipe(
                    [None] * len(chosen), num_inference_steps=self.steps, output_type="pt",
                    generator=[torch.Generator().manual_seed(index) for index in indices],
                ).images.float())  # fmt: skip
        return torch.cat(made)

    def best_weight(self, task: Task, method: str, wanted: torch.Tensor, seed: int) -> float:
        """The weight with the highest PSNR."""
        found = {weight: self(task, method, wanted, seed, weight).clamp(-1, 1) for weight in WEIGHTS}
        return max(found, key=lambda w: psnr(found[w][..., task.judged], wanted[..., task.judged]).mean().item())


def measure(rows: Rows, args: argparse.Namespace) -> None:
    """Fill the rows that are missing."""
    images, labels = (tensor[: args.count] for tensor in load("t10k", args.data))
    tuning = load("train", args.data)[0][-args.tuning :]
    judge, about = load_judge(args.judge, args.data)
    with torch.inference_mode():
        rows["real images"] = {**_mean("accuracy", judge(images).argmax(1) == labels), "judge": about}
    restore = Restoration(args.steps, args.batch, args.autocast)
    for name, task in TASKS.items():
        measured = task.operator.forward(images)
        for method in METHODS:
            if "each" in rows.get(key := f"{name}: {method}", {}):
                continue
            weight = restore.best_weight(task, method, tuning, args.count) if method in WEIGHED else 0.0
            started = time.process_time()
            made = restore(task, method, images, 0, weight)
            seconds = (time.process_time() - started) / args.count
            clipped = made.clamp(-1, 1)
            pairs = clipped[..., task.judged], images[..., task.judged]
            ratios = psnr(*pairs)
            with torch.inference_mode():
                right = judge(clipped).argmax(1) == labels
            rows[key] = {
                **_mean("psnr", ratios), **_mean("ssim", ssim(*pairs)), **_mean("accuracy", right),
                "residual": (task.operator.forward(clipped) - measured).abs().max().item(),
                "seconds": seconds, "weight": weight, "each": [round(one, 4) for one in ratios.tolist()],
            }  # fmt: skip


def _mean(name: str, values: torch.Tensor) -> dict[str, list[float]]:
    """The mean of a measure and its standard error."""
    values = values.double()
    return {name: [values.mean().item(), (values.std() / len(values) ** 0.5).item()]}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="test images")
    parser.add_argument("--tuning", type=int, default=40, help="training images that choose the weights")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch", type=int, default=50, help="images at once")
    parser.add_argument("--autocast", action="store_true", help="denoise in bfloat16")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="weights of the judge; trained where missing")
    parser.add_argument("--output", type=Path, default=Path("runs/steering"), help="writes OUTPUT.json and OUTPUT.md")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    settings = {name: getattr(args, name) for name in ("count", "tuning", "steps", "batch", "autocast")}
    rows = Rows(args.output.with_suffix(".json"), settings)
    measure(rows, args)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.steering", *given]), args, WEIGHTS)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
