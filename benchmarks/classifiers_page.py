"""The measurement of classifier guidance as a page of Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from trimtab.evaluation.distances import Estimate

from .rows import Row, interval

DIFFERENCES = (
    ("+ softplus", "plain classifier"),
    ("+ temperatures", "+ softplus"),
    ("+ sine schedule (EluCD)", "+ temperatures"),
    ("+ sine schedule (EluCD)", "plain classifier"),
    ("+ sine schedule (EluCD)", "no guidance"),
    ("PPAP, 5 experts", "clean classifier at x_t"),
    ("PPAP, 5 experts", "PPAP, 1 expert"),
    ("noise-aware classifier at x_t", "PPAP, 5 experts"),
)


def estimate(row: Row, key: str) -> Estimate:
    """A measure of a row."""
    value, replicates = row[key]
    return Estimate(value, tuple(replicates))


def table(rows: Mapping[str, Row]) -> str:
    """The page's table."""
    lines = ["| | scale | accuracy of the requested class | Fréchet distance, judge |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        accuracy, frechet = (estimate(row, key) for key in ("accuracy", "frechet"))
        lines.append(
            f"| {name} | {row['scale']:g} | {interval(accuracy.value, accuracy.error, 3)} | "
            f"{interval(frechet.value, frechet.error, 1)} |"
        )
    return "\n".join(lines)


def differences(rows: Mapping[str, Row]) -> str:
    """Pairs of rows, compared seed by seed."""
    lines = ["| | accuracy | Fréchet distance |", "| --- | --- | --- |"]
    for a, b in [pair for pair in DIFFERENCES if set(pair) <= set(rows)]:
        accuracy, frechet = (estimate(rows[a], key) - estimate(rows[b], key) for key in ("accuracy", "frechet"))
        lines.append(
            f"| {a} minus {b} | {interval(accuracy.value, accuracy.error, 3)} | "
            f"{interval(frechet.value, frechet.error, 1)} |"
        )
    return "\n".join(lines)


def tried(rows: Mapping[str, Row]) -> str:
    """The distance at each scale that was tried, by powers of two."""
    scales = sorted({float(scale) for row in rows.values() for scale in row["tried"]})
    lines = ["| | " + " | ".join(f"{scale:g}" for scale in scales) + " |", "| --- " * (len(scales) + 1) + "|"]
    for name, row in rows.items():
        found = {float(scale): distance for scale, distance in row["tried"].items()}
        best = min(found, key=found.__getitem__)
        cells = [f"{'**' * (s == best)}{found[s]:.0f}{'**' * (s == best)}" if s in found else "" for s in scales]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreements(rows: Mapping[str, Row]) -> str:
    """How often the experts name the teacher's class, by noise."""
    taught = {name: row["agreement"] for name, row in rows.items() if "agreement" in row}
    first = next(iter(taught.values()))
    lines = [
        "| timesteps | the clean classifier itself | " + " | ".join(taught) + " |",
        "| --- " * (len(taught) + 2) + "|",
    ]
    for index, bin_ in enumerate(first):
        cells = [f"{rows[index]['experts']:.2f}" for rows in taught.values()]
        low, high = bin_["timesteps"]
        lines.append(f"| {low} to {high} | {bin_['untaught']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# Classifier guidance measured

Made by

    {command}

{count} images a row, {steps} denoising steps{autocast}, the same seeds in every row, classes in turn; values with their
95% intervals (jackknife over ten groups of images).

{table}

The scale is that with the lowest distance of {tuning} images of other seeds:

{tried}

Differences, paired by seed:

{differences}

How often the experts see in x_t the class that the clean classifier sees in x_0, on images that the model generated:

{agreements}

Each expert has {each:.1%} of the classifier's {parameters:,} parameters, which is what is trained at a time; five have
{five:.1%}.

"""


def page(rows: Mapping[str, Row], command: str, args: argparse.Namespace) -> str:
    """The page's measured part."""
    most = rows["PPAP, 5 experts"]
    return PAGE.format(
        command=command, count=args.count, steps=args.steps, autocast=", in bfloat16" if args.autocast else "",
        table=table(rows), tried=tried(rows), tuning=args.tuning, differences=differences(rows),
        agreements=agreements(rows),
        each=most["trainable_share"] / 5, five=most["trainable_share"], parameters=most["base_parameters"],
    )  # fmt: skip
