"""The rows of one denoiser call: which of them are perturbed, from where on they differ, and what a part of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..guidance.branch import COND, Branch, Perturbation, Point
from .rows import AmbiguousRowsError


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

    def rows_of(self, branch: Branch) -> slice:
        """The rows of a branch that rides along."""
        first = self.branches.index(branch)
        return slice(first, first + self.branches.count(branch))

    def active(self, block: int) -> int:
        """How many rows (from the first) are computed in this outer block; all of them outside of the blocks, -1."""
        late = [segment.start for segment in self.segments if 0 <= block < segment.joins_at]
        return min([self.total, *late])


def may_join(branch: Branch, own: Sequence[Branch | None]) -> bool:
    """Whether a branch may ride along in a call with these rows: it is no call of its own, and its parent is there."""
    return not branch.apart and (branch.perturbation is None or Branch(branch.condition) in own)


def lay_out(
    own: Sequence[Branch | None], further: Sequence[Branch], joins_at: Callable[[Perturbation], int] | None = None,
    points: tuple[Point, ...] = (),
) -> tuple[Layout, dict[Branch, list[int]]]:  # fmt: skip
    """The rows of a call with those of further branches in it, and the own rows from which each of these is made.

    A further prompt is made from the conditional rows, a perturbed branch from those of its condition.

    Args:
        own: what each of the pipeline's own rows predicts; `None` where that is not known.
        further: the branches that ride along; those without a perturbation come first.
        joins_at: the outer block in which a perturbation begins; without it, perturbed rows share no blocks.

    Raises:
        AmbiguousRowsError: there are no rows from which a branch could be made.
    """
    perturbations = {branch: branch.perturbation for branch in further if branch.perturbation is not None}
    begins = {branch: -1 if joins_at is None else joins_at(changes) for branch, changes in perturbations.items()}
    parents, branches, segments = list(range(len(own))), list(own), []
    sources: dict[Branch, list[int]] = {}
    for branch in (*(one for one in further if one not in begins), *sorted(begins, key=begins.__getitem__)):
        made_from = [row for row, predicts in enumerate(own) if predicts == Branch(branch.condition)]
        if not made_from and branch not in begins:
            made_from = [row for row, predicts in enumerate(own) if predicts == COND]
        if not made_from:
            raise AmbiguousRowsError(f"no rows of {branch.condition} in this call")
        rows = range(len(parents), len(parents) + len(made_from))
        if branch in begins:
            segments.append(Segment(rows.start, rows.stop, perturbations[branch], begins[branch]))
        parents += made_from if branch in begins else rows
        branches += [branch] * len(rows)
        sources[branch] = made_from
    return Layout(len(parents), tuple(parents), tuple(segments), points, tuple(branches)), sources


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
