"""A folder is one set of images: of one size, and made alike, or its reader is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trimtab.evaluation.folders import read_folder
from trimtab.pipelines.generate import pictures


def fill(folder: Path, *settings: dict[str, Any]) -> Path:
    for index, one in enumerate(settings):
        pictures.save(Image.new("L", (8, 8), 30 * index), folder / f"{index}.png", one)
    return folder


def test_images_that_differ_in_seed_and_subject_are_one_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, {"seed": 0, "prompt": "a fox", "steps": 4}, {"seed": 1, "prompt": "a cat", "steps": 4})
    Image.new("L", (8, 8)).save(tmp_path / "foreign.jpg")
    assert len(read_folder(tmp_path)) == 3 and not caplog.records


def test_images_of_several_settings_are_announced_with_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = {"seed": 0, "steps": 4, "guidance": {"guidances": []}}
    fill(tmp_path, one, {**one, "guidance": {"guidances": [{"name": "pag"}]}}, {**one, "steps": 8})
    read_folder(tmp_path)
    (record,) = caplog.records
    assert "made with several settings (guidance, steps): they are measured as one set" in record.getMessage()
