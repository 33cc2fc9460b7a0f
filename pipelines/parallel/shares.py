"""Which rows of a denoiser call each process computes, and what these cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from ..perturbation import Layout, Segment


def shares(layout: Layout, processes: int, blocks: int) -> list[list[int]]:
    """The rows of each process, in the order in which it computes them; some may get none.

    Each row in turn goes where the work that it adds ends first. A perturbed row costs less beside its parent, with
    which it shares the blocks before its own.

    Args:
        blocks: outer blocks of the denoiser, which are taken to cost the same.
    """
    loads, held = [0.0] * processes, [[] for _ in range(processes)]  # type: list[float], list[list[int]]
    for row in range(layout.total):
        ends = [loads[process] + cost(layout, row, held[process], blocks) for process in range(processes)]
        first = min(range(processes), key=ends.__getitem__)
        loads[first] = ends[first]
        held[first].append(row)
    return [[row for row, _ in _joining(layout, rows)] for rows in held]


def cost(layout: Layout, row: int, beside: Sequence[int], blocks: int) -> float:
    """What a row adds to a call that holds the rows `beside`; a row that runs through the whole denoiser is 1."""
    segment = _segments_by_row(layout).get(row)
    if segment is None or segment.joins_at <= 0 or layout.parents[row] not in beside:
        return 1.0
    return 1.0 - segment.joins_at / blocks


def load(layout: Layout, rows: Sequence[int], blocks: int) -> float:
    """What a call with these rows of the layout costs."""
    return sum(cost(layout, row, rows, blocks) for row in rows)


def part_of(layout: Layout, rows: Sequence[int]) -> Layout:
    """The layout of a call with these rows of another, in the order of `shares`.

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


def _segments_by_row(layout: Layout) -> dict[int, Segment]:
    return {row: segment for segment in layout.segments for row in range(segment.start, segment.stop)}


def _joining(layout: Layout, rows: Sequence[int]) -> list[tuple[int, Segment | None]]:
    """Rows in the order in which they join among themselves, each with the segment as which it does."""
    perturbed, found = _segments_by_row(layout), []
    for row in sorted(rows):
        segment = perturbed.get(row)
        if segment is not None and layout.parents[row] not in rows:
            segment = replace(segment, joins_at=-1)
        found.append((row, segment))
    return sorted(found, key=lambda pair: (-2, 0) if pair[1] is None else (pair[1].joins_at, pair[1].start))
