"""The evidence table: rows are measured before and after, kept, refused in the words of the plug-in, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from zoo.class_conditional import class_conditional

from trimtab.benchmarks import evidence
from trimtab.benchmarks.evidence_page import BETTER, TAKEN, UNCLEAR, WORSE, page, taken, verdict
from trimtab.evaluation.evaluate import HIGHER, LOWER
from trimtab.guidance import listing, registry
from trimtab.pipelines.fashion.data import CLASS_NAMES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    class_conditional(list(CLASS_NAMES), side=16, prediction_type="v_prediction").save_pretrained(tmp_path / "model")
    (tmp_path / "real").mkdir()
    for index in range(8):
        Image.effect_noise((16, 16), 20.0 + index).save(tmp_path / "real" / f"{index}.png")
    sizes = ["--count", "10", "--batch", "4", "--steps", "2", "--repetitions", "9", "--timed", "1", "--turns", "1"]
    where = ["--model", str(tmp_path / "model"), "--reference", str(tmp_path / "real")]
    return [*sizes, *where, "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "evidence")]


def test_rows_are_measured_kept_and_shown(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: evidence.COMPARISONS[name] for name in ("pag", "perp_neg")}
    monkeypatch.setattr(evidence, "COMPARISONS", wanted)
    evidence.main([*command])
    (file,) = (tmp_path / "evidence").glob("*.json")
    rows: dict[str, Any] = json.loads(file.read_text())["rows"]
    pag, refused = rows["pag"], rows["perp_neg"]["refused"]
    assert (pag["before"]["evaluations"], pag["after"]["evaluations"]) == (2, 4)
    for name, change in pag["change"].items():
        before, after = (pag[side]["measures"][name]["value"] for side in ("before", "after"))
        assert change["value"] == pytest.approx(after - before)
    assert len(pag["times"]) == 1 and pag["times"][0] > 0
    assert "takes no prompts" in refused
    text = (tmp_path / "evidence.md").read_text()
    assert "* `sag` is not measured yet." in page(tmp_path / "evidence", ["pag", "sag"])
    assert f"* `perp_neg` cannot act on this model: {refused}" in text
    assert "| `pag:scale=1` | no guidance | kernel distance |" in text and "| 2 → 4 |" in text

    # Again: nothing is missing. One that is named is measured anew, from the same images to the same numbers.
    monkeypatch.setattr(evidence.Measurement, "_images", None)
    evidence.main([*command])
    monkeypatch.setattr(evidence.Measurement, "_times", lambda self, *cells: [1.0])
    evidence.main(["pag", *command])
    again = json.loads(file.read_text())["rows"]["pag"]
    assert again == {**pag, "times": [1.0]}


def test_every_built_in_plugin_is_on_the_page(tmp_path: Path) -> None:
    names = {name for name in registry.plugins() if listing.status(name)["distribution"] == "trimtab"}
    elsewhere = {name for name in names if f"| `{name}` |" in page(tmp_path, ())}
    assert elsewhere >= {row.plugin for row in TAKEN}
    assert names == elsewhere | evidence.COMPARISONS.keys()


def test_rows_of_other_benchmarks_are_read_from_their_files() -> None:
    lines = taken().splitlines()
    dps = next(line for line in lines if "| DPS, weight 8 |" in line)
    assert dps == "| `tfg` | DPS, weight 8 | PSNR of the hidden half, dB | 9.8 ± 0.2 | 15.0 ± 0.3 | 1 → 1 | 2.56 |"


@pytest.mark.parametrize(
    ("low", "high", "direction", "said"),
    [(0.1, 0.2, HIGHER, BETTER), (0.1, 0.2, LOWER, WORSE), (-0.2, -0.1, LOWER, BETTER), (-0.1, 0.1, HIGHER, UNCLEAR)],
)
def test_better_and_worse_are_said_of_differences_that_leave_out_0(
    low: float, high: float, direction: str, said: str
) -> None:
    assert verdict({"low": low, "high": high}, direction) == said
