"""The measurement of projections in latent space as a page of Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from .rows import Row, interval

BOUND = "the autoencoder, given the image"
TITLES = (
    "PSNR of what was measured, dB", "its error, root mean square", "PSNR of what was missing, dB",
    "evaluations", "decodings", "differentiated", "encodings", "core seconds an image",
)  # fmt: skip


def table(rows: Mapping[str, Row], title: str) -> str:
    """The lines of one task."""
    lines = [f"| | {' | '.join(TITLES)} |", "| --- " * (1 + len(TITLES)) + "|"]
    for key, row in rows.items():
        if not key.startswith(f"{title}: "):
            continue
        name = key.removeprefix(f"{title}: ")
        weight = f" (weight {row['weight']:g})" if row["weight"] else ""
        cells = [interval(*row["known"], 1), f"{row['error']:.3f}", interval(*row["missing"], 1)]
        cells += [str(row["evaluations"]), *map(str, row["passes"]), f"{row['seconds']:.2f}"]
        lines.append(f"| {name}{weight} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# Projections in latent space measured

Made by

    {command}

{count} held-out emoji, {steps} DDIM steps, guidance scale {scale:g}, {trained}; values with their 95%
intervals. Denoiser evaluations and passes of the autoencoder are those of one image; the last decoding is the
pipeline's own. The weight of the loss is that of {weights} with the lowest error on {tuning} training images.

{tables}
"""


def page(
    rows: Mapping[str, Row], titles: Sequence[str], weights: Sequence[float], command: str, args: argparse.Namespace
) -> str:
    """The page of the tasks with these titles."""
    tables = "\n\n".join(f"## {title}\n\n{table(rows, title)}" for title in titles)
    return PAGE.format(
        command=command, count=args.count, steps=args.steps, scale=args.guidance_scale, trained=args.trained,
        tables=tables, tuning=args.tuning, weights=", ".join(f"{weight:g}" for weight in weights),
    )  # fmt: skip
