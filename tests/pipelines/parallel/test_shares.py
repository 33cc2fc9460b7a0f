"""Which rows go where: the work ends as early as it can, and each share is a call that could stand alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.guidance.branch import Perturbation
from trimtab.pipelines.layout import Layout, Segment, part_of
from trimtab.pipelines.parallel.shares import load, shares

BLOCKS = 8


def layout(images: int = 1, *joins: int) -> Layout:
    """Unconditional and conditional rows, and one perturbed branch of the latter for each block that it joins in."""
    parents, segments = list(range(2 * images)), []
    for joins_at in joins:
        start = len(parents)
        segments.append(Segment(start, start + images, Perturbation((f"blocks.{joins_at}",)), joins_at))
        parents += range(images, 2 * images)
    return Layout(len(parents), tuple(parents), tuple(segments))


def test_a_row_goes_where_the_work_ends_first() -> None:
    assert shares(layout(1), 2, BLOCKS) == [[0], [1]]
    assert shares(layout(1, 6), 2, BLOCKS) == [[0], [1, 2]]  # 1.25 beside its parent, 2 beside the other
    assert shares(layout(1, 6), 3, BLOCKS) == [[0], [1], [2]]


def test_more_processes_than_rows_leave_some_without_any() -> None:
    assert shares(layout(1), 4, BLOCKS) == [[0], [1], [], []]


@dataclass(frozen=True)
class Case:
    layout: Layout
    processes: int


cases = st.builds(
    lambda images, joins, processes: Case(layout(images, *sorted(joins)), processes),
    st.integers(1, 4),
    st.lists(st.integers(-1, BLOCKS - 1), max_size=4),
    st.integers(1, 6),
)


@given(cases)
def test_every_row_is_computed_once_and_no_slower_than_by_one(case: Case) -> None:
    held = shares(case.layout, case.processes, BLOCKS)
    assert sorted(row for rows in held for row in rows) == list(range(case.layout.total))
    slowest = max(load(case.layout, rows, BLOCKS) for rows in held)
    alone = load(case.layout, range(case.layout.total), BLOCKS)
    assert alone / case.processes - 1e-9 <= slowest <= alone + 1e-9


@given(cases)
def test_a_share_is_a_layout_of_its_own(case: Case) -> None:
    for rows in shares(case.layout, case.processes, BLOCKS):
        part = part_of(case.layout, rows)
        assert part.total == len(rows)
        perturbed = {row: segment for segment in part.segments for row in range(segment.start, segment.stop)}
        whole = {row: segment for segment in case.layout.segments for row in range(segment.start, segment.stop)}
        for place, row in enumerate(rows):
            assert (perturbed[place].perturbation if place in perturbed else None) == (
                whole[row].perturbation if row in whole else None
            )
            parent = part.parents[place]
            if case.layout.parents[row] in rows:
                assert rows[parent] == case.layout.parents[row]
            else:
                assert parent == place and perturbed[place].joins_at == -1
        starts = [segment.joins_at for segment in part.segments]
        assert starts == sorted(starts) and all(place >= part.total - len(perturbed) for place in perturbed)


@pytest.mark.parametrize("rows", [[0], [1], [2], [1, 2]])
def test_a_row_costs_less_beside_its_parent_only(rows: list[int]) -> None:
    expected = {(0,): 1.0, (1,): 1.0, (2,): 1.0, (1, 2): 1.25}
    assert load(layout(1, 6), rows, BLOCKS) == expected[tuple(rows)]
