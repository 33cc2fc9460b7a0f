"""What gradient guidances have in common: the levels that weigh a gradient, and how large a step it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .base import Guidance
from .errors import GuidanceRuntimeError
from .levels import Level
from .parameters import parameter
from .run import CLEAN, Step
from .wording import shown

GradNorm = Literal["none", "clip", "unit", "relative"]


def signal_share(level: Level) -> float:
    """`alpha^2 / (alpha^2 + sigma^2)`, which is alpha-bar on the variance-preserving path."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def levels_of_run(step: Step) -> list[Level]:
    """The levels of the run and the clean one after them, the noisiest first, each once."""
    assert step.algebra is not None
    found: list[Level] = []
    for level in sorted((*step.algebra.levels(), CLEAN), key=lambda level: -level.ratio):
        if not found or not level.alike(found[-1]):
            found.append(level)
    return found


def share_of_next(step: Step) -> float:
    """The signal's share at the next lower level of noise, also where a scheduler evaluates a level twice."""
    if step.next_level.ratio < step.level.ratio and not step.next_level.alike(step.level):
        return signal_share(step.next_level)
    lower = (level for level in levels_of_run(step) if level.ratio < step.level.ratio and not level.alike(step.level))
    return signal_share(next(lower))


def rank_of_level(step: Step) -> tuple[int, int]:
    """Place of the level among those of the run, from the noisiest on, and how many there are."""
    if not in_pairs(step):
        return step.index, step.count
    levels = levels_of_run(step)[:-1]
    return sum(level.ratio > step.level.ratio and not level.alike(step.level) for level in levels), len(levels)


def in_pairs(step: Step) -> bool:
    """Whether the scheduler evaluates its levels twice."""
    assert step.algebra is not None
    steps = step.algebra.noise_steps()
    return len(set(steps)) < len(steps)


def check_each(value: Any, images: torch.Tensor, what: str) -> torch.Tensor:
    """A loss or an energy of images, if it is one.

    Args:
        value: what was returned.
        images: of which.
        what: that returned it, for messages.

    Raises:
        GuidanceRuntimeError: it is not one number an image, or does not depend on the images.
    """
    if not isinstance(value, torch.Tensor) or value.shape != (len(images),):
        raise GuidanceRuntimeError(
            f"{what} returned {shown(value)}; needed: one number an image, a tensor [{len(images)}]."
        )
    if images.requires_grad and not value.requires_grad:
        raise GuidanceRuntimeError(
            f"{what} does not depend on the images that it is given; compute it from them, without detach() or "
            "no_grad()."
        )
    return value


def rms(tensor: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image, broadcastable to `tensor` `[batch, ...]`."""
    axes = tuple(range(1, tensor.ndim))
    return tensor.square().mean(axes, keepdim=True).sqrt()


@dataclass(kw_only=True)
class GradientGuidance(Guidance):
    """A guidance with a loss, and a rule for the size of its gradient.

    With a rule other than `"none"` its gradient is taken in a backward pass of its own.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "level"})

    grad_norm: GradNorm = parameter(
        "none",
        "Root mean square of what is taken off the clean estimate, for each image: 'clip' to at most max_norm, "
        "'unit' to max_norm, 'relative' to max_norm times that of the sample; 'none' leaves it.",
    )
    max_norm: float = parameter(1.0, "See grad_norm.", ge=0)

    @property
    def shares_backward(self) -> bool:
        return self.grad_norm == "none"

    def reshape_gradient(self, step: Step, gradient: torch.Tensor) -> torch.Tensor:
        if self.grad_norm == "none":
            return gradient
        size = rms(gradient).clamp_min(1e-30)
        if self.grad_norm == "clip":
            return gradient * (self.max_norm / size).clamp_max(1.0)
        wanted = torch.full_like(size, self.max_norm)
        if self.grad_norm == "relative":
            assert step.sample is not None
            wanted = wanted * rms(step.sample.float())
        return gradient * (wanted / size)
