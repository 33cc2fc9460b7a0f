"""The measurement's bookkeeping: configurations, bytes, which rows are compared, what the page says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.benchmarks.images import contact_sheet, from_bytes, to_bytes
from trimtab.benchmarks.quality import REAL, differences, parse_configuration
from trimtab.benchmarks.report import COLUMNS, table
from trimtab.evaluation.distances import Estimate


@pytest.mark.parametrize(
    ("text", "guidances"),
    [
        ("none", {}),
        ("pag=1.5", {"pag": {"scale": 1.5}}),
        ("cfg=2+pag=1@down,mid", {"cfg": {"scale": 2.0}, "pag": {"scale": 1.0, "layers": ("down", "mid")}}),
    ],
)
def test_a_configuration_is_none_or_a_sum_of_guidances(text: str, guidances: dict[str, Any]) -> None:
    assert parse_configuration(text) == guidances


@pytest.mark.parametrize("text", ["cfg", "cfg=", "cfg=2,pag=1", "", "cfg=2+", "cfg=two", "pag=1@", "pag=1+pag=2"])
def test_any_other_configuration_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: 'none', or 'NAME=SCALE'"):
        parse_configuration(text)


def test_bytes_survive_the_round_trip_and_values_beyond_the_range_are_clipped() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_each_configuration_is_compared_with_those_that_have_one_guidance_less() -> None:
    row = {"accuracy": Estimate(0.5, (0.4, 0.6))}
    names = (REAL, "none", "cfg=2", "pag=1", "pag=2", "cfg=2+pag=1")
    assert set(differences(dict.fromkeys(names, row))) == {
        "cfg=2 minus none",
        "pag=1 minus none",
        "pag=2 minus none",
        "cfg=2+pag=1 minus cfg=2",
        "cfg=2+pag=1 minus pag=1",
    }


def test_the_table_has_a_line_a_row_and_signs_where_they_are_asked_for() -> None:
    row = {key: {"value": 0.25, "error": 0.01} for key in COLUMNS}
    assert table({"none": row}).splitlines()[2].startswith("| none | 0.2500 ± 0.0100 | 0.25 ± 0.01 |")
    assert table({"a minus b": row}, signed=True).splitlines()[2].startswith("| a minus b | +0.2500 ± 0.0100 |")


def test_the_contact_sheet_has_a_line_a_configuration() -> None:
    images = torch.zeros(30, 1, 32, 32, dtype=torch.uint8)
    assert contact_sheet({"none": images, "pag=1": images}, columns=20).size == (2 * 20 * 32, 2 * 2 * 32)
