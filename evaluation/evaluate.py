"""`trimtab evaluate`: a folder of images against a folder of references.

| measure | needs |
| --- | --- |
| Frechet and kernel distance, precision, recall, density, coverage | references |
| accuracy and confidence of the requested class | images of garments with their settings inside, as `generate` writes |
| likeness of image and prompt (CLIP score) | images with their settings inside, and `--clip` |
| PSNR, SSIM | `--pairs`: references with the same file names |

Every value has a 95 % interval by the bootstrap over images, with fixed draws. A set with repetitions is less varied
than one without, so the interval of the Frechet distance lies high.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..pipelines.embedded.data import CLASS_NAMES
from ..pipelines.generate import pictures
from .coverage import Coverage
from .distances import Gaussian, Interval, KernelDistance, bootstrap, frechet_distance
from .features import EvaluationError, as_garments, feature_network
from .networks import load_judge

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pictures:
    """A folder of images: their names, their bytes `[n, 3, height, width]`, and the settings inside each (or none)."""

    folder: Path
    names: tuple[str, ...]
    images: torch.Tensor
    settings: tuple[Mapping[str, Any], ...]


def read_folder(folder: Path) -> Pictures:
    """All images of a folder, in the order of their names.

    Raises:
        EvaluationError: there is none, or they differ in size.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not files:
        raise EvaluationError(f"{folder} holds no images ({', '.join(ENDINGS)}).")
    images, settings = [], []
    for file in tqdm(files, desc=f"read {folder.name}", leave=False):
        with Image.open(file) as opened:
            images.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise EvaluationError(
                f"{file}: {tuple(images[-1].shape[1:])} pixels, {files[0].name} {images[0].shape[1:]}."
            )
        try:
            settings.append(pictures.load(file)[1])
        except pictures.PictureError:
            settings.append({})
    return Pictures(folder, tuple(file.name for file in files), torch.stack(images), tuple(settings))


def evaluate(
    images: Pictures,
    reference: Pictures | None = None,
    features: str = "judge",
    pairs: Pictures | None = None,
    clip: str | None = None,
    repetitions: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures for which there is what they need.

    Args:
        images: what is evaluated.
        reference: what they should be like, as a set.
        features: see `feature_network`.
        pairs: what each of them should be like, by file name.
        clip: folder or repository of a CLIP.
        repetitions, seed: of the bootstrap.

    Raises:
        EvaluationError: nothing to compare with, or things that cannot be compared.
    """
    found: dict[str, Interval] = {}
    count = len(images.images)

    def add(name: str, statistic: Callable[[torch.Tensor], float], over: int = count) -> None:
        found[name] = bootstrap(statistic, over, repetitions, seed)

    about: dict[str, Any] = {"images": str(images.folder), "count": count, "repetitions": repetitions, "seed": seed}
    if reference is not None:
        network = feature_network(features)
        here, there = network(images.images, "images"), network(reference.images, "reference")
        real, kernel = Gaussian(there), KernelDistance(there)
        cover = Coverage(here, there)
        about |= {"reference": str(reference.folder), "reference_count": len(there), "features": network.title}
        add("frechet_distance", lambda rows: frechet_distance(Gaussian(here[rows]), real))
        # Drawn twice, an image is its own nearest neighbour; kernels of a pair with itself stay out.
        add("kernel_distance", kernel.resampled(here))
        add("precision", cover.precision)
        add("recall", cover.recall, over=len(there))
        add("density", cover.density)
        add("coverage", cover.coverage)
    for name, values in _of_each(images, pairs, clip).items():
        add(name, _mean_of(values))
    if not found:
        raise EvaluationError(
            "nothing to measure: give --reference FOLDER, --pairs FOLDER or --clip MODEL, or images of garments that "
            "trimtab generate --class-balanced N made."
        )
    return {"about": about, "measures": {name: asdict(interval) for name, interval in found.items()}}


def _mean_of(values: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda rows: values[rows].double().mean().item()


def _of_each(images: Pictures, pairs: Pictures | None, clip: str | None) -> dict[str, torch.Tensor]:
    """Measures that each image has by itself, `[n]`."""
    found: dict[str, torch.Tensor] = {}
    lowered = [name.lower() for name in CLASS_NAMES]
    labels = [str(settings.get("class_label") or "").lower() for settings in images.settings]
    if all(label in lowered for label in labels):
        judge, _ = load_judge()
        wanted = torch.tensor([lowered.index(label) for label in labels])
        with torch.no_grad():
            probabilities = torch.cat([judge(as_garments(batch)).softmax(1) for batch in images.images.split(250)])
        found["accuracy"] = probabilities.argmax(1) == wanted
        found["confidence"] = probabilities[torch.arange(len(wanted)), wanted]
    if clip is not None:
        found["clip_score"] = _clip_scores(images, clip)
    if pairs is not None:
        found |= _likeness(images, pairs)
    return found


def _clip_scores(images: Pictures, source: str) -> torch.Tensor:
    """`100 max(0, cos(image, prompt))` of each image (Hessel et al., 2021, without its factor of 2.5)."""
    from transformers import CLIPModel, CLIPProcessor

    prompts = [settings.get("prompt") for settings in images.settings]
    if not all(prompts):
        raise EvaluationError(f"--clip: {images.folder} holds images that do not say their prompt.")
    model, processor = CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)
    scores = []
    for start in tqdm(range(0, len(prompts), 50), desc="clip score", leave=False):
        batch = images.images[start : start + 50]
        inputs = processor(
            text=prompts[start : start + 50], images=list(batch), return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            output = model(**inputs)
        scores.append(100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).clamp_min(0))
    return torch.cat(scores)


def _likeness(images: Pictures, pairs: Pictures) -> dict[str, torch.Tensor]:
    """PSNR in dB and SSIM of each image against the one of its name, by torchmetrics."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise EvaluationError("--pairs: pip install 'trimtab[evaluate]' for PSNR and SSIM.") from error
    if missing := set(images.names) - set(pairs.names):
        raise EvaluationError(f"--pairs: {pairs.folder} holds no {sorted(missing)[0]} ({len(missing)} missing).")
    if images.images.shape[1:] != pairs.images.shape[1:]:
        raise EvaluationError("--pairs: the images differ in size.")
    order = [pairs.names.index(name) for name in images.names]
    ours, theirs = (tensor.float() / 255 for tensor in (images.images, pairs.images[order]))
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(ssim, torch.Tensor)
    return {"psnr": psnr, "ssim": ssim}


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    about = result["about"]
    lines = [f"{about['images']}: {about['count']} images"]
    if "reference" in about:
        lines.append(
            f"against {about['reference']}: {about['reference_count']} images, features of {about['features']}"
        )
    for name, one in result["measures"].items():
        lines.append(f"  {name:<17} {one['value']:10.4f}   ({one['low']:.4f} to {one['high']:.4f})")
    return "\n".join(lines)
