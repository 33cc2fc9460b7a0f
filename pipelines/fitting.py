"""Least squares: with which weights a pipeline combined its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..guidance.errors import GuidanceRuntimeError

_SAMPLES = 1 << 15
"""About how many values of a prediction are looked at."""


@dataclass(frozen=True)
class Fit:
    """`target = sum_i weights_i columns_i + on_sample x_t`, as far as it holds.

    Args:
        weights: of each column, a number, or one for each place along a dimension `[1, ..., size, ..., 1]`.
        on_sample: the weight of x_t.
        residual: relative error.
        certain: whether the weights can be told apart.
        held: where it does not hold at all, `[1, ..., size, ..., 1]`; `None` if nowhere.
    """

    weights: tuple[torch.Tensor, ...]
    on_sample: float
    residual: float
    certain: bool
    held: torch.Tensor | None = None


def fit(columns: Sequence[torch.Tensor], target: torch.Tensor, state: torch.Tensor, tolerance: float) -> Fit:
    """The simplest combination that explains the target to `tolerance`, or the nearest one of weights alone.

    In this order: one weight a row; x_t as well; likewise, but for parts that the pipeline holds whatever the denoiser
    says, as the given frames of a video; a weight for each channel, frame or token.

    Args:
        columns: the rows, all of the target's shape.
        target: what the scheduler was given `[batch, ...]`.
        state: x_t.

    Raises:
        GuidanceRuntimeError: the target is not finite.
    """
    if not torch.isfinite(target).all():
        raise GuidanceRuntimeError("The pipeline's own prediction is not finite, so nothing can be added to it.")
    nearest = _of_rows(columns, target)
    if nearest.residual <= tolerance:
        return nearest
    states = [state] if state.shape == target.shape else []
    if states and (converted := _of_rows(columns, target, states)).residual <= tolerance:
        return converted
    for size, dim, _, missed, wanted in _places([*columns, *states], target):
        held = (missed > tolerance * wanted) | (wanted <= tolerance * wanted.max())
        if 0 < int(held.sum()) < size:
            free = (~held).nonzero().flatten().to(target.device)
            parts = [[part.index_select(dim, free) for part in some] for some in (columns, [target], states)]
            found = _of_rows(parts[0], parts[1][0], parts[2])
            taken = held.nonzero().flatten().to(target.device)
            if found.residual <= tolerance and not _follows_here_and_there(
                found, [part.index_select(dim, taken) for part in (target, *columns, *states)], tolerance
            ):
                return replace(found, held=held.reshape(_along(dim, size, target)).to(target.device))
    for size, dim, weights, missed, wanted in _places(columns, target):
        if (residual := (missed.norm() / wanted.norm().clamp_min(1e-30)).item()) <= tolerance:
            shape = _along(dim, size, target)
            each = tuple(weight.reshape(shape).float().to(target.device) for weight in weights)
            return Fit(each, 0.0, residual, nearest.certain)
    return nearest


def _of_rows(columns: Sequence[torch.Tensor], target: torch.Tensor, states: Sequence[torch.Tensor] = ()) -> Fit:
    """One weight a column, and one of x_t."""
    stride = _stride(target.numel(), target.numel())
    chosen = [*columns, *states]
    matrix = torch.stack([column.detach().reshape(-1)[::stride] for column in chosen], dim=1).cpu().double()
    vector = target.detach().reshape(-1)[::stride].cpu().double()
    norms = matrix.norm(dim=0).clamp_min(1e-30)
    solution = torch.linalg.lstsq(matrix / norms, vector[:, None], rcond=1e-7, driver="gelsd").solution[:, 0] / norms
    residual = ((matrix @ solution - vector).norm() / vector.norm().clamp_min(1e-30)).item()
    difference = (matrix[:, :1] - matrix[:, 1:]).norm(dim=0).min().item() if matrix.shape[1] > 1 else float("inf")
    weights, rest = solution[: len(columns)], solution[len(columns) :]
    return Fit(tuple(weights), float(rest.sum()), residual, difference > 1e-4 * norms.max().item())


def _places(
    columns: Sequence[torch.Tensor], target: torch.Tensor
) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]]:
    """For each dimension: its size, itself, the weights `[size]` of each column, and the norms of error and target."""
    stacked = torch.stack([column.detach() for column in columns], dim=-1)
    for dim in range(1, target.ndim):
        size, values = target.shape[dim], target.numel() // target.shape[dim]
        if size < 2 or min(values, _SAMPLES // size) < max(2 * len(columns), len(columns) + 2):
            continue  # too few values in each place to tell
        stride = _stride(target.numel(), values)
        matrix = stacked.movedim(dim, 0).reshape(size, values, -1)[:, ::stride].cpu().double()
        vector = target.detach().movedim(dim, 0).reshape(size, values, 1)[:, ::stride].cpu().double()
        inverse = torch.linalg.pinv(matrix.mT @ matrix, hermitian=True, rtol=1e-12)
        solution = inverse @ (matrix.mT @ vector)
        missed = (matrix @ solution - vector).flatten(1).norm(dim=1)
        yield size, dim, solution.squeeze(2).unbind(1), missed, vector.flatten(1).norm(dim=1)


def _follows_here_and_there(found: Fit, parts: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Whether a fit holds for single values where it does not hold on the whole, as beside the mask of an edit.

    Args:
        parts: target, columns and x_t, where the fit does not hold.
    """
    target, *columns = (part.float() for part in parts)
    weights = [*(weight.to(target) for weight in found.weights), target.new_tensor(found.on_sample)]
    missed = target
    for weight, column in zip(weights, columns, strict=False):  # x_t may be of another shape, and is no column then
        missed = missed - weight * column
    missed = missed.abs()
    followed = (missed <= tolerance * missed.square().mean().sqrt()).float().mean().item()
    return followed > 0.02 + 5 * tolerance  # so many may agree by chance


def _along(dim: int, size: int, target: torch.Tensor) -> list[int]:
    return [size if other == dim else 1 for other in range(target.ndim)]


def _stride(available: int, length: int) -> int:
    """A stride through `length` values, coprime to it, as some channels would otherwise never be looked at."""
    stride = max(1, available // _SAMPLES)
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride
