"""`python -m benchmarks.quality`: what guidance does to the images of the Fashion-MNIST model.

The same seeds and classes in every configuration; every measure with the standard error of a grouped jackknife, and the
differences paired by seed. Images and features are cached under `--cache` by the model's hash and the settings, a batch
at a time, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from trimtab.evaluation.distances import Estimate, Gaussian, KernelDistance, frechet_distance, jackknife
from trimtab.evaluation.networks import JUDGE_FILE, in_batches, load_efficientnet, load_judge
from trimtab.pipelines.fashion import MODEL_FOLDER
from trimtab.pipelines.fashion.data import CLASS_NAMES, load

from .images import contact_sheet, from_bytes, real_images, to_bytes
from .report import markdown

REAL = "real training images"
CONFIGURATION = re.compile(r"(?P<name>[a-z_0-9]+)=(?P<scale>\d+(\.\d+)?)(@(?P<layers>[^@+=]+))?")


@dataclass(frozen=True)
class Settings:
    """What a measurement is made of."""

    model: str = str(MODEL_FOLDER)
    configurations: tuple[str, ...] = ("none", "cfg=2", "pag=1", "cfg=2+pag=1")
    images: int = 2000
    steps: int = 25
    seed: int = 0
    batch: int = 100
    references: int = 10_000
    imagenet_references: int = 5000
    autocast: bool = False
    data: str | None = None
    cache: str = "runs/quality"
    judge: str = str(JUDGE_FILE)


def parse_configuration(text: str) -> dict[str, dict[str, Any]]:
    """`"cfg=2+pag=1@down,mid"` as `{"cfg": {"scale": 2.0}, "pag": {"scale": 1.0, "layers": ("down", "mid")}}`.

    `"none"` is no guidance.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    if text == "none":
        return {}
    guidances: dict[str, dict[str, Any]] = {}
    for part in text.split("+"):
        match = CONFIGURATION.fullmatch(part)
        if match is None or match["name"] in guidances:
            raise ValueError(
                f"configuration {text!r} is not understood at {part!r}; allowed: 'none', or 'NAME=SCALE' or "
                "'NAME=SCALE@LAYERS', joined by '+', each name once."
            )
        layers = {"layers": tuple(match["layers"].split(","))} if match["layers"] else {}
        guidances[match["name"]] = {"scale": float(match["scale"]), **layers}
    return guidances


def model_hash(folder: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a saved pipeline's weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def generate(pipe: Any, configuration: str, settings: Settings, file: Path) -> torch.Tensor:
    """The images of one configuration as bytes `[n, 1, 32, 32]`; image i is of class i modulo 10, with seed + i."""
    pipe.clear_guidance()
    for name, parameters in parse_configuration(configuration).items():
        pipe.add_guidance(name, **parameters)
    shape = (0, 1, 32, 32)
    images = load_file(file)["images"] if file.exists() else torch.empty(shape, dtype=torch.uint8)
    with tqdm(total=settings.images, initial=len(images), desc=configuration) as bar:
        while len(images) < settings.images:
            indices = range(len(images), min(len(images) + settings.batch, settings.images))
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=settings.autocast):
                batch = pipe(
                    class_labels=[index % len(CLASS_NAMES) for index in indices],
                    generator=[torch.Generator().manual_seed(settings.seed + index) for index in indices],
                    num_inference_steps=settings.steps,
                    output_type="pt",
                ).images
            images = torch.cat([images, to_bytes(batch.cpu())])
            _save({"images": images}, file)
            bar.update(len(indices))
    return images


