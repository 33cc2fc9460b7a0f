"""Observe, then act: how the denoiser's outputs became the `model_output` of `scheduler.step`.

A pipeline combines the rows of its denoiser calls, cuts channels or tokens off, may flip the sign and may convert:

    model_output = sum_i w_i view(row_i) + w_x x_t

The weights are fitted by least squares at `scheduler.step`, which tells, without knowing the pipeline, which row is the
condition (largest weight), which the unconditional one (negative weight), which calls are no part of the step (weight
zero), the slice (`view`) and the sign of a delta (the sum of the weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..guidance.errors import GuidanceRuntimeError

TOLERANCE = 1e-3
"""Relative residual under which the fitted combination is taken as the pipeline's own, in float32."""
UNRELATED = 0.5
"""Relative residual above which the denoiser's output cannot be what the scheduler was given."""
_SAMPLES = 1 << 15


@dataclass(frozen=True)
class View:
    """The part of a denoiser row that reaches the scheduler: a slice along one dimension, another shape, or all.

    A row of tokens `[tokens, channels]` may first be laid out as `unpacked` `[channels, frames, height, width]`.
    """

    dim: int = 0
    start: int = 0
    length: int | None = None
    shape: tuple[int, ...] | None = None
    unpacked: tuple[int, ...] | None = None

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` `[batch, ...]`, cut or reshaped."""
        if self.shape is not None:
            return rows.reshape(len(rows), *self.shape)
        if self.unpacked is not None:
            rows = rows.transpose(1, 2).reshape(len(rows), *self.unpacked)
        return rows if self.length is None else rows.narrow(self.dim, self.start, self.length)

    def transpose(self, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`part` put back into zeros of the shape of `like`: the transpose of `of`."""
        if self.length is None:
            return part.reshape(like.shape)
        whole = torch.zeros_like(like) if self.unpacked is None else part.new_zeros(len(part), *self.unpacked)
        whole.narrow(self.dim, self.start, self.length).copy_(part)
        return whole if self.unpacked is None else whole.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Observation:
    """How one step's `model_output` came about.

    Args:
        weights: one per row group, in the order of the calls.
        on_sample: the weight of x_t itself, 0 unless the pipeline converts the prediction.
        view: what is cut from each row.
        batch: images in the batch.
        copies: how often the combination is repeated along the batch (DiT hands the scheduler two copies).
        residual: relative error of the fit.
        certain: whether the weights can be told apart (false where two rows are equal).
        tolerance: residual that rounding in the model's precision may leave.
    """

    weights: tuple[float, ...]
    on_sample: float
    view: View
    batch: int
    copies: int
    residual: float
    certain: bool
    tolerance: float = TOLERANCE

    @property
    def exact(self) -> bool:
        """Whether the fit explains the combination to rounding."""
        return self.residual <= self.tolerance

    def combine(self, outputs: Sequence[torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        """What the pipeline would make of other outputs of the same calls at another x_t, with the same weights."""
        groups = [group for output in outputs for group in output.split(self.batch)]
        rows = sum((w * self.view.of(group).float() for w, group in zip(self.weights, groups, strict=True)), 0.0)
        return (rows + self.on_sample * sample.float()).to(outputs[0].dtype)

    @property
    def gain(self) -> float:
        """What a delta on every row arrives as: 1, -1 where the sign is flipped, another number where it is scaled."""
        total = sum(self.weights)
        if not self.exact or self.rescaled:
            return 1.0 if total >= 0 else -1.0
        nearest = round(total)
        return float(nearest) if nearest and abs(total - nearest) < 1e-2 else total

    @property
    def rescaled(self) -> bool:
        """Whether the pipeline seems to rescale its combination afterwards, so that the weights depend on the data."""
        if len(self.weights) < 2 or abs(self.on_sample) > TOLERANCE:
            return False
        return not self.exact or abs(abs(sum(self.weights)) - 1) > 1e-2

    @property
    def roles(self) -> tuple[str, ...]:
        """`"cond"`, `"uncond"`, or `"other"` for each row group, from the weights."""
        sign = -1.0 if sum(self.weights) < 0 else 1.0
        weights = [sign * weight for weight in self.weights]
        best = max(range(len(weights)), key=weights.__getitem__)
        lowest = min(range(len(weights)), key=weights.__getitem__)
        roles = ["other"] * len(weights)
        if weights[lowest] < -1e-4:
            roles[lowest] = "uncond"
        roles[best] = "cond"
        return tuple(roles)


def observe(outputs: Sequence[torch.Tensor], model_output: torch.Tensor, sample: torch.Tensor) -> Observation | None:
    """Fit `model_output` on the `outputs` of the step's denoiser calls, or return `None` if no view fits.

    Args:
        outputs: one `[rows, ...]` tensor a call.
        model_output: what the scheduler was given.
        sample: x_t as the scheduler was given it.
    """
    best: Observation | None = None
    for copies in (1, 2):
        if model_output.shape[0] % copies:
            continue
        batch = model_output.shape[0] // copies
        if copies == 2 and not torch.equal(model_output[:batch], model_output[batch:]):
            continue
        target, state = own_channels(model_output, sample)[:batch], sample[:batch]
        if not outputs or any(output.shape[0] % batch for output in outputs):
            continue
        groups = [group for output in outputs for group in output.split(batch)]
        tolerance = max(TOLERANCE, 16 * torch.finfo(groups[0].dtype).eps)
        for view in _views(groups, target):
            columns = [view.of(group) for group in groups]
            fitted = _fit(columns, target, None)
            if fitted[1] > tolerance and state.shape == target.shape:
                converted = _fit(columns, target, state)
                fitted = converted if converted[1] <= tolerance else fitted
            weights, residual, certain = fitted
            on_rows, on_sample = tuple(weights[: len(groups)]), sum(weights[len(groups) :])
            found = Observation(on_rows, on_sample, view, batch, copies, residual, certain, tolerance)
            if best is None or found.residual < best.residual:
                best = found
    return best


def own_channels(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`model_output` without the learned variance that some pipelines pass on as further channels."""
    channels = sample.shape[1] if sample.ndim > 1 else 0
    if sample.ndim == model_output.ndim > 2 and model_output.shape[1] == 2 * channels:
        return model_output[:, :channels]
    return model_output


def _views(groups: Sequence[torch.Tensor], target: torch.Tensor) -> list[View]:
    shape = groups[0].shape
    if any(group.shape != shape for group in groups):
        return []
    if [size for size in shape[1:] if size > 1] == [size for size in target.shape[1:] if size > 1]:
        return [View() if shape == target.shape else View(shape=tuple(target.shape[1:]))]
    if len(shape) == 3 and target.ndim == 5 and shape[2] == target.shape[1]:
        return _unpacked(shape, target.shape)
    if len(shape) != target.ndim:
        return []
    differing = [dim for dim in range(target.ndim) if shape[dim] != target.shape[dim]]
    if len(differing) > 1 or shape[differing[0]] < target.shape[differing[0]]:
        return []
    dim, length = differing[0], target.shape[differing[0]]
    return [View(dim, 0, length), View(dim, shape[dim] - length, length)]


def _unpacked(shape: Sequence[int], target: Sequence[int]) -> list[View]:
    """Rows of tokens that become the frames of a video, of which the first or the last ones go on."""
    channels, length, height, width = target[1:]
    frames, rest = divmod(shape[1], height * width)
    if rest or frames < length:
        return []
    unpacked = (channels, frames, height, width)
    return [View(2, start, length, unpacked=unpacked) for start in dict.fromkeys((0, frames - length))]


def _fit(
    columns: Sequence[torch.Tensor], target: torch.Tensor, state: torch.Tensor | None
) -> tuple[list[float], float, bool]:
    """Least-squares weights of the columns (and of x_t), the relative residual, and whether they are determined."""
    if not torch.isfinite(target).all():
        raise GuidanceRuntimeError("The pipeline's own prediction is not finite, so nothing can be added to it.")
    stride = max(1, target.numel() // _SAMPLES)
    chosen = [*columns] if state is None else [*columns, state]
    matrix = torch.stack([column.detach().reshape(-1)[::stride] for column in chosen], dim=1).double().cpu()
    vector = target.detach().reshape(-1)[::stride].double().cpu()
    norms = matrix.norm(dim=0).clamp_min(1e-30)
    solution = torch.linalg.lstsq(matrix / norms, vector[:, None], rcond=1e-7, driver="gelsd").solution[:, 0] / norms
    scale = vector.norm().clamp_min(1e-30)
    residual = ((matrix @ solution - vector).norm() / scale).item()
    difference = (matrix[:, :1] - matrix[:, 1:]).norm(dim=0).min().item() if matrix.shape[1] > 1 else float("inf")
    return solution.tolist(), residual, difference > 1e-4 * norms.max().item()
