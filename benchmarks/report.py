"""The measurement of quality as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "accuracy": ("accuracy of the requested class", 4),
    "frechet": ("Fréchet distance, judge", 2),
    "spread": ("spread, judge (real = 1)", 3),
    "imagenet_frechet": ("Fréchet distance, ImageNet", 1),
    "imagenet_kernel": ("kernel distance, ImageNet", 4),
    "imagenet_spread": ("spread, ImageNet (real = 1)", 3),
}

PAGE = """# Quality of the Fashion-MNIST model

Made by

    {command}

{images} images a configuration ({per_class} of each class, seeds {seed} to {last}, the same in every configuration),
{steps} DDIM steps, weights `{model}`{autocast}. Value ± standard error (jackknife over ten groups of images).

{table}

Differences, paired by seed:

{differences}

* **Judge**: a convolutional classifier trained on the real training images; it has {judge_accuracy:.2%} of the real
  test images right. Distance and spread are taken on its penultimate layer (128 numbers), against {judge_references}
  real test images.
* **ImageNet**: EfficientNet-Lite0, trained on ImageNet by others, on images enlarged to 128 pixels and inverted (1,280
  numbers), against {imagenet_references} real test images. {images} images determine a covariance in 1,280 dimensions
  poorly, so that this Fréchet distance has a large bias, the same in all rows; the kernel distance (KID) has none.
* **Spread** is the total variance of the features over that of the real test images; below 1 the images are less varied
  than real ones.
* The row of real training images, as many as were generated, is what a perfect model would reach.
"""


def markdown(results: Mapping[str, Any], command: str) -> str:
    """The page for what `benchmarks.quality.measure` returned, made by `command`."""
    settings = results["settings"]
    return PAGE.format(
        command=command,
        images=settings["images"],
        per_class=settings["images"] // 10,
        seed=settings["seed"],
        last=settings["seed"] + settings["images"] - 1,
        steps=settings["steps"],
        model=results["model"],
        autocast=", bfloat16 autocast" if settings["autocast"] else "",
        table=table(results["rows"]),
        differences=table(results["differences"], signed=True),
        judge_accuracy=results["judge"]["test_accuracy"],
        judge_references=f"{results['references']['judge']:,}",
        imagenet_references=f"{results['references']['imagenet']:,}",
    )


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]], signed: bool = False) -> str:
    """A Markdown table: one line for each entry of `rows`, a column for each measure."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        sign = "+" if signed else ""
        cells = [
            f"{row[key]['value']:{sign}.{digits}f} ± {row[key]['error']:.{digits}f}"
            for key, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
