"""`trimtab models`: what ships, where it came from, and what makes the others."""

from __future__ import annotations

import json

import pytest

import trimtab
from trimtab import cli


def test_what_ships_loads_by_its_name_and_is_within_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shipped = [row for row in rows if row["ships"]]
    assert shipped
    for row in shipped:
        trimtab.GuidedPipeline.from_pretrained(row["name"])
        assert 0 < row["megabytes"] <= 25 and row["licence"]


def test_every_model_says_its_data_with_licence_and_what_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert text.count("data: ") == text.count("made by: ") == text.count("ships") + text.count("not shipped")
    assert "emoji-flux" in text and "CC-BY 4.0" in text
