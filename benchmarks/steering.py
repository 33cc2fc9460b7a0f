"""`python -m benchmarks.steering`: inpainting of held-out images by the embedded model, unconditionally.

The right half of real test images is painted anew from the left half. Compared: no guidance, plain replacement (the
known pixels at their noise level after each step), DPS, and `steered`, with and without recurrence. PSNR and SSIM are
taken on the painted half; the class is judged by a network that never guides.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import trimtab
from trimtab import Guidance, Step
from trimtab.evaluation.networks import JUDGE_FILE, load_judge
from trimtab.pipelines.embedded.data import load

KNOWN = torch.arange(32)[None, None, None, :].expand(1, 1, 32, 32) < 16


class Replacement(Guidance):
    """Plain replacement: after each step the known pixels are put in at that noise level."""

    needs = frozenset({"level"})

    def __init__(self, image: torch.Tensor, seed: int) -> None:
        super().__init__()
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "generator", torch.Generator().manual_seed(seed))

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        level = step.next_level
        noise = torch.randn(sample.shape, generator=self.generator)
        return torch.where(KNOWN, level.alpha * self.image + level.sigma * noise, sample)


def _residual(image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return ((image - wanted) * KNOWN).flatten(1).norm(dim=1)


METHODS: dict[str, Callable[[Any, torch.Tensor, int], Any]] = {
    "no guidance": lambda pipe, image, seed: None,
    "replacement": lambda pipe, image, seed: pipe.add_guidance(Replacement(image, seed), name="replacement"),
    "DPS": lambda pipe, image, seed: pipe.add_guidance(
        "tfg", preset="dps", energy=lambda x: _residual(x, image), rho=1.0
    ),
    "steered": lambda pipe, image, seed: pipe.add_guidance(
        "steered", task="inpainting", image=image, mask=1 - KNOWN.float()
    ),
    "steered, 3 evaluations a step": lambda pipe, image, seed: pipe.add_guidance(
        "steered", task="inpainting", image=image, mask=1 - KNOWN.float(), recurrence=3
    ),
}


def psnr(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of images in -1..1, in dB, `[n]`."""
    return 10 * torch.log10(4 / (images - wanted).square().flatten(1).mean(1).clamp_min(1e-12))


def ssim(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Structural similarity `[n]` (Wang et al., 2004), Gaussian window of 11 pixels and width 1.5, range 2."""
    x = torch.arange(11.0) - 5
    row = torch.exp(-x.square() / (2 * 1.5**2))
    window = (row[:, None] * row / row.sum() ** 2)[None, None]

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        return F.conv2d(tensor, window)

    a, b = mean(images), mean(wanted)
    spread_a, spread_b = mean(images**2) - a**2, mean(wanted**2) - b**2
    joint = mean(images * wanted) - a * b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return ((2 * a * b + c1) * (2 * joint + c2) / ((a**2 + b**2 + c1) * (spread_a + spread_b + c2))).flatten(1).mean(1)


def measure(count: int, steps: int, batch: int, data: str | None, judge_file: Path) -> dict[str, dict[str, float]]:
    """Each method's means over `count` test images, and standard errors."""
    images, labels = load("t10k", data)
    judge, about = load_judge(judge_file, data)
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/embedded")
    pipe.set_progress_bar_config(disable=True)
    rows: dict[str, dict[str, float]] = {}
    for name, attach in METHODS.items():
        found: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "accuracy": [], "known": []}
        started = time.perf_counter()
        for first in tqdm(range(0, count, batch), desc=name):
            chosen = slice(first, min(first + batch, count))
            wanted, label = images[chosen], labels[chosen]
            pipe.clear_guidance()
            attach(pipe, wanted, first)
            generators = [torch.Generator().manual_seed(index) for index in range(first, first + len(wanted))]
            made = pipe([None] * len(wanted), num_inference_steps=steps, generator=generators, output_type="pt").images
            clipped = made.clamp(-1, 1)
            found["psnr"].append(psnr(clipped[..., 16:], wanted[..., 16:]))
            found["ssim"].append(ssim(clipped[..., 16:], wanted[..., 16:]))
            found["known"].append((clipped - wanted)[..., :16].abs().flatten(1).amax(1))
            with torch.inference_mode():
                found["accuracy"].append((judge(clipped).argmax(1) == label).float())
        row = {key: torch.cat(values) for key, values in found.items()}
        rows[name] = {key: value.mean().item() for key, value in row.items()}
        rows[name] |= {f"{key}_error": (value.std() / len(value) ** 0.5).item() for key, value in row.items()}
        rows[name]["seconds"] = (time.perf_counter() - started) / count
    with torch.inference_mode():
        real = (judge(images[:count]).argmax(1) == labels[:count]).float().mean().item()
    rows["the real images"] = {"accuracy": real, "judge_test_accuracy": about["test_accuracy"]}
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The page's table."""
    lines = ["| | PSNR, dB | SSIM | accuracy of the class | largest error of a known pixel | seconds an image |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in rows.items():
        cells = [
            f"{row[key]:.{digits}f} ± {row[f'{key}_error']:.{digits}f}" if f"{key}_error" in row else
            (f"{row[key]:.{digits}f}" if key in row else "")
            for key, digits in (("psnr", 2), ("ssim", 3), ("accuracy", 3))
        ]  # fmt: skip
        cells += [f"{row['known']:.1e}", f"{row['seconds']:.2f}"] if "known" in row else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="test images")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch", type=int, default=50, help="images at once")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="weights of the judge; trained where missing")
    parser.add_argument("--output", type=Path, default=Path("runs/steering"), help="writes OUTPUT.json and OUTPUT.md")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    rows = measure(args.count, args.steps, args.batch, args.data, args.judge)
    command = shlex.join(["python", "-m", "benchmarks.steering", *given])
    page = (
        f"# Inpainting by the embedded model\n\nMade by `{command}`: {args.count} held-out images.\n\n{table(rows)}\n"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
