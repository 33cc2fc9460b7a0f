"""Feature networks by name: maps from images `[n, 3, height, width]` in bytes to features `[n, d]`.

| name | network | a distance on its features is |
| --- | --- | --- |
| `judge` | this package's classifier of garments, 32x32 grey (the default) | no FID |
| `efficientnet-lite0` | EfficientNet-Lite0, ImageNet | no FID |
| `inception` | Inception v3 as in FID, by torchmetrics and torch-fidelity, whose weights must be at hand | FID, KID |
| a folder or repository | any image model that `transformers.AutoModel` loads, with its own processor | no FID |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..guidance.errors import TrimtabError
from ..guidance.shipped import located
from .networks import load_efficientnet, load_judge


class EvaluationError(TrimtabError, ValueError):
    """Something that cannot be evaluated."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A named map from images to features.

    Args:
        name: as it was asked for.
        title: what reports say, so that nobody takes a number for another.
        compute: of a batch `[n, 3, height, width]` in bytes.
    """

    name: str
    title: str
    compute: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[n, d]` of a batch `[n, 3, height, width]` in bytes."""
        return self.compute(images).flatten(1).float().cpu()


def feature_network(name: str) -> FeatureNetwork:
    """The network of this name.

    Raises:
        EvaluationError: it, or its weights, are not at hand; the message says how to get them.
    """
    if name == "judge":
        judge, _ = load_judge()
        return FeatureNetwork(name, "trimtab's judge of garments (not FID)", lambda x: judge.features(as_garments(x)))
    if name == "efficientnet-lite0":
        try:
            network = load_efficientnet()
        except ImportError as error:
            raise EvaluationError(f"--features: {error}") from error
        return FeatureNetwork(name, "EfficientNet-Lite0 (not FID)", lambda x: network(as_garments(x)))
    if name == "inception":
        return FeatureNetwork(name, "Inception v3 (FID)", _inception())
    return FeatureNetwork(name, f"{name} (not FID)", _transformers_model(name))


def as_garments(images: torch.Tensor) -> torch.Tensor:
    """Images in bytes as the judge sees them: grey, 32x32, in -1..1, `[n, 1, 32, 32]`."""
    grey = images.float().mean(1, keepdim=True) / 127.5 - 1
    return grey if grey.shape[-2:] == (32, 32) else F.interpolate(grey, (32, 32), mode="bilinear", antialias=True)


def _inception() -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network: Any = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, ModuleNotFoundError, OSError) as error:
        raise EvaluationError(
            "--features inception: pip install torchmetrics torch-fidelity, and let torch-fidelity fetch its weights "
            f"once ({error})."
        ) from error
    return lambda images: network(images)


def _transformers_model(source: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoImageProcessor, AutoModel

    folder = located(source)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"--features: {source!r} is neither judge, efficientnet-lite0 or inception, nor a folder or repository of "
            f"an image model: {error}"
        ) from error

    def compute(images: torch.Tensor) -> torch.Tensor:
        inputs = processor(images=list(images), return_tensors="pt")
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(**inputs)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        output = model(**inputs)
        pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
        return pooled if pooled is not None else output.last_hidden_state.mean(1)

    return compute
