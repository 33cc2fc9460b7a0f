"""`python -m benchmarks.experts`: what PPAP owes to the number of its experts, to their training and to their LoRAs.

The setting, networks and images of `benchmarks.classifiers`; at each scale the same seeds. First, 1, 3 and 5 experts
that share a number of training steps, trained under several seeds, and 1 and 5 that share five times as many, once;
with how strongly each pushes, the mean norm of the gradient of `log p(c | x_t)`, c being the wanted class, by noise.
Second, how often an expert agrees with the teacher in the middle of its noise, by rank and learning rate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import trimtab
from trimtab.adapters.ppap.experts import load_experts
from trimtab.adapters.ppap.noise import noised
from trimtab.adapters.weights import load_weights
from trimtab.guidance.images import Preprocessing
from trimtab.pipelines.fashion.data import CLASS_NAMES

from .classifiers import Configurations, Sampling, check_count, sampling_options
from .experts_page import page
from .rows import Rows

ARMS = ((1, 1), (3, 1), (5, 1), (1, 5), (5, 5))
"""Number of experts, and how many times `--expert-steps` they share."""
SCALES = (4.0, 8.0, 16.0, 32.0)
WINDOWS = {
    "without the noisiest fifth": {"start": 0.2},
    "without the cleanest fifth": {"stop": 0.8},
}
"""Parts of the run that experts guide, beside all of it; of one training each of the first and the third of `ARMS`."""
RANGES = 5
LORAS = ((1, 1e-2), (2, 1e-2), (4, 1e-2), (2, 3e-3), (2, 1e-3))
"""Rank and highest learning rate of five experts' training; the others have the second."""
PUSHED = 200
"""Images of which gradients are taken."""


def pushes(configurations: Configurations, file: Path) -> list[float]:
    """The mean norm of the gradient of `log p(c | x_t)` with respect to `x_t`, in equal ranges of timesteps."""
    experts = load_experts(configurations.guide, load_weights(file))
    x0, preprocessing = configurations.generated()[:PUSHED], Preprocessing()
    wanted = (torch.arange(len(x0)) % len(CLASS_NAMES))[:, None]
    generator, found = torch.Generator().manual_seed(0), []
    for index in range(RANGES):
        low, high = (experts.timesteps * edge // RANGES for edge in (index, index + 1))
        t = torch.randint(low, high, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = noised(configurations.pipe.scheduler, x0, noise, t).requires_grad_()
        score = experts(preprocessing(x_t), t).log_softmax(1).gather(1, wanted).sum()
        (gradient,) = torch.autograd.grad(score, x_t)
        found.append(gradient.flatten(1).norm(dim=1).mean().item())
    return found


def arm(
    configurations: Configurations, sampling: Sampling, count: int, steps: int, seed: int, window: str = ""
) -> dict[str, Any]:
    """Class and distance at each scale, with what the experts see and how strongly they push."""
    name = f"experts-{count}-of-{steps}-{seed}"
    file = configurations.experts(name, experts=count, rank=2, steps=steps // count, seed=seed)
    at_x_t = {"classifier": configurations.guide, "weights": str(file), "estimate": "x_t", **WINDOWS.get(window, {})}
    scales = {}
    for scale in SCALES:
        images = sampling.images(f"{name} {window}".strip(), ("ppap", at_x_t), scale, sampling.args.count, 0)
        scales[f"{scale:g}"] = {key: measure.value for key, measure in sampling.measured(images).items()}
    if window:
        return {"scales": scales, "window": window}
    return {"scales": scales, "agreement": agreement_of(file), "push": pushes(configurations, file)}


def agreement_of(file: Path) -> list[dict[str, Any]]:
    """What the training's report says of experts and teacher, by noise."""
    rows: list[dict[str, Any]] = json.loads((file.parent / "report.json").read_text())["agreement"]
    return rows


def measure(rows: Rows, args: argparse.Namespace) -> None:
    """Fill the rows that are missing."""
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    pipe.set_progress_bar_config(disable=True)
    configurations, sampling = Configurations(pipe, args), Sampling(pipe, args)
    trainings = [(seed, arm) for seed, arm in product(range(args.seeds), ARMS) if arm[1] == 1 or seed == 0]
    for seed, (count, times) in tqdm(trainings, desc="experts"):
        steps = times * args.expert_steps
        if (name := f"{count} of {steps}, seed {seed}") not in rows:
            rows[name] = arm(configurations, sampling, count, steps, seed)
    for (count, times), window in tqdm(list(product((ARMS[0], ARMS[2]), WINDOWS)), desc="windows"):
        steps = times * args.expert_steps
        if (name := f"{count} of {steps}, {window}") not in rows:
            rows[name] = arm(configurations, sampling, count, steps, 0, window)
    total = args.expert_steps
    for rank, rate in tqdm(LORAS, desc="LoRAs"):
        if (name := f"rank {rank}, rate {rate:g}") not in rows:
            folder = f"experts-rank-{rank}-rate-{rate:g}" if (rank, rate) != LORAS[1] else f"experts-5-of-{total}-0"
            file = configurations.experts(folder, experts=5, rank=rank, steps=total // 5, learning_rate=rate)
            report = json.loads((file.parent / "report.json").read_text())
            rows[name] = {"agreement": report["agreement"], "share": report["trainable_share"]}


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
    measure(rows, args)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.experts", *given]), args)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
