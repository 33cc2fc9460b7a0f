"""Turns: each piece of work is done by one group, and by all of it."""

from __future__ import annotations

from pathlib import Path

from trimtab.pipelines.generate.turns import Turns


def test_each_piece_is_taken_once_by_who_asks_first(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    turns.clear()
    fast, slow = turns.take(0, 5), Turns(tmp_path).take(1, 5)
    assert [next(slow), next(fast), next(fast), next(fast), next(slow)] == [0, 1, 2, 3, 4]
    assert not list(fast) and not list(slow)


def test_processes_of_a_group_take_the_same_pieces(tmp_path: Path) -> None:
    Turns(tmp_path).clear()
    first, second, others = (Turns(tmp_path).take(group, 4) for group in (0, 0, 1))
    assert [next(first), next(others), next(first)] == [0, 1, 2]
    assert [next(second), next(second), next(second)] == [0, 2, 3]
    assert list(first) == [3] and not list(others)


def test_a_batch_that_is_begun_again_has_all_its_turns(tmp_path: Path) -> None:
    for _ in range(2):
        Turns(tmp_path).clear()
        assert list(Turns(tmp_path).take(0, 2)) == [0, 1]
