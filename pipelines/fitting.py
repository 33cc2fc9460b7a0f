"""Least squares: the weights with which rows were combined, one for a row or one for each place of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..guidance.errors import GuidanceRuntimeError

_SAMPLES = 1 << 15
"""About how many values of a prediction are looked at."""


def fit(
    columns: Sequence[torch.Tensor], target: torch.Tensor, state: torch.Tensor | None
) -> tuple[list[torch.Tensor], float, bool]:
    """Least-squares weights of the columns (and of x_t), the relative residual, and whether they are determined."""
    if not torch.isfinite(target).all():
        raise GuidanceRuntimeError("The pipeline's own prediction is not finite, so nothing can be added to it.")
    stride = _stride(target.numel(), target.numel())
    chosen = [*columns] if state is None else [*columns, state]
    matrix = torch.stack([column.detach().reshape(-1)[::stride] for column in chosen], dim=1).cpu().double()
    vector = target.detach().reshape(-1)[::stride].cpu().double()
    norms = matrix.norm(dim=0).clamp_min(1e-30)
    solution = torch.linalg.lstsq(matrix / norms, vector[:, None], rcond=1e-7, driver="gelsd").solution[:, 0] / norms
    scale = vector.norm().clamp_min(1e-30)
    residual = ((matrix @ solution - vector).norm() / scale).item()
    difference = (matrix[:, :1] - matrix[:, 1:]).norm(dim=0).min().item() if matrix.shape[1] > 1 else float("inf")
    return list(solution), residual, difference > 1e-4 * norms.max().item()


def fit_by_place(
    columns: Sequence[torch.Tensor], target: torch.Tensor, tolerance: float
) -> tuple[list[torch.Tensor], float] | None:
    """Weights `[1, ..., size, ..., 1]` for each place along the first dimension for which such weights explain all.

    `None` if there is none, or too few values in each place to tell.
    """
    stacked = torch.stack([column.detach() for column in columns], dim=-1)
    for dim in range(1, target.ndim):
        size, values = target.shape[dim], target.numel() // target.shape[dim]
        if size < 2 or min(values, _SAMPLES // size) < 4 * len(columns):
            continue
        stride = _stride(target.numel(), values)
        matrix = stacked.movedim(dim, 0).reshape(size, values, -1)[:, ::stride].cpu().double()
        vector = target.detach().movedim(dim, 0).reshape(size, values, 1)[:, ::stride].cpu().double()
        inverse = torch.linalg.pinv(matrix.mT @ matrix, hermitian=True, rtol=1e-12)
        solution = inverse @ (matrix.mT @ vector)
        residual = ((matrix @ solution - vector).norm() / vector.norm().clamp_min(1e-30)).item()
        if residual <= tolerance:
            shape = [size if other == dim else 1 for other in range(target.ndim)]
            return [weight.reshape(shape).float().to(target.device) for weight in solution.unbind(1)], residual
    return None


def _stride(available: int, length: int) -> int:
    """A stride through `length` values, coprime to it, as some channels would otherwise never be looked at."""
    stride = max(1, available // _SAMPLES)
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride
