"""The model of a batch's time: its limits, that its pieces can be measured, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.class_conditional import class_conditional

from trimtab.benchmarks.scale import Pieces, making, page


def test_one_device_does_everything_and_many_are_bounded_by_the_start() -> None:
    pieces = Pieces(start=5.0, evaluation=0.1, image=1.0, append=0.01)
    assert pieces.seconds(100, 50, 1) == pytest.approx(5 + 100 * 6)
    assert pieces.seconds(100, 50, 3) == pytest.approx(5 + 34 * 6 + 2 * 0.01)
    assert pieces.seconds(100, 50, 100) == pytest.approx(5 + 6 + 99 * 0.01)
    assert pieces.most_devices(50) == 600


def test_pieces_are_measured(tmp_path: Path) -> None:
    class_conditional(["Cat"], side=16).save_pretrained(tmp_path)
    evaluation, image, append = making(str(tmp_path), "Cat", None, repeats=3, few=1, many=9)
    assert evaluation > 0 and image >= append > 0


def test_the_page_sets_batches_beside_the_model() -> None:
    pieces = {"start": 5.0, "evaluation": 0.1, "image": 1.0, "append": 0.01}
    result = {
        "command": "python -m benchmarks.scale", "machine": "a machine", "note": "", "model": "trimtab/fashion",
        "repeats": 5, "images": 7200, "evaluations": 50, "pieces": pieces,
        "batch": {"images": 10, "steps": 50, "seconds": {"1": 66.0, "2": 33.0}},
    }  # fmt: skip
    lines = page(result).splitlines()
    assert "| 1 process | 66.0 | 65.0 | 1.00 |" in lines and "| 2 processes | 33.0 | 35.0 | 2.00 |" in lines
    assert "| 1 | 12 | 0.167 |" in lines
