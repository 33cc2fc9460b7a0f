"""Where the sample lies in a denoiser's arguments, and the prediction in what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.errors import UnsupportedPipelineError


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
    """Position or name of the argument that holds the sample: the first tensor, or list of tensors, with dimensions."""
    named = [*(name for name in ("sample", "hidden_states") if name in kwargs), *kwargs]
    candidates: list[tuple[int | str, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in named)]
    for key, value in candidates:
        if (isinstance(value, torch.Tensor) and value.ndim > 1) or _is_list_of_rows(value):
            return key
    return None


def input_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of a denoiser call; `None` where the sample is a list, so that other lists may have rows as well."""
    key = sample_argument(args, kwargs)
    value = None if key is None else args[key] if isinstance(key, int) else kwargs[key]
    return int(value.shape[0]) if isinstance(value, torch.Tensor) else None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)
