"""Which rows of a denoiser call each process computes, and what these cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..layout import Layout, in_order, segments_by_row


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
    return [in_order(layout, rows) for rows in held]


def cost(layout: Layout, row: int, beside: Sequence[int], blocks: int) -> float:
    """What a row adds to a call that holds the rows `beside`; a row that runs through the whole denoiser is 1."""
    segment = segments_by_row(layout).get(row)
    if segment is None or segment.joins_at <= 0 or layout.parents[row] not in beside:
        return 1.0
    return 1.0 - segment.joins_at / blocks


def load(layout: Layout, rows: Sequence[int], blocks: int) -> float:
    """What a call with these rows of the layout costs."""
    return sum(cost(layout, row, rows, blocks) for row in rows)
