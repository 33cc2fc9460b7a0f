"""The model of a batch's time: its limits, and that its pieces can be measured."""

from __future__ import annotations

import pytest

from trimtab.benchmarks.scale import Pieces, measure


def test_one_device_does_everything_and_many_are_bounded_by_the_start() -> None:
    pieces = Pieces(start=5.0, evaluation=0.1, image=1.0, append=0.01)
    assert pieces.seconds(100, 50, 1) == pytest.approx(5 + 100 * 6)
    assert pieces.seconds(100, 50, 3) == pytest.approx(5 + 34 * 6 + 2 * 0.01)
    assert pieces.seconds(100, 50, 100) == pytest.approx(5 + 6 + 99 * 0.01)
    assert pieces.most_devices(50) == 600


def test_pieces_are_measured() -> None:
    found = measure("trimtab/embedded", "Bag", None, 1, 3, 1)
    assert found.start > 0 and found.image >= found.append > 0