class Measurement:
    """The measures of a set of images against the real test images."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = Path(settings.cache)
        self.judge, self.about_judge = load_judge(Path(settings.judge), settings.data)
        self.efficientnet = load_efficientnet()
        test_images, _ = load("t10k", settings.data)
        self.real = Gaussian(in_batches(self.judge.features, test_images[: settings.references], "real, judge"))
        file = self.cache / f"real-test-{settings.imagenet_references}.imagenet.safetensors"
        features = _cached(file, lambda: self._imagenet(test_images[: settings.imagenet_references], "real, ImageNet"))
        self.imagenet_real, self.imagenet_kernel = Gaussian(features), KernelDistance(features)

    def __call__(self, images: torch.Tensor, name: str, file: Path) -> dict[str, Estimate]:
        """Measure images given as bytes `[n, 1, 32, 32]`, in rows of one of each class.

        Args:
            name: for the progress bar.
            file: where their ImageNet features are kept.
        """
        pixels = from_bytes(images)
        features = in_batches(self.judge.features, pixels, f"{name}, judge")
        with torch.inference_mode():
            right = self.judge.head(features).argmax(1) == torch.arange(len(pixels)) % len(CLASS_NAMES)
        imagenet = _cached(file, lambda: self._imagenet(pixels, f"{name}, ImageNet"))
        statistics: dict[str, Callable[[torch.Tensor], float]] = {
            "accuracy": lambda rows: right[rows].double().mean().item(),
            "frechet": lambda rows: frechet_distance(Gaussian(features[rows]), self.real),
            "spread": lambda rows: Gaussian(features[rows]).spread / self.real.spread,
            "imagenet_frechet": lambda rows: frechet_distance(Gaussian(imagenet[rows]), self.imagenet_real),
            "imagenet_kernel": self.imagenet_kernel.statistic(imagenet),
            "imagenet_spread": lambda rows: imagenet[rows].double().var(0).sum().item() / self.imagenet_real.spread,
        }
        bar = tqdm(statistics.items(), desc=f"{name}, measures", leave=False)
        return {key: jackknife(statistic, len(pixels), strata=len(CLASS_NAMES)) for key, statistic in bar}

    def _imagenet(self, images: torch.Tensor, what: str) -> torch.Tensor:
        return in_batches(self.efficientnet, images, what, size=50)


def measure(settings: Settings) -> dict[str, Any]:
    """Generate and measure every configuration; returns what the report is made of."""
    import trimtab

    for configuration in settings.configurations:
        parse_configuration(configuration)
    pipe = trimtab.GuidedPipeline.from_pretrained(settings.model)
    pipe.set_progress_bar_config(disable=True)
    weights = model_hash(settings.model)
    cache = Path(settings.cache)
    suffix = f"{settings.images}x{settings.steps}-seed{settings.seed}{'-bf16' * settings.autocast}-{weights}"
    caches = {name: cache / f"{name}-{suffix}.safetensors" for name in settings.configurations}
    images = {name: generate(pipe, name, settings, file) for name, file in caches.items()}

    images = {REAL: real_images(settings.images, settings.data), **images}
    caches[REAL] = cache / f"real-train-{settings.images}.safetensors"
    measurement = Measurement(settings)
    rows = {
        name: measurement(pixels, name, caches[name].with_suffix(".imagenet.safetensors"))
        for name, pixels in images.items()
    }
    contact_sheet(images, columns=2 * len(CLASS_NAMES)).save(cache / f"sheet-{suffix}.png")
    return {
        "model": weights,
        "settings": {key: getattr(settings, key) for key in ("images", "steps", "seed", "autocast")},
        "references": {"judge": settings.references, "imagenet": settings.imagenet_references},
        "judge": measurement.about_judge,
        "versions": {"trimtab": getattr(trimtab, "__version__", None), "torch": torch.__version__},
        "rows": {name: _plain(row) for name, row in rows.items()},
        "differences": differences(rows),
    }


def differences(rows: Mapping[str, dict[str, Estimate]]) -> dict[str, dict[str, dict[str, float]]]:
    """What one guidance more changes: each configuration minus each that has one guidance less and else the same."""
    parsed = {name: set(name.split("+")) - {"none"} for name in rows if name != REAL}
    pairs = [(a, b) for a in parsed for b in parsed if parsed[b] < parsed[a] and len(parsed[a] - parsed[b]) == 1]
    return {f"{a} minus {b}": _plain({key: rows[a][key] - rows[b][key] for key in rows[a]}) for a, b in pairs}


def _plain(row: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {key: {"value": estimate.value, "error": estimate.error} for key, estimate in row.items()}


def _cached(file: Path, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    if not file.exists():
        _save({"features": compute()}, file)
    return load_file(file)["features"]


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write the whole file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".part")
    save_file(tensors, unfinished)
    unfinished.replace(file)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("configurations", nargs="*", default=default.configurations, help="such as none cfg=2+pag=1")
    parser.add_argument("--model", default=default.model, help="a saved pipeline; by default the Fashion-MNIST one")
    parser.add_argument("--images", type=int, default=default.images, help="images a configuration, a multiple of 100")
    parser.add_argument("--steps", type=int, default=default.steps, help="denoising steps")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the first image")
    parser.add_argument("--batch", type=int, default=default.batch, help="images generated at once")
    parser.add_argument("--references", type=int, default=default.references, help="real images for the judge")
    parser.add_argument("--imagenet-references", type=int, default=default.imagenet_references, help="and ImageNet's")
    parser.add_argument("--autocast", action="store_true", help="denoise in bfloat16")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--cache", default=default.cache, help="folder of images and features")
    parser.add_argument("--judge", default=default.judge, help="weights of the judge; trained where missing")
    parser.add_argument("--output", default="docs/quality", help="writes OUTPUT.json and OUTPUT.md")
    given = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(given))
    output = Path(options.pop("output"))
    if options["images"] < 100 or options["images"] % 100:
        parser.error(f"--images {options['images']}: ten classes in ten groups need a multiple of 100.")
    results = measure(Settings(**{**options, "configurations": tuple(options["configurations"])}))
    page = markdown(results, shlex.join(["python", "-m", "benchmarks.quality", *given]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    output.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
