"""Losses of an image that other networks see; each takes images in -1..1 and returns one number an image.

Give them to the plug-in `steered` as they are, or as a `Term` with a weight and a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .errors import ParameterError
from .images import Preprocessing, for_rows
from .networks import as_network, shown_to, tensor_of

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Term:
    """One of several losses.

    Args:
        loss: takes images `[batch, channels, height, width]`, returns `[batch]`.
        weight: its factor.
        start, stop: it acts while start <= index / count < stop.
    """

    loss: Loss
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ParameterError(f"Term: loss={self.loss!r}; needed: a function of images that returns [batch].")
        for name in ("weight", "start", "stop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ParameterError(f"Term: {name}={value!r}; allowed: a finite number.")
        if not self.start < self.stop:
            raise ParameterError(f"Term: start={self.start:g}, stop={self.stop:g}; allowed: start < stop.")


def name_of(term: Term) -> str:
    """What messages call a loss."""
    return getattr(term.loss, "__name__", type(term.loss).__name__)


@dataclass(frozen=True)
class EmbeddingCosine:
    """`1 - cos(e(x), e)`: identity by a face network, a text by the image tower of a CLIP-like model.

    Args:
        network: embeds images, `[batch, d]`.
        wanted: e, `[d]`, or `[n, d]` for each image: the embedding of a reference, or of a text in the same space.
        preprocessing: what the network expects.
    """

    network: nn.Module
    wanted: torch.Tensor
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def targets(self) -> int:
        """For how many images there is a target."""
        return len(torch.atleast_2d(self.wanted))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        embedded = shown_to(self.network, self.preprocessing(images))
        wanted = for_rows(torch.atleast_2d(self.wanted).to(embedded), len(images))
        return 1 - F.cosine_similarity(embedded, wanted, dim=-1)


@dataclass(frozen=True)
class SemanticMap:
    """Mean cross-entropy between a segmentation network's logits and a map of classes.

    Args:
        network: returns logits `[batch, classes, h, w]`.
        classes: `[n, h, w]`, for all images or each, of class indices; -100 where anything goes.
        preprocessing: what the network expects.
    """

    network: nn.Module
    classes: torch.Tensor
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def targets(self) -> int:
        """For how many images there is a target."""
        return len(self.classes)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        logits = shown_to(self.network, self.preprocessing(images))
        wanted = for_rows(self.classes.to(logits.device), len(logits))
        size = tuple(wanted.shape[-2:])
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        each = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none").flatten(1)
        return each.sum(1) / (wanted.flatten(1) != -100).sum(1).clamp_min(1)


@dataclass(frozen=True)
class Content:
    """Mean squared difference of a network's features, averaged over layers.

    Args:
        network: any network of images, not compiled.
        layers: names of its modules whose outputs are compared.
        reference: images `[n, ...]` in -1..1, for all images or each.
        preprocessing: what the network expects.
    """

    network: nn.Module
    layers: Sequence[str]
    reference: torch.Tensor
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def targets(self) -> int:
        """For how many images there is a target."""
        return len(self.reference)

    def statistic(self, features: torch.Tensor) -> torch.Tensor:
        """What of the features is compared."""
        return features

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._features(self.reference.to(images))
        found = self._features(images)
        distances = [
            (self.statistic(ours) - for_rows(self.statistic(theirs), len(images))).square().flatten(1).mean(1)
            for ours, theirs in zip(found, wanted, strict=True)
        ]
        return torch.stack(distances).mean(0)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        shapes: list[torch.Size] = []

        def joined(given: torch.Tensor) -> torch.Tensor:
            with outputs_of(self.network, self.layers) as features:
                self.network(given)
            shapes[:] = [features[name].shape for name in self.layers]
            return torch.cat([features[name].flatten(1) for name in self.layers], 1)

        flat = as_network(self.network, self.preprocessing(images), joined)
        parts = flat.split([shape[1:].numel() for shape in shapes], 1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class Style(Content):
    """The same on Gram matrices `F F^T / (channels positions)`, which do not know where anything is.

    Gatys et al., "A Neural Algorithm of Artistic Style", arXiv:1508.06576.
    """

    def statistic(self, features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(2)
        return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def check_target(loss: Loss, images: torch.Tensor, parameter: str) -> None:
    """Try a loss of this module on blank images, so that a target that does not fit is an error before a run.

    A function of the user's own is not called: what it does to a blank image is not known.

    Args:
        loss: any.
        images: blank, as many and as large as the run's.
        parameter: for the message.

    Raises:
        ParameterError: the loss does not take them; the message says why.
    """
    if not isinstance(loss, (EmbeddingCosine, SemanticMap, Content)):
        return
    try:
        targets = loss.targets
        if len(images) % targets == 0:
            with torch.no_grad():
                loss(images[:1].expand(targets, -1, -1, -1))
            return
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ParameterError(
            f"{parameter}, {type(loss).__name__}, does not take the pipeline's images {list(images.shape)}: {error} "
            "Make its target fit, or give it a Preprocessing."
        ) from error
    raise ParameterError(
        f"{parameter}, {type(loss).__name__}, has targets for {targets} images, but {len(images)} are made; give one, "
        "or one for each."
    )


@contextmanager
def outputs_of(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of some modules of a network, filled while it is called within the block."""
    found: dict[str, torch.Tensor] = {}

    def keeping(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = tensor_of(output)

        return keep

    handles = [network.get_submodule(name).register_forward_hook(keeping(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
