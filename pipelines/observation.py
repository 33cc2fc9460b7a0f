"""Observe, then act: how the denoiser's outputs became the `model_output` of `scheduler.step`.

A pipeline combines the rows of its denoiser calls, cuts channels or tokens off, may flip the sign and may convert:

    model_output = sum_i w_i view(row_i) + w_x x_t

The weights are fitted by least squares at `scheduler.step`, which tells, without knowing the pipeline, which row is the
condition (largest weight), which the unconditional one (negative weight), which calls are no part of the step (weight
zero), the slice (`view`) and the sign of a delta (the sum of the weights). Where one weight a row does not explain it,
each channel, frame or token has its own: Stable Video Diffusion's scale grows with the frames, and Lumina guides three
channels only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .fitting import fit

TOLERANCE = 1e-3
"""Relative residual under which the fitted combination is taken as the pipeline's own, in float32."""
UNRELATED = 0.5
"""Relative residual above which the denoiser's output cannot be what the scheduler was given."""


@dataclass(frozen=True)
class View:
    """The part of a denoiser row that reaches the scheduler: a slice along one dimension, another shape, or all.

    A negative `start` counts from the end, as rows with another text may be of another length. A row of tokens
    `[tokens, channels]` may first be laid out as `unpacked` `[channels, frames, height, width]`; what was cut may then
    take another `shape`, as a single frame does. Or a whole row `[channels, ...]` is `packed` into tokens.
    """

    dim: int = 0
    start: int = 0
    length: int | None = None
    shape: tuple[int, ...] | None = None
    unpacked: tuple[int, ...] | None = None
    packed: bool = False

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` `[batch, ...]`, cut or reshaped."""
        if self.packed:
            return rows.flatten(2).transpose(1, 2)
        if self.unpacked is not None:
            rows = rows.transpose(1, 2).reshape(len(rows), *self.unpacked)
        if self.length is not None:
            rows = rows.narrow(self.dim, self.start, self.length)
        return rows if self.shape is None else rows.reshape(len(rows), *self.shape)

    def transpose(self, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`part` put back into zeros of the shape of `like`: the transpose of `of`."""
        if self.packed:
            return part.transpose(1, 2).reshape(like.shape)
        if self.length is None:
            return part.reshape(like.shape)
        whole = torch.zeros_like(like) if self.unpacked is None else part.new_zeros(len(part), *self.unpacked)
        cut = whole.narrow(self.dim, self.start, self.length)
        cut.copy_(part.reshape(cut.shape))
        return whole if self.unpacked is None else whole.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Observation:
    """How one step's `model_output` came about.

    Args:
        weights: one per row group, in the order of the calls: a number, or one for each place along a dimension of
            what the scheduler was given `[1, ..., size, ..., 1]`.
        on_sample: the weight of x_t itself, 0 unless the pipeline converts the prediction.
        view: what is cut from each row.
        batch: images in the batch.
        copies: how often the combination is repeated along the batch (DiT hands the scheduler two copies).
        residual: relative error of the fit.
        certain: whether the weights can be told apart (false where two rows are equal).
        tolerance: residual that rounding in the model's precision may leave.
        held: parts that the pipeline sets whatever the denoiser says, such as given frames `[1, ..., size, ..., 1]`;
            nothing is added there. `None` if there are none.
    """

    weights: tuple[torch.Tensor, ...]
    on_sample: float
    view: View
    batch: int
    copies: int
    residual: float
    certain: bool
    tolerance: float = TOLERANCE
    held: torch.Tensor | None = None

    def kept(self, own: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """`edited` `[batch, ...]`, but for what the pipeline holds, which stays as in `own`."""
        return edited if self.held is None else torch.where(self.held, own, edited)

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The lower, the better it explains: to rounding, and then with nothing held.

        Where a picture is as high as there are frames, another cut may fit as well, if half of it is called held.
        """
        return not self.exact, self.held is not None, self.residual

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
        total, sums = sum(self._means), torch.stack(self.weights).sum(0)
        if not self.exact or self.rescaled or bool(sums.max() - sums.min() > 1e-2):
            return 1.0 if total >= 0 else -1.0
        nearest = round(total)
        return float(nearest) if nearest and abs(total - nearest) < 1e-2 else total

    @property
    def rescaled(self) -> bool:
        """Whether the pipeline seems to rescale its combination afterwards, so that the weights depend on the data."""
        if len(self.weights) < 2 or abs(self.on_sample) > TOLERANCE:
            return False
        total = torch.stack(self.weights).sum(0)
        rounding = min(max(1e-4, 10 * self.residual), 1e-2)
        return not self.exact or bool((total.mean().sign() * total - 1).abs().max() > rounding)

    @property
    def roles(self) -> tuple[str, ...]:
        """`"cond"`, `"uncond"`, or `"other"` for each row group, from the weights."""
        sign = -1.0 if sum(self._means) < 0 else 1.0
        weights = [sign * weight for weight in self._means]
        best = max(range(len(weights)), key=weights.__getitem__)
        lowest = min(range(len(weights)), key=weights.__getitem__)
        roles = ["other"] * len(weights)
        if weights[lowest] < -1e-4:
            roles[lowest] = "uncond"
        roles[best] = "cond"
        return tuple(roles)

    @property
    def _means(self) -> list[float]:
        return [weight.mean().item() for weight in self.weights]


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
            fitted = fit(columns, target, state, tolerance)
            found = Observation(
                fitted.weights, fitted.on_sample, view, batch, copies, fitted.residual, fitted.certain, tolerance,
                fitted.held,
            )  # fmt: skip
            if best is None or found.rank < best.rank:
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
        return _of_unequal([group.shape for group in groups], target.shape)
    if [size for size in shape[1:] if size > 1] == [size for size in target.shape[1:] if size > 1]:
        return [View() if shape == target.shape else View(shape=tuple(target.shape[1:]))]
    if len(shape) == 3 and target.ndim == 5 and shape[2] == target.shape[1]:
        return _unpacked(shape, target.shape)
    if len(shape) > target.ndim == 3 and target.shape[1:] == (shape[2:].numel(), shape[1]):
        return [View(packed=True)]
    if len(shape) == target.ndim + 1:
        one = tuple(target.shape[1:])
        frames = [dim for dim in range(1, len(shape)) if (*shape[1:dim], *shape[dim + 1 :]) == one]
        return [View(dim, start, 1, shape=one) for dim in frames for start in range(shape[dim])]
    if len(shape) != target.ndim:
        return []
    differing = [dim for dim in range(target.ndim) if shape[dim] != target.shape[dim]]
    if len(differing) > 1 or shape[differing[0]] < target.shape[differing[0]]:
        return []
    dim, length = differing[0], target.shape[differing[0]]
    return [View(dim, 0, length), View(dim, -length, length)]


def _of_unequal(shapes: Sequence[Sequence[int]], target: Sequence[int]) -> list[View]:
    """Rows that hold the sample beside more or fewer tokens of text, at their beginning or at their end."""
    if any(len(shape) != len(target) for shape in shapes):
        return []
    differing = {dim for shape in shapes for dim in range(1, len(target)) if shape[dim] != target[dim]}
    if len(differing) != 1 or any(shape[dim] < target[dim] for shape in shapes for dim in differing):
        return []
    dim = differing.pop()
    return [View(dim, 0, target[dim]), View(dim, -target[dim], target[dim])]


def _unpacked(shape: Sequence[int], target: Sequence[int]) -> list[View]:
    """Rows of tokens that become the frames of a video, of which the first or the last ones go on."""
    channels, length, height, width = target[1:]
    frames, rest = divmod(shape[1], height * width)
    if rest or frames < length:
        return []
    unpacked = (channels, frames, height, width)
    return [View(2, start, length, unpacked=unpacked) for start in dict.fromkeys((0, frames - length))]
