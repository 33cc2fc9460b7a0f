"""Turns: each piece of work is done by one group, and by all of it, and by nobody of an earlier launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.pipelines.generate.request import RequestError
from trimtab.pipelines.generate.turns import Turns


def begun(folder: Path, launch: str = "one") -> Turns:
    turns = Turns(folder, launch)
    turns.begin()
    return turns


def test_each_piece_is_taken_once_by_who_asks_first(tmp_path: Path) -> None:
    fast, slow = begun(tmp_path).take(0, 5), Turns(tmp_path, "one").take(1, 5)
    assert [next(slow), next(fast), next(fast), next(fast), next(slow)] == [0, 1, 2, 3, 4]
    assert not list(fast) and not list(slow)


def test_processes_of_a_group_take_the_same_pieces(tmp_path: Path) -> None:
    begun(tmp_path)
    first, second, others = (Turns(tmp_path, "one").take(group, 4) for group in (0, 0, 1))
    assert [next(first), next(others), next(first)] == [0, 1, 2]
    assert [next(second), next(second), next(second)] == [0, 2, 3]
    assert list(first) == [3] and not list(others)


def test_a_batch_that_is_begun_again_has_all_its_turns(tmp_path: Path) -> None:
    for launch in ("one", "two"):
        assert list(begun(tmp_path, launch).take(0, 2)) == [0, 1]


def test_who_outlived_an_earlier_launch_goes_no_further(tmp_path: Path) -> None:
    orphan = begun(tmp_path, "one")
    taking = orphan.take(0, 4)
    assert next(taking) == 0
    others = begun(tmp_path, "two").take(0, 4)
    with pytest.raises(RequestError, match="another command has begun to make images there; this one ends"):
        next(taking)
    with pytest.raises(RequestError, match="this one ends"), orphan.held():
        raise AssertionError("its row would be counted")
    assert list(others) == [0, 1, 2, 3]
