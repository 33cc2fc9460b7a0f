"""`python -m benchmarks.pictures`: the pictures on the plug-ins' pages, by the embedded model; with names, only those.

In each picture the columns are seeds and the rows differ in nothing but the guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

import trimtab
from trimtab.evaluation.networks import load_judge
from trimtab.pipelines.embedded.data import CLASS_NAMES
from trimtab.pipelines.generate.pictures import Row, sheet

from .images import to_bytes

FOLDER = Path(__file__).parents[1] / "docs" / "images"
SEEDS = range(6)
STEPS = 25

Guidances = Mapping[str, Mapping[str, Any]]
"""Parameters by plug-in."""


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Args:
        rows: the guidances of each row, by its label.
        label: the class of all images, `None` for none.
        given: a row of images above the others that these are made from, by its label.
    """

    rows: Mapping[str, Guidances]
    label: str | None = "Sandal"
    given: Mapping[str, torch.Tensor] | None = None


def pictures(pipe: Any, seeds: Sequence[int], steps: int) -> dict[str, Picture]:
    """All of them, by plug-in."""
    none: dict[str, Guidances] = {"no guidance": {}}
    strong: Guidances = {"cfg": {"scale": 5.0}}
    apg = AdaptiveProjectedGuidance(guidance_scale=8.0, adaptive_projected_guidance_rescale=2.5, eta=0.0)
    # The judge is for figures; a picture shows what guidance by a classifier of clean images looks like.
    classifier = {"classifier": load_judge()[0], "labels": CLASS_NAMES, "target": "Trouser"}
    classifier |= {"scale": 2.0, "tau2": 1.0, "stop": 0.7}
    known, mask = images(pipe, "Bag", [seed + 100 for seed in seeds], steps), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    inpainting = {"task": "inpainting", "image": known, "mask": mask, "recurrence": 3}
    return {
        "cfg": Picture({**none, "cfg scale=2": {"cfg": {"scale": 2.0}}}),
        "cfg_pp": Picture({**none, "cfg_pp scale=0.6": {"cfg_pp": {"scale": 0.6}}}),
        "classifier": Picture(
            {**none, "classifier target=Trouser scale=2 tau2=1 stop=0.7": {"classifier": classifier}}, None
        ),
        "dynamic_threshold": Picture(
            {"cfg scale=5": strong, "cfg scale=5, dynamic_threshold": {**strong, "dynamic_threshold": {}}}, "Pullover"
        ),
        "guider": Picture({
            "cfg scale=8": {"cfg": {"scale": 8.0}},
            "guider: APG, scale 8, rescale 2.5, eta 0": {"guider": {"guider": apg}},
        }, "Pullover"),
        "interval": Picture({
            **none, "cfg scale=4": {"cfg": {"scale": 4.0}}, "interval scale=4": {"interval": {"scale": 4.0}}
        }),
        "pag": Picture({**none, "pag scale=1": {"pag": {"scale": 1.0}}}),
        "rescale": Picture(
            {"cfg scale=5": strong, "cfg scale=5, rescale phi=0.7": {**strong, "rescale": {"phi": 0.7}}}, "Pullover"
        ),
        "sag": Picture({**none, "sag scale=1": {"sag": {"scale": 1.0}}}),
        "seg": Picture({**none, "seg scale=1": {"seg": {"scale": 1.0}}}),
        "steered": Picture(
            {**none, "steered task=inpainting recurrence=3": {"steered": inpainting}}, "Bag",
            {"what is known": torch.where(mask > 0, 0.0, known)},
        ),
        "tfg": Picture({
            **none, "tfg preset=mpgd mu=0.1, energy: unlike its mirror image":
            {"tfg": {"preset": "mpgd", "mu": 0.1, "energy": asymmetry}},
        }, "Sneaker"),
    }  # fmt: skip


def asymmetry(images: torch.Tensor) -> torch.Tensor:
    """How much each image differs from its mirror image `[batch]`."""
    return (images - images.flip(-1)).square().flatten(1).sum(1) / 2


def images(pipe: Any, label: str | None, seeds: Sequence[int], steps: int) -> torch.Tensor:
    """An image a seed, in -1..1, with what is attached to the pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipe([label] * len(seeds), num_inference_steps=steps, generator=generators, output_type="pt").images
    return made.clamp(-1, 1)


def made(pipe: Any, picture: Picture, seeds: Sequence[int], steps: int) -> dict[str, torch.Tensor]:
    """The images of each row of a picture, by its label."""
    rows = dict(picture.given or {})
    for label, guidances in picture.rows.items():
        pipe.clear_guidance()
        for name, parameters in guidances.items():
            pipe.add_guidance(name, **parameters)
        rows[label] = images(pipe, picture.label, seeds, steps)
    pipe.clear_guidance()
    return rows


def draw(pipe: Any, picture: Picture, seeds: Sequence[int], steps: int) -> Image.Image:
    """The sheet of a picture."""
    rows = made(pipe, picture, seeds, steps).items()
    title = f"{picture.label or 'no class'}, {steps} steps, {type(pipe.scheduler).__name__}"
    lines = [Row(label, [Image.fromarray(one.numpy()) for one in to_bytes(row)[:, 0]]) for label, row in rows]
    return sheet(title, [f"seed {seed}" for seed in seeds], lines).convert("L")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help="plug-ins; by default all of which there is a picture")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder, by default docs/images")
    args = parser.parse_args(arguments)
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/embedded")
    pipe.set_progress_bar_config(disable=True)
    found = pictures(pipe, SEEDS, STEPS)
    for name in args.names or found:
        draw(pipe, found[name], SEEDS, STEPS).save(args.output / f"{name}.png", optimize=True)
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
