"""`python -m benchmarks.controls`: learned controls on the emoji models, on drawings that no model has seen.

EasyControl and UniCon with edges, against no control and against the edges of another drawing, also beside PAG and a
classifier; UniCon in all its modes; the Smooth LoRA by the evenness of its steps and by the Fréchet distance. A part is
measured if its weights are given.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from trimtab.evaluation.distances import Estimate, Gaussian, frechet_distance, jackknife
from trimtab.evaluation.features import feature_network
from trimtab.pipelines.emoji.data import CATEGORIES, SIZE, EmojiData
from trimtab.pipelines.emoji.pairs import DrawingPairs, drawing_pairs, picture
from trimtab.pipelines.generate.pictures import Row as Line
from trimtab.pipelines.generate.pictures import sheet
from trimtab.pipelines.interpolate import slerp, spread_of_steps

from .controls_edges import Measured, Requested, easycontrol, unicon
from .controls_page import page
from .emoji import Sampler, mean, of_held_out
from .images import light, to_bytes
from .rows import Rows

FRAMES = 9


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

    def controlled() -> Measured:
        data = EmojiData(args.data, held_out=True, categories=args.categories)
        of = {caption: CATEGORIES[number] for caption, number in zip(data.captions, data.categories, strict=True)}
        wanted = [of[caption] for caption in pairs.captions]
        return easycontrol(flux, args.easycontrol, pairs, Requested(wanted, args.guide, args.judge, args.steer))

    def smoothed() -> Measured:
        reference = drawing_pairs(EmojiData(args.data, categories=args.categories), "edges").targets
        return smooth(sd, args.smooth, pairs, args.scales, args.ways, reference)

    parts: dict[str, tuple[Path | None, Callable[[], Measured]]] = {
        "easycontrol": (args.easycontrol, controlled),
        "joint": (args.unicon, lambda: unicon(sd, args.unicon, pairs)),
        "smooth": (args.smooth, smoothed),
    }
    for name, (weights, part) in parts.items():
        if weights is not None and name not in rows:
            found, drawn = part()
            images: Path = args.images or args.output.parent / "images"
            images.mkdir(parents=True, exist_ok=True)
            light(drawn).save(images / f"{name}.png", optimize=True)
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
    parser.add_argument("--guide", default="trimtab/emoji-judge-category-0", help="classifier beside EasyControl")
    parser.add_argument("--judge", default="trimtab/emoji-judge-category-1", help="of the category of its images")
    parser.add_argument("--steer", type=float, default=4.0, help="scale of the classifier that guides")
    parser.add_argument("--categories", default="", help="of the drawings, with commas between; all, if none is named")
    parser.add_argument("--count", type=int, default=200, help="held-out drawings")
    parser.add_argument("--ways", type=int, default=40, help="pairs of noises between which steps are measured")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the Smooth LoRA")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance")
    parser.add_argument("--batch", type=int, default=25, help="images at once")
    parser.add_argument("--images", type=Path, help="folder of the sheets; by default images/ beside OUTPUT.md")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"), help="writes OUTPUT.json and OUTPUT.md")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    kept = ("categories", "count", "ways", "scales", "steps", "guidance", "steer")
    settings = {name: getattr(args, name) for name in kept}
    rows = Rows(args.output.with_suffix(".json"), settings)
    measure(rows, args)
    text = page(rows, shlex.join(["python", "-m", "benchmarks.controls", *given]), settings)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
