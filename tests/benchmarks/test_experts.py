"""What PPAP owes to its experts: the page is what the rows say."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from trimtab.benchmarks.experts import ARMS, LORAS, WINDOWS
from trimtab.benchmarks.experts_page import by_arm, page, spread, windows

DOCS = Path(__file__).parents[2] / "docs"
ROWS = json.loads((DOCS / "experts.json").read_text())


def test_the_page_of_the_documentation_is_made_of_the_rows_beside_it() -> None:
    text = (DOCS / "experts.md").read_text()
    command = text.split("Made by\n\n    ")[1].splitlines()[0]
    args = Namespace(count=ROWS["settings"]["count"], expert_steps=ROWS["settings"]["expert_steps"])
    assert page(ROWS["rows"], command, args) == text


def test_there_is_a_row_for_each_training_window_and_lora() -> None:
    arms = by_arm(ROWS["rows"])
    assert list(arms) == [f"{count} of {times * ROWS['settings']['expert_steps']}" for count, times in ARMS]
    assert [len(trained) for trained in arms.values()] == [2 if times == 1 else 1 for _, times in ARMS]
    assert sum("window" in row for row in ROWS["rows"].values()) == 2 * len(WINDOWS)
    assert sum("share" in row for row in ROWS["rows"].values()) == len(LORAS)


@pytest.mark.parametrize(
    ("values", "text"), [([0.5], "0.50"), ([0.25, 0.75], "0.50 (0.25 to 0.75)"), ([1.0, 1.0], "1.00 (1.00 to 1.00)")]
)
def test_of_several_trainings_the_lowest_and_the_highest_are_said(values: list[float], text: str) -> None:
    assert spread(values, 2) == text


def test_each_part_of_the_run_stands_beside_all_of_it() -> None:
    lines = windows(ROWS["rows"]).splitlines()[2:]
    parts = [line.split(" | ")[1] for line in lines]
    assert parts == ["all of the run", *WINDOWS] * 2
