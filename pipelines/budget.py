"""A memory budget: a forward call whose rows do not fit is made in pieces, each of them a call of fewer rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from ..guidance.branch import Point
from ..guidance.errors import ParameterError, TrimtabError
from .layout import Layout, in_order, part_of
from .perturbation import Perturber
from .rows import AmbiguousRowsError, check_splittable, index_of, map_tensors, take_rows, tensors_in

logger = logging.getLogger("trimtab")

ROWS = ("auto", "batched", "sequential")
"""What `guidance_rows` may be: how a step's branches become calls."""


@dataclass
class Budget:
    """How many rows one forward call of a run may have.

    Args:
        rows: the most; `None` as long as any number fits.
        splits: whether a call may be made in pieces.

    Raises:
        ParameterError: `rows` is no such number.
    """

    rows: int | None = None
    splits: bool = True

    def __post_init__(self) -> None:
        if self.rows is not None and (not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1):
            raise ParameterError(
                f"guidance_max_rows={self.rows!r}; allowed: a whole number >= 1, or None for no limit."
            )

    def to_numbers(self) -> tuple[float, float]:
        """The same as numbers, of which the lowest are what fits in each of several processes."""
        return math.inf if self.rows is None else float(self.rows), float(self.splits)

    def tighten(self, rows: float, splits: float) -> None:
        """Take over such numbers."""
        self.rows, self.splits = None if math.isinf(rows) else int(rows), bool(splits)

    def call(
        self, perturber: Perturber, original: Callable[..., Any], layout: Layout, args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """`perturber.call` with at most `rows` rows at a time, fewer from here on where they do not fit into memory.

        A call whose arguments do not split into rows stays whole.

        Raises:
            torch.OutOfMemoryError: a whole call, or one row, does not fit.
        """
        while self.splits and _splits(args, kwargs, layout.total):
            most = min(layout.total, self.rows or layout.total)
            try:
                return _in_pieces(perturber, original, layout, args, kwargs, most)
            except (AmbiguousRowsError, IndexError, RuntimeError, TypeError, ValueError) as error:
                full = is_out_of_memory(error)
                if isinstance(error, TrimtabError) or most == (1 if full else layout.total):
                    raise
                if full:
                    self.rows = -(-most // 2)
                    logger.warning("%d rows do not fit into memory: at most %d a call from here on", most, self.rows)
                else:
                    # Something among the arguments has no rows although it looked so, such as one mask for the batch.
                    self.splits = False
        return perturber.call(original, layout, args, kwargs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    known = isinstance(error, Exception) and should_reduce_batch_size(error)
    return known or isinstance(error, torch.OutOfMemoryError)


def pieces(parents: Sequence[int], most: int) -> list[list[int]]:
    """Rows in pieces of at most `most`; a row is put beside its parent, with which it shares blocks, where both fit.

    Args:
        parents: for each row, the row that it follows from.
    """
    families: dict[int, list[int]] = {}
    for row, parent in enumerate(parents):
        families.setdefault(parent, []).append(row)
    parts = [rows[start : start + most] for rows in families.values() for start in range(0, len(rows), most)]
    found: list[list[int]] = []
    for part in sorted(parts, key=len, reverse=True):
        room = next((piece for piece in found if len(piece) + len(part) <= most), None)
        if room is None:
            found.append(list(part))
        else:
            room += part
    return found


def _in_pieces(
    perturber: Perturber, original: Callable[..., Any], layout: Layout, args: Sequence[Any],
    kwargs: Mapping[str, Any], most: int,
) -> Any:  # fmt: skip
    if layout.total <= most:
        return perturber.call(original, layout, args, kwargs)
    split = [in_order(layout, rows) for rows in pieces(layout.parents, most)]
    order = torch.tensor([row for rows in split for row in rows]).argsort()
    outputs: list[Any] = []
    watched: dict[tuple[Point, str], list[torch.Tensor]] = {}
    for rows in split:
        own_args, own_kwargs = take_rows((tuple(args), dict(kwargs)), layout.total, index_of(rows))
        outputs.append(perturber.call(original, part_of(layout, rows), own_args, own_kwargs))
        if any(tensor.ndim == 0 or len(tensor) != len(rows) for tensor in tensors_in(outputs[-1])):
            raise AmbiguousRowsError(f"the denoiser returned something else than {len(rows)} rows")
        for key, kept in perturber.watched.items():
            watched.setdefault(key, []).append(kept)
    perturber.watched = {key: _joined(kept, order) for key, kept in watched.items()}
    whole = iter([_joined(parts, order) for parts in zip(*map(tensors_in, outputs), strict=True)])
    return map_tensors(outputs[0], lambda tensor, name: next(whole))


def _joined(parts: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """The rows of all pieces in their order in the call."""
    return torch.cat(list(parts))[order.to(parts[0].device)]


def _splits(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> bool:
    try:
        check_splittable(args, kwargs, rows)
    except AmbiguousRowsError:
        return False
    return True
