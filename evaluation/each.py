"""Measures that each image has by itself: functions of a batch, each value `[n]`.

| measure | function |
| --- | --- |
| accuracy and confidence of the requested class | `garments` |
| CLIP score | `clip_score` |
| PSNR, SSIM, LPIPS, feature distance | `Likeness` |
| ISTD | `evenness` |

A value is NaN where an image lacks what the measure is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..guidance.shipped import located
from ..pipelines import interpolate
from ..pipelines.fashion.data import CLASS_NAMES
from .features import EvaluationError, FeatureNetwork, as_garments
from .folders import Batch, Pictures, of_files, read, read_folder
from .networks import load_judge

Measure = Callable[[Batch], Mapping[str, torch.Tensor]]

BEST_PSNR = 100.0


def garments() -> Measure:
    """Whether the judge of garments sees the class that was asked for, and the probability that it gives to it."""
    judge, _ = load_judge()

    def measure(batch: Batch) -> Mapping[str, torch.Tensor]:
        found = [garment(settings.get("class_label")) for settings in batch.settings]
        wanted = torch.tensor([-1 if index is None else index for index in found])
        probabilities = judge(as_garments(batch.images)).softmax(1)
        known = wanted >= 0
        right = (probabilities.argmax(1) == wanted).double().where(known, torch.nan)
        confidence = probabilities.gather(1, wanted.clamp_min(0)[:, None])[:, 0].where(known, torch.nan)
        return {"accuracy": right, "confidence": confidence}

    return measure


def garment(label: Any) -> int | None:
    """The index of a class that the judge knows, given by its name or index; `None` for any other."""
    text, names = str(label).lower(), [name.lower() for name in CLASS_NAMES]
    if text.isdecimal():
        return int(text) if int(text) < len(names) else None
    return names.index(text) if text in names else None


def clip_score(source: str) -> Measure:
    """`100 max(0, cos(image, prompt))` (Hessel et al., 2021, without its factor of 2.5).

    Args:
        source: folder or repository of a CLIP.
    """
    from transformers import CLIPModel, CLIPProcessor

    folder = located(source)
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--clip: {source!r} is no folder or repository of a CLIP: {error}") from error

    def measure(batch: Batch) -> Mapping[str, torch.Tensor]:
        prompts = [settings.get("prompt") for settings in batch.settings]
        silent = [name for name, prompt in zip(batch.names, prompts, strict=True) if not prompt]
        if silent:
            raise EvaluationError(f"--clip: {silent[0]} does not say its prompt ({len(silent)} of {len(prompts)}).")
        inputs = processor(text=prompts, images=list(batch.images), return_tensors="pt", padding=True, truncation=True)
        output = model(**inputs)
        return {"clip_score": 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).clamp_min(0)}

    return measure


class Likeness:
    """How like each image is to the one that it should be: the file of its name, or one file for all.

    PSNR in dB (at most `BEST_PSNR`, that of equal images), SSIM and LPIPS by torchmetrics.
    The feature distance is `1 - cos(f(image), f(other))`, at least 0.

    Args:
        source: a folder, or one image.
        network: f.
        lpips: the backbone of LPIPS, `"alex"`, `"vgg"` or `"squeeze"`; `None` leaves it out.

    Raises:
        EvaluationError: a library or weights are missing.
    """

    def __init__(self, source: Path, network: FeatureNetwork, lpips: str | None = None) -> None:
        try:
            from torchmetrics.functional import image as functional
        except ImportError as error:
            raise EvaluationError("--pairs: pip install 'trimtab[evaluate]' for PSNR and SSIM.") from error
        self.pictures = of_files(source.parent, [source]) if source.is_file() else read_folder(source)
        self.one = source.is_file()
        self.network, self.functional = network, functional
        self.lpips = None if lpips is None else _lpips(lpips)

    def check(self, images: Pictures) -> None:
        """Whether each of these images has another to be compared with.

        Raises:
            EvaluationError: one has none, or they differ in size.
        """
        self.check_names([file.name for file in images.files])
        if images.size != self.pictures.size:
            raise EvaluationError("--pairs: the images differ in size.")

    def check_names(self, names: Sequence[str]) -> None:
        """Whether each of these file names has another image to be compared with, there or still to be made.

        Raises:
            EvaluationError: one has none.
        """
        missing = () if self.one else [name for name in names if name not in self.files]
        if missing:
            raise EvaluationError(f"--pairs: {self.pictures.folder} holds no {missing[0]} ({len(missing)} missing).")

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files by name."""
        return {file.name: file for file in self.pictures.files}

    def __call__(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The measures of a batch."""
        wanted = [self.pictures.files[0] if self.one else self.files[name] for name in batch.names]
        other = read(wanted).images
        ours, theirs = batch.images.float() / 255, other.float() / 255
        psnr = self.functional.peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = self.functional.structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
        cosine = torch.cosine_similarity(self.network(batch.images), self.network(other))
        distance = (1 - cosine).clamp_min(0)  # rounding takes that of equal images below
        found = {"psnr": psnr.clamp_max(BEST_PSNR), "ssim": ssim.reshape(-1), "feature_distance": distance}
        return found if self.lpips is None else {**found, "lpips": self.lpips(ours, theirs)}


def _lpips(backbone: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS (Zhang et al., 2018) of pairs of images in 0..1, by torchmetrics, which has its linear layers."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric: Any = LearnedPerceptualImagePatchSimilarity(net_type=backbone, normalize=True)
    except (ImportError, ModuleNotFoundError, OSError) as error:
        raise EvaluationError(
            f"--lpips {backbone}: its network comes from torchvision: pip install torchvision, and let it fetch the "
            f"weights once ({error}). Without it there is the feature distance of --features."
        ) from error
    return lambda ours, theirs: metric.net(ours, theirs, normalize=True).reshape(-1)


def evenness(batch: Batch) -> Mapping[str, torch.Tensor]:
    """The interpolation standard deviation of each image that is a strip of `trimtab interpolate`."""
    values = []
    for image, settings in zip(batch.images, batch.settings, strict=True):
        frames = settings.get("frames")
        strip = isinstance(frames, int) and frames > 2 and image.shape[-1] % frames == 0
        values.append(interpolate.spread_of_steps(torch.stack(image.chunk(frames, -1))) if strip else torch.nan)
    return {"istd": torch.tensor(values, dtype=torch.double)}
