"""`python -m benchmarks.controls`: learned controls on the emoji models, on drawings that no model has seen.

EasyControl and UniCon with edges, against no control and against the edges of another drawing; UniCon in all its modes;
the Smooth LoRA by the evenness of its steps and by the Fréchet distance. A part is measured if its weights are given.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from trimtab.evaluation.distances import Estimate, Gaussian, frechet_distance, jackknife
from trimtab.evaluation.features import feature_network
from trimtab.pipelines.emoji.data import SIZE, EmojiData, edges
from trimtab.pipelines.emoji.pairs import DrawingPairs, drawing_pairs, picture
from trimtab.pipelines.generate.pictures import Row as Line
from trimtab.pipelines.generate.pictures import sheet
from trimtab.pipelines.interpolate import slerp, spread_of_steps

from .controls_page import page
from .emoji import Attach, Sampler, lines, mean, of_held_out
from .images import light, to_bytes
from .likeness import edge_f1
from .rows import Row, Rows

FRAMES = 9
STRENGTHS = (0.1, 1.0)
PAG = 1.0
TRIGGER, COARSE = "edge_map, ", 0.7

Measured = tuple[Row, Image.Image]
"""The numbers of a part, and its sheet."""


def as_edges(maps: torch.Tensor) -> torch.Tensor:
    """Drawn edge maps `[n, 3, h, w]`, dark on white, as edges in 0..1."""
    return ((1 - maps.mean(1, keepdim=True)) / 2).clamp(0, 1)


def ways_of_easycontrol(weights: Path, pairs: DrawingPairs) -> dict[str, Attach]:
    """Without a condition, with a wrong one, with the right one, and with PAG beside it."""

    def attach(given: torch.Tensor, strength: float = 1.0, pag: float = 0.0) -> Attach:
        def way(pipe: Any, numbers: Sequence[int]) -> None:
            images = [picture(given[i]) for i in numbers]
            pipe.add_guidance("easycontrol", weights=str(weights), image=images, cond_size=SIZE, strength=strength)
            if pag:
                pipe.add_guidance("pag", scale=pag)

        return way

    return {
        "no control": lambda pipe, numbers: None,
        "another drawing's edges": attach(pairs.sources.roll(1, 0)),
        **{f"its edges, strength={strength:g}": attach(pairs.sources, strength) for strength in STRENGTHS},
        f"its edges, and pag scale={PAG:g}": attach(pairs.sources, pag=PAG),
    }


def easycontrol(sampler: Sampler, weights: Path, pairs: DrawingPairs) -> Measured:
    """How well the edges of images follow those that were given."""
    wanted = as_edges(pairs.sources)
    other = wanted.roll(1, 0)
    made = {name: sampler(pairs, way, name)[0] for name, way in ways_of_easycontrol(weights, pairs).items()}
    found = {
        name: {"own": mean(edge_f1(edges(images), wanted)), "other": mean(edge_f1(edges(images), other))}
        for name, images in {**made, "the drawings themselves": pairs.targets}.items()
    }
    shown = {"edges": pairs.sources, **made, "the drawing": pairs.targets}
    return found, lines("EasyControl, held-out drawings", pairs, shown)


def unicon(sampler: Sampler, weights: Path, pairs: DrawingPairs) -> Measured:
    """Edges in each mode: of images against those that were given, and estimated ones against those of the image."""
    others = pairs.sources.roll(1, 0)
    wanted = as_edges(pairs.sources)

    def run(
        mode: str, given: torch.Tensor | None, pag: float = 0.0, **parameters: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def attach(pipe: Any, numbers: Sequence[int]) -> Any:
            if pag:
                pipe.add_guidance("pag", scale=pag)
            image = None if given is None else [picture(given[i]) for i in numbers]
            options = {"trigger": TRIGGER, "noise_strength": COARSE, **parameters}
            return pipe.add_guidance("joint", weights=str(weights), mode=mode, image=image, **options)

        return sampler(pairs, attach, mode)

    def against(found: torch.Tensor, right: torch.Tensor) -> dict[str, list[float]]:
        return {"own": mean(edge_f1(found, right)), "other": mean(edge_f1(found, right.roll(1, 0)))}

    plain = sampler(pairs, lambda pipe, numbers: None, "no control")[0]
    condition, wrong = run("condition", pairs.sources)[0], run("condition", others)[0]
    stronger = run("condition", pairs.sources, signal_scale=1.0)[0]
    perturbed = run("condition", pairs.sources, pag=PAG)[0]
    estimate = run("estimate", pairs.targets)[0]
    both, coarse = run("joint", None), run("coarse", pairs.sources)
    found = {
        "no control": against(edges(plain), wanted),
        "condition: another drawing's edges": against(edges(wrong), wanted),
        "condition: its edges": against(edges(condition), wanted),
        "condition: its edges, signal_scale=1": against(edges(stronger), wanted),
        f"condition: its edges, and pag scale={PAG:g}": against(edges(perturbed), wanted),
        "coarse: its edges": against(edges(coarse[0]), wanted),
        "estimate: edges of the drawing": against(as_edges(estimate), wanted),
        "joint: edges beside the image": against(as_edges(both[1]), edges(both[0])),
        "coarse: edges beside the image": against(as_edges(coarse[1]), edges(coarse[0])),
    }
    shown = {
        "edges": pairs.sources, "no control": plain, "condition": condition, "coarse": coarse[0],
        "coarse: its edges": coarse[1], "joint": both[0], "joint: its edges": both[1],
        "the drawing": pairs.targets, "estimate": estimate,
    }  # fmt: skip
    return found, lines("UniCon, held-out drawings", pairs, shown)


def smooth(
    sampler: Sampler, weights: Path, pairs: DrawingPairs, scales: Sequence[float], ways: int, reference: torch.Tensor
) -> Measured:
    """The evenness of steps between two noises, and the Fréchet distance to drawings, without the LoRA and with it."""
    network = feature_network("efficientnet-lite0")
    drawings = Gaussian(network(to_bytes(reference)))
    found: dict[str, Any] = {}
    strips: dict[str, torch.Tensor] = {}
    for scale in (0.0, *scales):
        name = f"scale={scale:g}"

        def attach(pipe: Any, numbers: Sequence[int], scale: float = scale) -> Any:
            return pipe.add_guidance("smooth", weights=str(weights), scale=scale)

        features = network(to_bytes(sampler(pairs, attach, name)[0]))
        distance = _distance(features, drawings)
        frames = [_way(sampler, pairs.captions[i], i) for i in tqdm(range(ways), desc=name)]
        uneven = torch.tensor([spread_of_steps(to_bytes(one)) for one in frames])
        found[name] = {"istd": mean(uneven), "each": uneven.tolist(), "frechet": [distance.value, distance.replicates]}
        strips |= {f"{name}, way {i}": one for i, one in enumerate(frames[:2])}
    shown = [Line(name, [picture(one) for one in frames]) for name, frames in sorted(strips.items(), key=_by_way)]
    return found, sheet("Smooth, from one noise to another", [f"{i / (FRAMES - 1):g}" for i in range(FRAMES)], shown)


def _distance(features: torch.Tensor, drawings: Gaussian) -> Estimate:
    return jackknife(lambda rows: frechet_distance(Gaussian(features[rows]), drawings), len(features))


def _by_way(strip: tuple[str, Any]) -> str:
    return strip[0].rsplit(" ", 1)[1]


def _way(sampler: Sampler, caption: str, number: int) -> torch.Tensor:
    """The images `[frames, 3, 64, 64]` of one caption between two noises, with what is attached."""
    side = SIZE // sampler.pipe.vae_scale_factor
    shape = (1, sampler.pipe.unet.config.in_channels, side, side)
    first, last = (torch.randn(shape, generator=torch.Generator().manual_seed(2 * number + end)) for end in (0, 1))
    noises = torch.cat([slerp(first, last, w) for w in torch.linspace(0, 1, FRAMES).tolist()])
    return sampler.images([caption] * FRAMES, latents=noises)


def measure(rows: Rows, args: argparse.Namespace) -> None:
    """Fill the parts that are missing, and draw their sheets."""
    pairs = of_held_out(args.data, args.categories, args.count)
    flux = Sampler(args.flux, "true_cfg_scale", args.guidance, args.steps, args.batch)
    sd = Sampler(args.sd, "guidance_scale", args.guidance, args.steps, args.batch)

    def smoothed() -> Measured:
        reference = drawing_pairs(EmojiData(args.data, categories=args.categories), "edges").targets
        return smooth(sd, args.smooth, pairs, args.scales, args.ways, reference)

    parts: dict[str, tuple[Path | None, Callable[[], Measured]]] = {
        "easycontrol": (args.easycontrol, lambda: easycontrol(flux, args.easycontrol, pairs)),
        "joint": (args.unicon, lambda: unicon(sd, args.unicon, pairs)),
        "smooth": (args.smooth, smoothed),
    }
    for name, (weights, part) in parts.items():
        if weights is not None and name not in rows:
            found, drawn = part()
            args.images.mkdir(parents=True, exist_ok=True)
            light(drawn).save(args.images / f"{name}.png", optimize=True)
            rows[name] = found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controls", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji.safetensors"), help="the packed data set")
    parser.add_argument("--flux", type=Path, default=Path("runs/emoji-flux/model"), help="folder of the Flux model")
    parser.add_argument("--sd", type=Path, default=Path("runs/emoji-sd/model"), help="folder of the SD model")
    parser.add_argument("--easycontrol", type=Path, help="LoRA of `trimtab train easycontrol`")
    parser.add_argument("--unicon", type=Path, help="folder of `trimtab train unicon`")
    parser.add_argument("--smooth", type=Path, help="LoRA of `trimtab train smooth`")
    parser.add_argument("--categories", default="", help="of the drawings, with commas between; all, if none is named")
    parser.add_argument("--count", type=int, default=200, help="held-out drawings")
    parser.add_argument("--ways", type=int, default=40, help="pairs of noises between which steps are measured")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the Smooth LoRA")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance")
    parser.add_argument("--batch", type=int, default=25, help="images at once")
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"), help="writes OUTPUT.json and OUTPUT.md")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    settings = {name: getattr(args, name) for name in ("categories", "count", "ways", "scales", "steps", "guidance")}
    rows = Rows(args.output.with_suffix(".json"), settings)
    measure(rows, args)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.controls", *given]), settings)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
