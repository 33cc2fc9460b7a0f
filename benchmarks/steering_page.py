"""The measurement of steering as a page of Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from .rows import Row, interval, paired, signed

BASELINES = ("no guidance", "plain replacement", "DPS")
"""The methods that others are compared with, image by image."""


def table(rows: Mapping[str, Row], task: str) -> str:
    """The lines of one task."""
    lines = ["| | PSNR, dB | SSIM | accuracy of the class | largest error of the measurement | core seconds an image |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for key, row in rows.items():
        if not key.startswith(f"{task}: "):
            continue
        weight = f" (weight {row['weight']:g})" if row["weight"] else ""
        cells = [interval(*row[name], digits) for name, digits in (("psnr", 2), ("ssim", 3), ("accuracy", 3))]
        cells += [f"{row['residual']:.1g}", f"{row['seconds']:.2f}"]
        lines.append(f"| {key.removeprefix(f'{task}: ')}{weight} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(rows: Mapping[str, Row], task: str) -> str:
    """PSNR of each method minus that of each baseline, image by image."""
    each = {key.removeprefix(f"{task}: "): row["each"] for key, row in rows.items() if key.startswith(f"{task}: ")}
    lines = ["| PSNR, dB | " + " | ".join(f"minus {name}" for name in BASELINES) + " |", "| --- " * 4 + "|"]
    for method, values in list(each.items())[1:]:
        others = BASELINES[: BASELINES.index(method)] if method in BASELINES else BASELINES
        cells = [signed(*paired(values, each[name]), 2) for name in others] + [""] * (len(BASELINES) - len(others))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# Steering measured

Made by

    {command}

{count} real test images, which the model has not seen; {steps} denoising steps{autocast}; values with their 95%
intervals. The judge has {real} of the real images right. Weights of gradients: those of {weights} with the best
PSNR on {tuning} training images.

## The right half from the left half

PSNR and SSIM of the right half.

{inpainting}

Differences, image by image:

{inpainting_differences}

## 32x32 from 8x8

{super_resolution}

Differences, image by image:

{super_resolution_differences}

"""


def page(rows: Mapping[str, Row], command: str, args: argparse.Namespace, weights: Sequence[float]) -> str:
    """The page's measured part."""
    return PAGE.format(
        command=command, count=args.count, steps=args.steps, tuning=args.tuning,
        autocast=", in bfloat16" if args.autocast else "",
        real=f"{rows['real images']['accuracy'][0]:.1%}",
        weights=", ".join(f"{weight:g}" for weight in weights),
        inpainting=table(rows, "inpainting"), super_resolution=table(rows, "super-resolution"),
        inpainting_differences=differences(rows, "inpainting"),
        super_resolution_differences=differences(rows, "super-resolution"),
    )  # fmt: skip
