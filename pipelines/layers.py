"""One perturbed or watched layer in one denoiser call, as it computes one group of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..guidance.branch import Perturbation, Point, ScaledAdapters, SkippedBlocks
from ..guidance.errors import GuidanceRuntimeError
from .attention import AttentionReplaced, no_stand_in, why_not
from .families import Family
from .grids import Grid
from .interception import cache_hooks
from .lora import scaled
from .processors import stand_in
from .skipping import handed_on, passes_on
from .tokens import Places


@dataclass(frozen=True)
class Layer:
    """All that is known of a layer before the denoiser is called; nothing of it is looked up in a traced graph.

    Args:
        name, module: of the layer.
        processor: the stand-in of an attention's processor, if it is an attention and there is one.
        places: where the image tokens are; `None` if there are no others.
        grids: the shapes that image tokens may have.
        passed_on: the arguments that a block hands on when it is left out, each with its position.
    """

    name: str
    module: nn.Module
    processor: Any
    places: Places | None
    grids: tuple[Grid, ...]
    passed_on: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, family: Family, name: str, places: Places | None, grids: tuple[Grid, ...]) -> Layer:
        """That of a denoiser that is about to be called."""
        module = family.module.get_submodule(name)
        processor = stand_in(module) if hasattr(module, "processor") else None
        return cls(name, module, processor, places, grids, passes_on(module))

    def check(self, what: Perturbation | Point) -> None:
        """Raise `GuidanceRuntimeError` if this cannot act here."""
        if self.processor is None and not isinstance(what, (SkippedBlocks, ScaledAdapters)):
            raise GuidanceRuntimeError(no_stand_in(self.name, self.module, type(what).__name__))

    def compute(
        self, original: Callable[..., Any], part: Any, perturbation: Perturbation | None,
        kept: Sequence[tuple[Point, list[torch.Tensor]]],
    ) -> Any:  # fmt: skip
        """One group of rows; what the points watch is appended to `kept`."""
        args, kwargs = part
        if isinstance(perturbation, SkippedBlocks):
            return handed_on(self.passed_on, args, kwargs)
        if isinstance(perturbation, ScaledAdapters):
            with scaled(self.module, perturbation):
                return original(*args, **kwargs)
        if perturbation is None and not kept:
            return original(*args, **kwargs)
        replaced = AttentionReplaced(self.module, self.processor, perturbation, kept, self.places, self.grids)
        with replaced:
            output = original(*args, **kwargs)
        # A step cache may leave the layer out and give back what it remembers of this branch, which is perturbed.
        left_out = not replaced.passed_by and bool(cache_hooks(self.module))
        if not replaced.acted and not left_out:
            acting = type(perturbation or kept[0][0]).__name__
            raise GuidanceRuntimeError(why_not(self.name, self.module, acting, replaced.passed_by))
        return output
