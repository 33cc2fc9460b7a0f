"""The measurement of steering: each image's value is kept, and methods are compared image by image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from garments import garments

from trimtab.benchmarks import steering
from trimtab.benchmarks.rows import Rows, paired, signed
from trimtab.benchmarks.steering_page import BASELINES, differences


def test_methods_are_compared_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: steering.METHODS[name] for name in (*BASELINES, "steered")}
    monkeypatch.setattr(steering, "METHODS", methods)
    monkeypatch.setattr(steering, "WEIGHTS", (2.0,))
    output = tmp_path / "steering"
    sizes = ["--count", "3", "--tuning", "2", "--steps", "1", "--data", garments(tmp_path, 3)]
    steering.main([*sizes, "--output", str(output)])
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    for task in steering.TASKS:
        each = {name: rows[f"{task}: {name}"]["each"] for name in methods}
        for name, values in each.items():
            assert np.mean(values) == pytest.approx(rows[f"{task}: {name}"]["psnr"][0], abs=1e-3) and len(values) == 3
        gained = np.subtract(each["steered"], each["plain replacement"])
        said = signed(gained.mean(), gained.std(ddof=1) / 3**0.5, 2)
        assert said in differences(rows, task) and said in output.with_suffix(".md").read_text()

    # A row without values for each image is measured anew, the others are kept.
    key = "inpainting: DPS"
    kept = Rows(output.with_suffix(".json"), json.loads(output.with_suffix(".json").read_text())["settings"])
    kept[key] = {name: value for name, value in kept[key].items() if name != "each"}
    monkeypatch.setattr(steering, "METHODS", {name: one for name, one in methods.items() if name == "DPS"})
    steering.main([*sizes, "--output", str(output)])
    again = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert again[key]["each"] == pytest.approx(rows[key]["each"], abs=1e-3)
    assert again["super-resolution: DPS"] == rows["super-resolution: DPS"]


def test_a_difference_image_by_image_is_narrower_than_those_of_both() -> None:
    assert paired([3.0, 5.0, 7.0], [1.0, 3.0, 5.0]) == (2.0, 0.0)
    assert signed(*paired([1.0, 3.0], [2.0, 2.0]), 2) == "+0.00 ± 1.96"


def test_lists_of_numbers_stand_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    Rows(file, {})["a"] = {"each": [1.5, -2e-05, 3], "label": "[1, 2]"}
    assert '"each": [1.5, -2e-05, 3]' in file.read_text()
    assert Rows(file, {})["a"] == {"each": [1.5, -2e-05, 3], "label": "[1, 2]"}
