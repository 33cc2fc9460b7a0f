"""What PPAP owes to its experts, as a page of Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from .rows import Row


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the lowest and highest of several trainings."""
    least, most = min(values), max(values)
    if len(values) == 1:
        return f"{least:.{digits}f}"
    return f"{mean(values):.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def by_arm(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """The trainings of each kind, as they guide all of the run."""
    found: dict[str, list[Row]] = {}
    for name, row in rows.items():
        if "scales" in row and "window" not in row:
            found.setdefault(name.partition(",")[0], []).append(row)
    return found


def title(name: str) -> str:
    """`5 of 1500` in words."""
    count, steps = map(int, name.split(" of "))
    return f"{count} expert{'s' * (count > 1)}, {steps // count:,} steps each"


def table(rows: Mapping[str, Row], key: str, digits: int) -> str:
    """One measure by number of experts and scale."""
    arms = by_arm(rows)
    scales = list(next(iter(arms.values()))[0]["scales"])
    lines = ["| | " + " | ".join(f"scale {scale}" for scale in scales) + " |", "| --- " * (len(scales) + 1) + "|"]
    for name, trained in arms.items():
        cells = [spread([row["scales"][scale][key] for row in trained], digits) for scale in scales]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_noise(rows: Mapping[str, Row], name: str, digits: int, of: Any) -> str:
    """A measure of the experts in five ranges of timesteps."""
    lines = [f"| {name} | " + " | ".join(f"{200 * i} to {200 * (i + 1)}" for i in range(5)) + " |", "| --- " * 6 + "|"]
    for arm, trained in by_arm(rows).items():
        cells = [f"{mean(of(row)[index] for row in trained):.{digits}f}" for index in range(5)]
        lines.append(f"| {title(arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def windows(rows: Mapping[str, Row]) -> str:
    """Accuracy and distance where experts guide a part of the run only, beside all of it."""
    parts = [(name.partition(", ")[0], row) for name, row in rows.items() if "window" in row]
    names = list(dict.fromkeys(name for name, _ in parts))
    shown = [(title(name), "all of the run", rows[f"{name}, seed 0"]) for name in names]
    shown += [(title(name), row["window"], row) for name, row in parts]
    scales = list(shown[0][2]["scales"])
    lines = ["| | guided | " + " | ".join(f"scale {scale}" for scale in scales) + " |"]
    lines.append("| --- " * (len(scales) + 2) + "|")
    for name, window, row in sorted(shown, key=lambda one: one[0]):
        cells = [f"{row['scales'][scale]['accuracy']:.2f}, {row['scales'][scale]['frechet']:.0f}" for scale in scales]
        lines.append(f"| {name} | {window} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreed(row: Row) -> list[float]:
    """How often experts and teacher agree, in five ranges of timesteps."""
    shares = [bin_["experts"] for bin_ in row["agreement"]]
    return [mean(shares[2 * index : 2 * index + 2]) for index in range(5)]


def loras(rows: Mapping[str, Row]) -> str:
    """Agreement between timesteps 400 and 600 by rank and learning rate."""
    lines = ["| rank | learning rate | parameters of an expert | agreement |", "| --- " * 4 + "|"]
    for name, row in rows.items():
        if "share" in row:
            rank, rate = name.removeprefix("rank ").split(", rate ")
            lines.append(f"| {rank} | {rate} | {row['share'] / 5:.1%} | {agreed(row)[2]:.2f} |")
    return "\n".join(lines)


PAGE = """# The experts of PPAP measured

Made by

    {command}

The setting of [classifier guidance measured](classifiers.md): {count} images at each scale, the same seeds in all.
Where a kind was trained under several seeds, cells are the mean, with the lowest and the highest. Accuracy of the
requested class:

{accuracy}

Fréchet distance on the judge's features:

{distance}

Accuracy and distance of the first training, where the experts guide a part of the run only:

{windows}

How strongly the experts push, the mean norm of the gradient of log p(c | x_t), by timesteps:

{push}

How often they see in x_t what the teacher sees in x_0:

{agreement}

The same for timesteps 400 to 600 by the LoRAs of five experts, {steps} steps each, one training:

{loras}

"""


def page(rows: Mapping[str, Row], command: str, args: argparse.Namespace) -> str:
    """The page's measured part."""
    return PAGE.format(
        command=command, count=args.count, steps=args.expert_steps // 5,
        accuracy=table(rows, "accuracy", 2), distance=table(rows, "frechet", 1),
        windows=windows(rows), push=by_noise(rows, "timesteps", 2, lambda row: row["push"]),
        agreement=by_noise(rows, "timesteps", 2, agreed), loras=loras(rows),
    )  # fmt: skip
