"""`python -m benchmarks.pictures`: the pictures on the plug-ins' pages, by the shipped models; with names, only those.

In each picture the columns are seeds and the rows differ in nothing but the guidance. Those of autoguidance and of PPAP
need networks that do not ship: the commands that train them are those of `make evidence` and of the classifiers' page.
Those of learned controls are drawn where these are measured, by `python -m benchmarks.controls`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

import trimtab
from trimtab.evaluation.networks import load_judge
from trimtab.pipelines.fashion.data import CLASS_NAMES
from trimtab.pipelines.generate.pictures import Row, sheet

from .guides import load_guide
from .images import light

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
        label: the class of all images, `None` for none; the prompt, where the model takes one.
        given: a row of images above the others that these are made from, by its label.
        model: which one draws.
        call: further arguments of its call.
    """

    rows: Mapping[str, Guidances]
    label: str | None = "Sandal"
    given: Mapping[str, Sequence[Image.Image]] | None = None
    model: str = "trimtab/fashion"
    call: Mapping[str, Any] = field(default_factory=dict)


@cache
def pipeline(model: str) -> Any:
    """A shipped model, without a bar."""
    pipe = trimtab.GuidedPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(weak: Path, classifiers: Path) -> dict[str, Picture]:
    """Those that need networks which do not ship, where these are.

    Args:
        weak: folder of a weaker version of the Fashion-MNIST model, as `make evidence` trains it.
        classifiers: folder of the networks of `benchmarks.classifiers`.
    """
    found = {}
    if weak.is_dir():
        away = {"autoguidance": {"scale": 1.0, "weak": str(weak)}}
        found["autoguidance"] = Picture({"no guidance": {}, "autoguidance scale=1": away})
    guide, experts = classifiers / "guide.safetensors", classifiers / "ppap-5" / "ppap.safetensors"
    if guide.is_file() and experts.is_file():
        towards = {"classifier": load_guide(guide), "weights": str(experts), "labels": CLASS_NAMES, "target": "Trouser"}
        shown = {"no guidance": {}, "ppap target=Trouser scale=8": {"ppap": {**towards, "scale": 8.0}}}
        found["ppap"] = Picture(shown, None)
    return found


def pictures(seeds: Sequence[int], steps: int) -> dict[str, Picture]:
    """All others, by plug-in."""
    none: dict[str, Guidances] = {"no guidance": {}}
    strong: Guidances = {"cfg": {"scale": 5.0}}
    apg = AdaptiveProjectedGuidance(guidance_scale=8.0, adaptive_projected_guidance_rescale=2.5, eta=0.0)
    # The judge is for figures; a picture shows what guidance by a classifier of clean images looks like.
    classifier = {"classifier": load_judge()[0], "labels": CLASS_NAMES, "target": "Trouser"}
    classifier |= {"scale": 2.0, "tau2": 1.0, "stop": 0.7}
    known, mask = images(Picture({}, "Bag"), [seed + 100 for seed in seeds], steps), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    inpainting = {"task": "inpainting", "image": known, "mask": mask, "recurrence": 3}
    half = Image.fromarray((mask[0, 0] > 0).numpy())
    last = {"scale": 0.7, "layers": "up_blocks.1.attentions.(0|1).transformer_blocks.0", "start": 0.0, "stop": 1.0}
    emoji = {"model": "trimtab/emoji-sd", "call": {"guidance_scale": 3.0}}
    plain = {"model": "trimtab/emoji-sd", "call": {"guidance_scale": 1.0}}
    return {
        "cfg": Picture({**none, "cfg scale=3": {"cfg": {"scale": 3.0}}}, "grinning face, twemoji style", **plain),
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
        "perp_neg": Picture({
            "cfg scale=4": {"cfg": {"scale": 4.0}},
            "perp_neg scale=4 negative_prompt=red": {"perp_neg": {"scale": 4.0, "negative_prompt": "red"}},
        }, "red apple, noto style", **emoji),
        "slg": Picture({
            "guidance_scale=3": {}, "slg scale=0.7, blocks of the last layer": {"slg": last}
        }, "grinning face, twemoji style", **emoji),
        "pag": Picture(
            {**none, "pag scale=2 layers=up": {"pag": {"scale": 2.0, "layers": "up"}}},
            "slightly frowning face, twemoji style", **plain
        ),
        "rescale": Picture(
            {"cfg scale=5": strong, "cfg scale=5, rescale phi=0.7": {**strong, "rescale": {"phi": 0.7}}}, "Pullover"
        ),
        "sag": Picture({**none, "sag scale=1": {"sag": {"scale": 1.0}}}),
        "seg": Picture(
            {**none, "seg scale=1 layers=up": {"seg": {"scale": 1.0, "layers": "up"}}}, "red apple, noto style", **plain
        ),
        "steered": Picture(
            {**none, "steered task=inpainting recurrence=3": {"steered": inpainting}}, "Bag",
            {"what is known": [Image.composite(Image.new("L", one.size, 128), one, half) for one in known]},
        ),
        "tfg": Picture({
            **none, "tfg preset=mpgd mu=0.1, energy: unlike its mirror image":
            {"tfg": {"preset": "mpgd", "mu": 0.1, "energy": asymmetry}},
        }, "Sneaker"),
    }  # fmt: skip


def asymmetry(images: torch.Tensor) -> torch.Tensor:
    """How much each image differs from its mirror image `[batch]`."""
    return (images - images.flip(-1)).square().flatten(1).sum(1) / 2


def images(picture: Picture, seeds: Sequence[int], steps: int) -> list[Image.Image]:
    """An image a seed, with what is attached to the picture's model."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "generator": generators, **picture.call}
    made: list[Image.Image] = pipeline(picture.model)([picture.label] * len(seeds), **call).images
    return made


def made(picture: Picture, seeds: Sequence[int], steps: int) -> dict[str, Sequence[Image.Image]]:
    """The images of each row of a picture, by its label."""
    rows = dict(picture.given or {})
    pipe = pipeline(picture.model)
    for label, guidances in picture.rows.items():
        pipe.clear_guidance()
        for name, parameters in guidances.items():
            pipe.add_guidance(name, **parameters)
        rows[label] = images(picture, seeds, steps)
    pipe.clear_guidance()
    return rows


def draw(picture: Picture, seeds: Sequence[int], steps: int) -> Image.Image:
    """The sheet of a picture, grey if its images are."""
    rows = made(picture, seeds, steps)
    title = f"{picture.label or 'no class'}, {steps} steps, {type(pipeline(picture.model).scheduler).__name__}"
    drawn = sheet(title, [f"seed {seed}" for seed in seeds], [Row(label, row) for label, row in rows.items()])
    grey = all(image.mode == "L" for row in rows.values() for image in row)
    return drawn.convert("L") if grey else light(drawn)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help="plug-ins; by default all of which there is a picture")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder, by default docs/images")
    parser.add_argument("--weak", type=Path, default=Path("runs/evidence/weak/model"), help="for autoguidance")
    parser.add_argument("--classifiers", type=Path, default=Path("runs/classifiers"), help="for ppap")
    args = parser.parse_args(arguments)
    found = {**pictures(SEEDS, STEPS), **trained(args.weak, args.classifiers)}
    if missing := [name for name in args.names if name not in found]:
        parser.error(f"{missing[0]}: there is no picture, or not what it needs; there are: {', '.join(sorted(found))}.")
    for name in args.names or found:
        draw(found[name], SEEDS, STEPS).save(args.output / f"{name}.png", optimize=True)
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
