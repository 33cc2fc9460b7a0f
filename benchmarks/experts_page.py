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
    return _by_kind({name: row for name, row in rows.items() if "push" in row})


def by_mixture(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """The mixtures of each kind, one of each seed."""
    return _by_kind({name: row for name, row in rows.items() if "scales" in row and "push" not in row})


def _by_kind(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for name, row in rows.items():
        found.setdefault(name.rpartition(", seed ")[0], []).append(row)
    return found


def title(name: str) -> str:
    """`5 of 1500` in words."""
    count, steps = map(int, name.split(" of "))
    return f"{count} expert{'s' * (count > 1)}, {steps // count:,} steps each"


def table(kinds: Mapping[str, Sequence[Row]], key: str, digits: int) -> str:
    """One measure by kind, as it is to be read, and scale."""
    scales = list(next(iter(kinds.values()))[0]["scales"])
    lines = ["| | " + " | ".join(f"scale {scale}" for scale in scales) + " |", "| --- " * (len(scales) + 1) + "|"]
    for name, trained in kinds.items():
        cells = [spread([row["scales"][scale][key] for row in trained], digits) for scale in scales]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mixed(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """The mixtures, under each of the two that they are made of."""
    arms, mixtures = by_arm(rows), by_mixture(rows)
    found = {}
    for count in ("1", "5"):
        scales = list(next(iter(mixtures.values()))[0]["scales"])
        short = next(arm for arm in arms if arm.startswith(f"{count} of "))
        plain = [{**row, "scales": {scale: row["scales"][scale] for scale in scales}} for row in arms[short]]
        found[f"{count} expert{'s' * (count != '1')}"] = plain
        found |= {name: trained for name, trained in mixtures.items() if name.startswith(f"{count} ")}
    return found


def by_noise(rows: Mapping[str, Row], name: str, digits: int, of: Any) -> str:
    """A measure of the experts in five ranges of timesteps."""
    lines = [f"| {name} | " + " | ".join(f"{200 * i} to {200 * (i + 1)}" for i in range(5)) + " |", "| --- " * 6 + "|"]
    for arm, trained in by_arm(rows).items():
        cells = [f"{mean(of(row)[index] for row in trained):.{digits}f}" for index in range(5)]
        lines.append(f"| {title(arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_exact(rows: Mapping[str, Row]) -> str:
    """How strongly the experts push in the two noisiest fifths, and how strongly they should."""
    head = "| | 600 to 800: size | exact size | cosine | 800 to 1000: size | exact size | cosine |"
    lines = [head, "| --- " * 7 + "|"]
    for name, trained in by_arm(rows).items():
        cells = []
        for index in (0, 1):
            cells += [
                spread([row["push"][3 + index] for row in trained], 2),
                f"{mean(row['exact'][index] for row in trained):.2f}",
                spread([row["cosine"][index] for row in trained], 2),
            ]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
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

Beside the distance: how far the mean features of a requested class are from those of the real class (squared, mean
over classes),

{means}

how much the images of one requested class vary, as a share of the variance of real ones, those of another class
included,

{within}

and the same of images, made and real, in which the judge sees the class:

{right}

## Mixtures

One expert, but five in a part of the run, and the other way round. "As weak there as 5's": in the noisiest fifth the
one's push is multiplied by what makes its mean norm that of the five's. Accuracy:

{mixed_accuracy}

Fréchet distance:

{mixed_distance}

How much the images in which the judge sees the requested class vary, as a share:

{mixed_right}

## Pushes

How strongly the experts push, the mean norm of the gradient of log p(c | x_t), by timesteps:

{push}

And beside the exact gradient for the images that the experts learnt from, where there is much noise (at little noise
one image has all of the weight, and nothing is left of it):

{exact}

How often they see in x_t what the teacher sees in x_0:

{agreement}

The same for timesteps 400 to 600 by the LoRAs of five experts, {steps} steps each, one training:

{loras}

"""


def page(rows: Mapping[str, Row], command: str, args: argparse.Namespace) -> str:
    """The page's measured part."""
    arms = {title(name): trained for name, trained in by_arm(rows).items()}
    mixtures = mixed(rows)
    return PAGE.format(
        command=command, count=args.count, steps=args.expert_steps // 5,
        accuracy=table(arms, "accuracy", 2), distance=table(arms, "frechet", 1),
        means=table(arms, "class_means", 0), within=table(arms, "within", 2),
        right=table(arms, "within_right", 2),
        mixed_accuracy=table(mixtures, "accuracy", 2), mixed_distance=table(mixtures, "frechet", 1),
        mixed_right=table(mixtures, "within_right", 2),
        push=by_noise(rows, "timesteps", 2, lambda row: row["push"]), exact=beside_exact(rows),
        agreement=by_noise(rows, "timesteps", 2, agreed), loras=loras(rows),
    )  # fmt: skip
