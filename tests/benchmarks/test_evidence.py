"""The evidence table: rows are measured before and after, kept, refused in the words of the plug-in, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from npm_archives import write_archives, write_packed
from PIL import Image
from zoo.class_conditional import class_conditional

from trimtab.benchmarks import evidence, evidence_data
from trimtab.benchmarks.evidence_page import page
from trimtab.benchmarks.evidence_taken import CONTROLLED, FRECHET, PSNR, TAKEN, Taken, controls, gradients
from trimtab.benchmarks.evidence_words import BETTER, UNCLEAR, WORSE, verdict
from trimtab.evaluation.evaluate import HIGHER, LOWER
from trimtab.evaluation.folders import read_folder
from trimtab.guidance import listing, registry
from trimtab.pipelines.emoji.data import EmojiData
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
    assert elsewhere == {row.plugin for row in (*TAKEN, *CONTROLLED)}
    assert names == elsewhere | evidence.COMPARISONS.keys()


def test_prompts_and_references_of_an_emoji_model_are_the_held_out_drawings(tmp_path: Path) -> None:
    packed = write_packed(write_archives(tmp_path), tmp_path / "emoji.safetensors")
    count = len(EmojiData(packed, held_out=True).drawings)
    prompts, drawings = evidence_data.emoji(tmp_path / "real", packed, "", count + 1)
    lines = prompts.read_text().splitlines()
    assert len(lines) == count + 1 and lines[0] == lines[count]
    pictures = read_folder(drawings)
    assert [one["prompt"] for one in pictures.batch(0).settings] == lines[:count]


def kept(folder: Path, name: str, rows: dict[str, Any]) -> None:
    """What a benchmark wrote."""
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows, "settings": {"count": 10, "turns": 3}}))


def test_differences_of_other_benchmarks_are_paired_where_pairs_were_kept_and_else_as_wide_as_can_be(
    tmp_path: Path,
) -> None:
    kept(tmp_path, "steering", {
        "none": {"psnr": [10.0, 0.1], "seconds": 2.0}, "in: DPS": {"psnr": [15.0, 0.2], "seconds": 5.0, "weight": 8.0}
    })  # fmt: skip
    kept(tmp_path, "classifiers", {
        "none": {"frechet": [20.0, [18.0, 20.0, 22.0]], "seconds": 1.0},
        "+ sine": {"frechet": [15.0, [13.0, 15.0, 17.0]], "seconds": 1e-5, "scale": 1.0},
    })  # fmt: skip
    rows = (
        Taken("tfg", "steering", "none", "in: DPS", PSNR, (1, 1)),
        Taken("classifier", "classifiers", "none", "+ sine", FRECHET, (1, 1)),
        Taken("ppap", "classifiers", "none", "PPAP", FRECHET, (1, 1)),
    )
    *_, tfg, classifier, ppap = gradients(rows, tmp_path).splitlines()
    values = "10 (9.8 to 10.2) | 15 (14.6 to 15.4) | 5 (within 4.41 to 5.59), **better**"
    assert tfg == f"| `tfg` | DPS, weight 8 | PSNR of the hidden half, dB | {values} | 1 → 1 | 2.50 |"
    kept(tmp_path, "steering", {
        "none": {"psnr": [10.0, 0.1], "seconds": 2.0, "each": [9.0, 11.0]},
        "in: DPS": {"psnr": [15.0, 0.2], "seconds": 5.0, "weight": 8.0, "each": [14.0, 16.0]},
    })  # fmt: skip
    assert "| 5 (5 to 5), **better** |" in gradients(rows[:1], tmp_path)
    # Both sides shift alike, so the error of each says nothing of that of the difference.
    assert "| -5 (-5 to -5), **better** | 1 → 1 | not taken |" in classifier
    assert "not measured now" in ppap


def test_learned_controls_stand_with_their_differences_evaluations_and_times(tmp_path: Path) -> None:
    plain, own = {"own": [0.4, 0.3, 0.5]}, {"own": [0.6, 0.5, 0.7]}
    even = {"frechet": [9.0, [8.0, 9.0, 10.0]], "istd": [0.7, 0.6, 0.8], "each": [0.6, 0.7, 0.8]}
    uneven = {"frechet": [9.0, [8.0, 9.0, 10.0]], "istd": [0.9, 0.8, 1.0], "each": [0.8, 0.9, 1.0]}
    more = {"more": {"no control": [0.2, 0.15, 0.25]}}
    kept(tmp_path, "controls-easycontrol", {
        "easycontrol": {"no control": plain, "its edges, strength=1": own}
    })  # fmt: skip
    kept(tmp_path, "controls-unicon", {"joint": {"no control": plain, "condition: its edges": {**own, **more}}})
    kept(tmp_path, "controls-smooth", {"smooth": {"scale=0": uneven, "scale=1": even}})
    kept(tmp_path, "evidence-controls", {
        name: {"evaluations": [20, 40], "times": [1.5, 1.4, 1.6]} for name in ("easycontrol", "joint", "smooth")
    })  # fmt: skip
    text = controls(docs=tmp_path)
    assert (
        "0.4 (0.3 to 0.5) | 0.6 (0.5 to 0.7) | 0.2 (within 0 to 0.4), unclear | 20 → 40 | 1.50 (1.40 to 1.60)" in text
    )
    assert "| 0.2 (0.15 to 0.25), **better** |" in text
    assert "| -0.2 (-0.2 to -0.2), **better** |" in text and "| 0 (0 to 0), unclear |" in text
    assert "--turns 3`" in text


@pytest.mark.parametrize(
    ("low", "high", "direction", "said"),
    [(0.1, 0.2, HIGHER, BETTER), (0.1, 0.2, LOWER, WORSE), (-0.2, -0.1, LOWER, BETTER), (-0.1, 0.1, HIGHER, UNCLEAR)],
)
def test_better_and_worse_are_said_of_differences_that_leave_out_0(
    low: float, high: float, direction: str, said: str
) -> None:
    assert verdict({"low": low, "high": high}, direction) == said
