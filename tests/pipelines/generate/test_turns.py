"""Turns: each piece of work is done by one group, and by all of it, and by nobody of an earlier launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.pipelines.generate.request import RequestError
from trimtab.pipelines.generate.turns import FILE, Turns


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


@pytest.mark.parametrize("unfinished", [b"1", b"11111"])
def test_a_turn_that_a_killed_process_did_not_take_to_its_end_is_nobodys(tmp_path: Path, unfinished: bytes) -> None:
    """Of group 11, say, whose line was cut off."""
    first, second = begun(tmp_path).take(0, 3), Turns(tmp_path, "one").take(1, 3)
    assert [next(first), next(second)] == [0, 1]
    with (tmp_path / FILE).open("ab") as file:
        file.write(unfinished)
    assert list(first) == [2] and not list(second)
    assert list(Turns(tmp_path, "one").take(1, 3)) == [1], "as whoever comes late reads it"


def test_turns_whose_beginning_was_cut_off_are_those_of_another_launch(tmp_path: Path) -> None:
    turns = begun(tmp_path)
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(RequestError, match="this one ends"):
        next(turns.take(0, 2))
