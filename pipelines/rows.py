"""Rows: which parts of a denoiser's arguments belong to which image of the batch.

A denoiser call has as many rows as its sample. Extra branches ride along as further rows where every argument splits
into rows without doubt; where one does not, the branch is a whole call of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..guidance.errors import GuidanceRuntimeError

SHARED_NAMES = ("img_ids", "txt_ids", "latent_ids", "rotary", "freqs", "shapes")
"""Parts of the names of arguments that count tokens where others count rows, unless they have a dimension for each."""


class AmbiguousRowsError(Exception):
    """An argument of which nobody can tell whether it has rows."""


def is_shared(name: str, value: Any = None) -> bool:
    """Whether all rows share an argument of this name: positions `[tokens, axes]`, not `[rows, tokens, axes]`."""
    if isinstance(value, torch.Tensor) and value.ndim > 2:
        return False
    return any(part in name for part in SHARED_NAMES)


def map_tensors(value: Any, change: Callable[[torch.Tensor, str], torch.Tensor], name: str = "") -> Any:
    """`value` with `change(tensor, argument name)` applied to each tensor in it; containers keep their type."""
    if isinstance(value, torch.Tensor):
        return change(value, name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and isinstance(value, Mapping):
        return type(value)(**{key: map_tensors(item, change, key) for key, item in value.items()})
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change, str(key)) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change, name) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change, name) for item in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in `value`, in order."""
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor, name: str) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, collect)
    return found


def hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a block or layer is called on.

    Raises:
        GuidanceRuntimeError: it is given none.
    """
    for value in (*args[:1], *(kwargs.get(name) for name in ("hidden_states", "hidden_states_base", "x"))):
        if isinstance(value, torch.Tensor):
            return value
    raise GuidanceRuntimeError("a block was called without hidden states; its layers cannot be perturbed here")


def take_rows(value: Any, rows: int, index: torch.Tensor | slice, name: str = "") -> Any:
    """`value` with the rows `index` of every tensor whose first dimension is exactly `rows`."""

    def take(tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != rows or is_shared(name, tensor):
            return tensor
        return tensor[index if isinstance(index, slice) else index.to(tensor.device)]

    return map_tensors(value, take, name)


def index_of(rows: Sequence[int]) -> torch.Tensor | slice:
    """Rows as an index: a slice, which copies nothing, where they are neighbours."""
    whole = slice(rows[0], rows[-1] + 1)
    return whole if list(rows) == list(range(whole.start, whole.stop)) else torch.tensor(rows)


def check_splittable(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> None:
    """Raise `AmbiguousRowsError` unless every argument is shared or has exactly `rows` rows."""

    def check(value: Any, name: str) -> None:
        if is_shared(name, value):
            return
        if "cache" in name and value is not None:
            raise AmbiguousRowsError(f"{name} is written by the rows of earlier calls")
        if isinstance(value, torch.Tensor):
            # Text states of every layer `[layers, rows, tokens, channels]` may have as many layers as there are rows.
            stacked = "encoder" in name and value.ndim > 3 and value.shape[:2] == (rows, rows)
            positions = any(part in name for part in SHARED_NAMES) and not stacked
            if value.ndim and (stacked or value.shape[0] not in (rows, 1)) and not positions:
                raise AmbiguousRowsError(f"{name} has shape {tuple(value.shape)} in a call of {rows} rows")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                check(item, str(key))
        elif isinstance(value, (list, tuple)):
            # A list as long as there are rows may hold one entry a row, or tensors that have rows each.
            if len(value) == rows or not all(isinstance(item, (torch.Tensor, int, float)) for item in value):
                raise AmbiguousRowsError(f"{name} is a list of {len(value)}")
            for item in value:
                check(item, name)
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise AmbiguousRowsError(f"{name} is a {type(value).__name__}")

    for position, value in enumerate(args):
        check(value, f"argument {position}")
    for name, value in kwargs.items():
        check(value, name)


def join_rows(values: Sequence[Any], counts: Sequence[int], name: str = "") -> Any:
    """One argument structure from several of equal shape, the rows of each after those of the one before.

    A tensor counts as rows where its first dimension is `counts[i]` in every structure i; anything else must be
    the same in all of them.

    Raises:
        AmbiguousRowsError: tensors with rows that differ in another dimension, or others that differ.
    """
    first = values[0]
    if any((value is None) != (first is None) for value in values):
        raise AmbiguousRowsError(f"{name} is missing in another branch")
    if isinstance(first, torch.Tensor):
        tensors = list(values)
        if is_shared(name, first) or not first.ndim:
            return first
        if any(tensor.shape[0] != count for tensor, count in zip(tensors, counts, strict=True)):
            if not all(tensor is first or torch.equal(tensor, first.to(tensor)) for tensor in tensors[1:]):
                raise AmbiguousRowsError(f"{name} has fewer rows than the call, and they differ in another branch")
            return first
        if any(tensor.shape[1:] != first.shape[1:] for tensor in tensors):
            raise AmbiguousRowsError(f"{name} has another length in another branch")
        return torch.cat([tensor.to(first.dtype) for tensor in tensors])
    if isinstance(first, Mapping):
        return {key: join_rows([value[key] for value in values], counts, str(key)) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows(parts, counts, name) for parts in zip(*values, strict=True))
    return first
