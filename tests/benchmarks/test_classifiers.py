"""The measurement of classifiers: rows are kept and taken up again, pages show what there is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from garments import garments

import trimtab
from trimtab.adapters.weights import load_weights
from trimtab.benchmarks.classifiers import LEAST, MOST, Configurations, search
from trimtab.benchmarks.classifiers_page import differences, table, tried
from trimtab.benchmarks.rows import Rows, interval

ROW = {"scale": 2.0, "accuracy": [0.5, [0.4, 0.6]], "frechet": [10.0, [9.0, 11.0]]}


def test_rows_are_kept_as_they_come_and_only_for_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    Rows(file, {"count": 100})["plain classifier"] = ROW
    assert dict(Rows(file, {"count": 100})) == {"plain classifier": ROW}
    assert not Rows(file, {"count": 200})


@pytest.mark.parametrize(
    ("best", "ends"),
    [(1.0, (0.5, 2.0)), (0.2, (0.125, 2.0)), (9.0, (0.5, 16.0)), (0.0, (LEAST, 2.0)), (1e9, (0.5, MOST))],
)
def test_scales_are_searched_until_the_best_lies_inside(best: float, ends: tuple[float, float]) -> None:
    found = search(lambda scale: abs(scale - best), (0.5, 1.0, 2.0))
    assert (min(found), max(found)) == ends
    row = {"scale": 1.0, "tried": {str(scale): value for scale, value in found.items()}}
    assert tried({"a row": row}).splitlines()[2].count("**") == 2


def test_the_interval_is_twice_the_standard_error() -> None:
    assert interval(0.5, 0.1, 2) == "0.50 ± 0.20"


def test_the_page_shows_the_rows_and_differences_that_there_are() -> None:
    rows = {"plain classifier": ROW, "+ sine schedule (EluCD)": {**ROW, "accuracy": [0.75, [0.65, 0.85]]}}
    # The jackknife of two groups has the standard error |a - b| / 2; paired, equal shifts have none.
    assert table(rows).splitlines()[2] == "| plain classifier | 2 | 0.500 ± 0.196 | 10.0 ± 2.0 |"
    assert differences(rows).splitlines()[2:] == [
        "| + sine schedule (EluCD) minus plain classifier | 0.250 ± 0.000 | 0.0 ± 0.0 |"
    ]


def test_the_images_that_experts_learn_from_are_the_model_s_own(tmp_path: Path) -> None:
    """Also where the row before has left its guidance attached."""
    pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
    sizes = {"generated": 40, "steps": 1, "guide_steps": 1, "autocast": False}
    images = {}
    for name in ("alone", "after a row"):
        args = Namespace(cache=tmp_path / name, data=garments(tmp_path, 200), **sizes)
        configurations = Configurations(pipe, args)
        if name != "alone":
            pipe.add_guidance("classifier", classifier=configurations.guide, target=0, scale=100.0)
        configurations.experts("ppap", experts=1, rank=1, steps=1)
        (file,) = (args.cache / "images").glob("*.safetensors")
        images[name] = load_weights(file).tensors["images"]
    assert torch.equal(images["alone"], images["after a row"])
