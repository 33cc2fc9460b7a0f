"""Linear measurements of an image, `y = A x`, each with a right inverse B, so that `A B y = y`.

`x + B (y - A x)` then measures as y exactly, and keeps of x what A does not see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .errors import ParameterError

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance of ITU-R BT.601, which grey images of PIL hold."""

UNSEEN = 1e-2
"""A difference of values in -1..1 that a picture of 8 bits hardly shows."""

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LinearOperator:
    """A linear measurement of images `[batch, channels, height, width]`.

    Args:
        forward: A.
        right_inverse: B, such as the pseudo-inverse.
    """

    forward: Map
    right_inverse: Map

    def project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`x + B (y - A x)`."""
        return x + self.right_inverse(y - self.forward(x))

    def project_within(self, x: torch.Tensor, y: torch.Tensor, rounds: int = 2000, error: float = 1e-5) -> torch.Tensor:
        """The image in -1..1 nearest to the clipped x that measures as y to `error`, or as near as `rounds` come to it.

        It is `clip(z)` with `A clip(z) = y`. Where B is the pseudo-inverse, `z <- z + B (y - A clip(z))` climbs the
        dual of that problem, here with momentum (Beck & Teboulle, 2009). With momentum the error does not fall in every
        round, so the best of an image is kept; an image that is near enough no longer changes, whatever others need.
        """
        z = ahead = self.project(x.clamp(-1, 1), y)
        best, least = ahead.clamp(-1, 1), x.new_full((len(x), *(1,) * (x.ndim - 1)), torch.inf)
        for round in range(rounds):
            inside = ahead.clamp(-1, 1)
            residual = y - self.forward(inside)
            off = residual.abs().flatten(1).amax(1).reshape(least.shape)
            better = (off < least) & (least > error)
            best, least = torch.where(better, inside, best), torch.where(better, off, least)
            if (least <= error).all():
                break
            before, z = z, ahead + self.right_inverse(residual)
            ahead = z + round / (round + 3) * (z - before)
        if (off_by := float(least.max())) > UNSEEN:
            warnings.warn(
                f"no image in -1..1 was found that measures as it should: the nearest is off by {off_by:.2g}. Was the "
                "measurement made of such an image, and by this operator?",
                stacklevel=2,
            )
        return best


@dataclass(frozen=True)
class Inpainting(LinearOperator):
    """The pixels that are known; made by `inpainting`."""

    known: torch.Tensor

    def project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Chosen, not added: known pixels are kept to the bit.
        return torch.where(self.known.to(x.device), y, x)

    def project_within(self, x: torch.Tensor, y: torch.Tensor, rounds: int = 0, error: float = 0.0) -> torch.Tensor:
        return self.project(x.clamp(-1, 1), y)


def inpainting(known: torch.Tensor) -> Inpainting:
    """The pixels where `known` `[batch or 1, 1, height, width]` is true."""

    def mask(x: torch.Tensor) -> torch.Tensor:
        return x * known.to(x)

    return Inpainting(mask, mask, known)


def resampling(high: tuple[int, int], low: tuple[int, int]) -> LinearOperator:
    """Bicubic resizing from height and width `high` to `low`, as PIL does it, by any factor.

    Rows and columns are resized one after the other, so A is a Kronecker product and so is its pseudo-inverse.
    """
    down = [_resizing(size, to) for size, to in zip(high, low, strict=True)]
    up = [torch.linalg.pinv(matrix) for matrix in down]

    def both(matrices: list[torch.Tensor]) -> Map:
        def apply(x: torch.Tensor) -> torch.Tensor:
            rows, columns = (matrix.to(x) for matrix in matrices)
            return rows @ x @ columns.T

        return apply

    return LinearOperator(both(down), both(up))


def _resizing(size: int, to: int) -> torch.Tensor:
    """The matrix `[to, size]` of resizing one axis."""
    identity = torch.eye(size, dtype=torch.float64)[None, None]
    return F.interpolate(identity, (to, size), mode="bicubic", align_corners=False, antialias=True)[0, 0]


def luminance() -> LinearOperator:
    """The luminance `[batch, 1, height, width]` of colour images; its inverse adds as much to each colour, so that
    both differences of colour are kept."""

    def grey(x: torch.Tensor) -> torch.Tensor:
        return (x * x.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)

    return LinearOperator(grey, lambda y: y.expand(-1, 3, -1, -1))


def check_operator(operator: LinearOperator, images: torch.Tensor, measured: torch.Tensor, plugin: str) -> None:
    """Try an operator on blank images.

    Args:
        operator: what is tried.
        images: one or several, as large as those that will be measured.
        measured: what the user says that the operator gives.
        plugin: for messages.

    Raises:
        ParameterError: it does not take them, or what it returns has another shape.
    """
    try:
        found = operator.forward(images)
        back = operator.right_inverse(found)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ParameterError(
            f"{plugin}: operator does not take the pipeline's images {list(images.shape)}: {error}"
        ) from error
    if found.shape[1:] != measured.shape[1:]:
        raise ParameterError(
            f"{plugin}: image is {list(measured.shape)}, but operator measures the pipeline's images "
            f"{list(images.shape)} as {list(found.shape)}; give an image of that shape."
        )
    if back.shape != images.shape:
        raise ParameterError(
            f"{plugin}: operator's right_inverse makes {list(back.shape)} of {list(found.shape)}; needed: the shape of "
            f"the pipeline's images, {list(images.shape)}."
        )
