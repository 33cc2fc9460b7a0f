"""`python -m benchmarks.text_models`: what the emoji models draw, of captions that they have not seen.

A sheet of eight prompts by eight seeds. And for each scale of classifier-free guidance one image of each held-out
caption: the Fréchet distance to the held-out drawings on the features of a judge that guides nothing, and how well
image and caption fit by the pair of encoders. A model is drawn if its folder is given, and measured if judge and pair
are.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from trimtab.evaluation.distances import Gaussian, frechet_distance, jackknife
from trimtab.evaluation.each import Measure, clip_score
from trimtab.evaluation.features import FeatureNetwork, feature_network
from trimtab.evaluation.folders import Batch
from trimtab.pipelines.emoji.pairs import DrawingPairs, picture
from trimtab.pipelines.generate.pictures import Row as Line
from trimtab.pipelines.generate.pictures import sheet

from .emoji import Sampler, mean, of_held_out
from .images import light, to_bytes
from .rows import Row, Rows
from .text_models_page import page

SCALES = tuple(range(1, 9))
SEEDS = range(8)
PROMPTS = (
    "red apple, noto style", "grinning face, twemoji style", "green apple, fluent style", "blue heart, noto style",
    "lemon, twemoji style", "frog face, noto style", "brown heart, fluent style",
    "slightly frowning face, twemoji style",
)  # fmt: skip


def quality(images: torch.Tensor, pairs: DrawingPairs, network: FeatureNetwork, fit: Measure) -> Row:
    """The numbers of a set of images, one a caption.

    Args:
        images: `[n, 3, height, width]` in -1..1.
        pairs: the drawings of these captions.
        network: for the Fréchet distance.
        fit: `clip_score`.
    """

    @torch.no_grad()
    def score(captions: Sequence[str]) -> list[float]:
        settings = tuple({"prompt": caption} for caption in captions)
        return mean(fit(Batch(tuple(captions), to_bytes(images), settings))["clip_score"])

    drawings, features = Gaussian(network(to_bytes(pairs.targets))), network(to_bytes(images))
    distance = jackknife(lambda rows: frechet_distance(Gaussian(features[rows]), drawings), len(features))
    return {
        "frechet": [distance.value, distance.replicates],
        "score": score(pairs.captions),
        # The score of a caption that is not the image's says how low a score can be.
        "other": score([*pairs.captions[1:], pairs.captions[0]]),
    }


def drawn(sampler: Sampler) -> Image.Image:
    """Eight prompts by eight seeds."""
    lines = []
    for prompt in tqdm(PROMPTS, desc="sheet"):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        images = sampler.images([prompt] * len(SEEDS), generator=generators)
        lines.append(Line(prompt, [picture(image) for image in images]))
    title = f"{sampler.model.name}, guidance {sampler.guidance:g}, {sampler.steps} steps"
    return sheet(title, [f"seed {seed}" for seed in SEEDS], lines)


def measure(rows: Rows, args: argparse.Namespace) -> None:
    """Draw the sheets, and fill the rows that are missing."""
    samplers = [
        (name, Sampler(model, scale, args.guidance, args.steps, args.batch))
        for name, model, scale in (("sd", args.sd, "guidance_scale"), ("flux", args.flux, "true_cfg_scale"))
        if model is not None
    ]
    args.images.mkdir(parents=True, exist_ok=True)
    for name, sampler in samplers:
        light(drawn(sampler)).save(args.images / f"emoji-{name}.png", optimize=True)
    if not (args.features and args.clip):
        return
    pairs = of_held_out(args.data, args.categories, args.count)
    network, fit = feature_network(args.features), clip_score(args.clip)
    for name, sampler in samplers:
        for guidance in args.scales:
            label = f"{name} {guidance:g}"
            if label not in rows:
                images, _ = replace(sampler, guidance=guidance)(pairs, lambda pipe, numbers: None, label)
                rows[label] = quality(images, pairs, network, fit)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_models", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji.safetensors"), help="the packed data set")
    parser.add_argument("--sd", type=Path, help="folder of the model in Stable Diffusion format")
    parser.add_argument("--flux", type=Path, help="folder of the model in Flux format")
    parser.add_argument("--features", help="folder of a judge, or another name of a feature network")
    parser.add_argument("--clip", help="folder of `trimtab train emoji-clip`")
    parser.add_argument("--categories", default="", help="of the captions, with commas between; all, if none is named")
    parser.add_argument("--count", type=int, default=500, help="held-out captions")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of classifier-free guidance")
    parser.add_argument("--guidance", type=float, default=4.0, help="the scale of the sheets")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch", type=int, default=25, help="images at once")
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--output", type=Path, default=Path("runs/text-models"), help="writes OUTPUT.json and .md")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    settings = {name: getattr(args, name) for name in ("categories", "count", "steps", "guidance")}
    rows = Rows(args.output.with_suffix(".json"), settings)
    measure(rows, args)
    shown = [name for name in ("sd", "flux") if getattr(args, name) is not None]
    text = page(shown, rows, shlex.join(["python", "-m", "benchmarks.text_models", *given]), settings)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
