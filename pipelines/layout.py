"""The rows of one denoiser call: which of them are perturbed, from where on they differ, and what a part of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..guidance.branch import Branch, Perturbation, Point


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows under one perturbation, and the outer block in which they part from their parents."""

    start: int
    stop: int
    perturbation: Perturbation
    joins_at: int


@dataclass(frozen=True)
class Layout:
    """The rows of one denoiser call.

    Args:
        total: number of rows.
        parents: for each row, the row that it equals until it joins; a row that is no branch is its own parent.
        segments: the perturbed rows, last in the batch, those that join first before those that join later.
        points: those that have attentions to watch.
        branches: what each row predicts; `None` where that is not known.
    """

    total: int
    parents: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    points: tuple[Point, ...] = ()
    branches: tuple[Branch | None, ...] = ()

    def active(self, block: int) -> int:
        """How many rows (from the first) are computed in this outer block; all of them outside of the blocks, -1."""
        late = [segment.start for segment in self.segments if 0 <= block < segment.joins_at]
        return min([self.total, *late])


def part_of(layout: Layout, rows: Sequence[int]) -> Layout:
    """The layout of a call with these rows of another, in the order of `in_order`.

    A row whose parent is not among them is computed from the first block on.
    """
    places = {row: place for place, row in enumerate(rows)}
    parents = tuple(places.get(layout.parents[row], place) for row, place in places.items())
    segments: list[Segment] = []
    place = 0
    for segment, members in groupby(segment for _, segment in _joining(layout, rows)):
        count = len(list(members))
        if segment is not None:
            segments.append(replace(segment, start=place, stop=place + count))
        place += count
    branches = tuple(layout.branches[row] for row in rows) if layout.branches else ()
    return Layout(len(rows), parents, tuple(segments), layout.points, branches)


def in_order(layout: Layout, rows: Sequence[int]) -> list[int]:
    """Rows of a layout in the order in which a call with these alone has them."""
    return [row for row, _ in _joining(layout, rows)]


def segments_by_row(layout: Layout) -> dict[int, Segment]:
    """The segment of each perturbed row."""
    return {row: segment for segment in layout.segments for row in range(segment.start, segment.stop)}


def _joining(layout: Layout, rows: Sequence[int]) -> list[tuple[int, Segment | None]]:
    """Rows in the order in which they join among themselves, each with the segment as which it does."""
    perturbed, found = segments_by_row(layout), []
    for row in sorted(rows):
        segment = perturbed.get(row)
        if segment is not None and layout.parents[row] not in rows:
            segment = replace(segment, joins_at=-1)
        found.append((row, segment))
    return sorted(found, key=lambda pair: (-2, 0) if pair[1] is None else (pair[1].joins_at, pair[1].start))
