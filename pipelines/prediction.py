"""Where the sample lies in a denoiser's arguments, and the prediction in what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.errors import UnsupportedPipelineError


def is_prediction(output: Any) -> bool:
    """Whether a denoiser's call returned anything; one that only fills a cache does not."""
    if dataclasses.is_dataclass(output):
        output = getattr(output, dataclasses.fields(output)[0].name)
    return output is not None and not (isinstance(output, tuple) and output[:1] == (None,))


def primary(output: Any) -> torch.Tensor:
    """The prediction `[rows, ...]` within what a denoiser or a scheduler returned; a list holds one tensor a row.

    Raises:
        UnsupportedPipelineError: there is none, or the rows of a list differ in size.
    """
    if isinstance(output, torch.Tensor):
        return output
    if dataclasses.is_dataclass(output):
        output = tuple(getattr(output, item.name) for item in dataclasses.fields(output))
    if _is_list_of_rows(output):
        if any(row.shape != output[0].shape for row in output):
            raise UnsupportedPipelineError("a denoiser returned images of different sizes; guide one size at a time")
        return torch.stack(output)
    if isinstance(output, (tuple, list)) and output:
        return primary(output[0])
    raise UnsupportedPipelineError(f"a denoiser returned a {type(output).__name__}, in which no prediction was found")


def beside_primary(output: Any) -> tuple[torch.Tensor, ...]:
    """The other tensors `[rows, ...]` that a denoiser returned."""
    if dataclasses.is_dataclass(output):
        output = tuple(getattr(output, item.name) for item in dataclasses.fields(output))
    others = output[1:] if isinstance(output, tuple) else ()
    return tuple(other for other in others if isinstance(other, torch.Tensor))


def with_primary(output: Any, prediction: torch.Tensor) -> Any:
    """`output` with its prediction replaced."""
    if isinstance(output, torch.Tensor):
        return prediction
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        name = dataclasses.fields(output)[0].name
        return dataclasses.replace(output, **{name: with_primary(getattr(output, name), prediction)})
    if _is_list_of_rows(output):
        return list(prediction)
    return type(output)((with_primary(output[0], prediction), *output[1:]))


def sample_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Position or name of the argument that holds the sample: the first tensor, or list of tensors, with dimensions.

    A row may be a list itself, of given pictures and the sample. Positions are none, although a packed sequence may
    bring them first and as fractions.
    """
    named = [*(name for name in ("sample", "hidden_states") if name in kwargs), *kwargs]
    named = [name for name in named if not name.endswith(("_ids", "_indexes"))]
    candidates: list[tuple[int | str, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in named)]
    for key, value in candidates:
        if (isinstance(value, torch.Tensor) and value.ndim > 1) or _is_list_of_rows(value) or _is_list_of_lists(value):
            return key
    return None


def input_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a denoiser call; `None` where the sample is a list, so that other lists may have rows as well."""
    key = sample_argument(args, kwargs)
    value = None if key is None else args[key] if isinstance(key, int) else kwargs[key]
    return int(value.shape[0]) if isinstance(value, torch.Tensor) else None


def with_sample_at(
    args: Sequence[Any], kwargs: Mapping[str, Any], rows: Sequence[int], sample: torch.Tensor, point: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The denoiser's arguments with another x_t in some rows, scaled as the pipeline scaled x_t.

    Args:
        rows: which rows.
        sample: their x_t `[batch, ...]`.
        point: the other one, of the same shape.

    Raises:
        UnsupportedPipelineError: x_t is not found in the denoiser's input.
    """
    key = sample_argument(args, kwargs)
    given = None if key is None else args[key] if isinstance(key, int) else kwargs[key]
    moved = None if given is None else primary(given).clone()
    place = None if moved is None else locate(moved[list(rows)], sample)
    if key is None or moved is None or place is None:
        raise UnsupportedPipelineError(
            "x_t was not found in the denoiser's input, so the denoiser cannot be evaluated at another point."
        )
    dim, start, factor = place
    for row, x in zip(rows, point, strict=True):
        part = moved[row : row + 1].narrow(dim, start, sample.shape[dim]) if dim else moved[row : row + 1]
        part.copy_((factor * x).reshape(part.shape))
    value = with_primary(given, moved)
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, key: value}


def locate(given: torch.Tensor, sample: torch.Tensor) -> tuple[int, int, float] | None:
    """Where x_t lies in a denoiser's input `[batch, ...]`: dimension, start, and factor; `None` if nowhere.

    Dimension 0 stands for the whole input, possibly in another shape.
    """
    if given.numel() == sample.numel():
        places = [(0, 0, given.reshape(sample.shape))]
    elif given.ndim == sample.ndim:
        spare = [(dim, given.shape[dim] - sample.shape[dim]) for dim in range(1, sample.ndim)]
        places = [
            (dim, start, given.narrow(dim, start, sample.shape[dim]))
            for dim, extra in spare
            if extra > 0
            for start in sorted({0, extra})
        ]
    else:
        places = []
    for dim, start, part in places:
        if part.shape != sample.shape:
            continue
        if torch.equal(part, sample):
            return dim, start, 1.0
        wanted, x = part.cpu().double(), sample.cpu().double()  # not every device has doubles
        factor = float((wanted * x).sum() / x.square().sum().clamp_min(1e-30))
        if (wanted - factor * x).norm() <= 1e-2 * wanted.norm():
            return dim, start, factor
    return None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_list_of_rows(row) for row in value)
