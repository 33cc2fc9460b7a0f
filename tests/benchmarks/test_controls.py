"""What the measurement of learned controls calls an edge that is followed, and what each of its parts compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.weights import noise
from zoo import CASES

from trimtab.adapters.easycontrol.checkpoint import written
from trimtab.adapters.easycontrol.train import EasyControlTraining
from trimtab.adapters.smooth.train import SmoothTraining
from trimtab.adapters.smooth.train import written as smooth_written
from trimtab.adapters.unicon.checkpoint import save
from trimtab.adapters.unicon.train import UniConSettings, UniConTraining
from trimtab.adapters.weights import save_weights
from trimtab.benchmarks import controls, controls_edges
from trimtab.benchmarks.controls_edges import ALONE, GUIDED, PLAIN, WRONG, Requested, compared, ways_of_easycontrol
from trimtab.benchmarks.controls_page import page
from trimtab.benchmarks.emoji import Sampler
from trimtab.benchmarks.likeness import edge_f1
from trimtab.evaluation.features import FeatureNetwork
from trimtab.pipelines.emoji.data import CATEGORIES, edges
from trimtab.pipelines.emoji.pairs import DrawingPairs

SETTINGS = {"count": 3, "ways": 2, "steps": 1, "guidance": 2.0, "steer": 50.0}
JUDGES = [f"trimtab/emoji-judge-category-{seed}" for seed in (0, 1)]


def sampler(folder: Path, case: str) -> Sampler:
    CASES[case].build().save_pretrained(folder)
    return Sampler(folder, "true_cfg_scale" if case == "flux" else "guidance_scale", 2.0, steps=1, batch=2)


@pytest.fixture(scope="module")
def pairs() -> DrawingPairs:
    targets = torch.ones(3, 3, 64, 64)
    for number in range(3):
        targets[number, :, 8 : 24 + 12 * number, 20 * number : 20 * number + 16] = -1
    return DrawingPairs(targets, (1 - 2 * edges(targets)).expand_as(targets), ["a fox", "a whale", "a pear"])


def vertical(column: int) -> torch.Tensor:
    marks = torch.zeros(1, 1, 16, 16)
    marks[..., column] = 1
    return marks


def test_edges_count_within_a_pixel() -> None:
    wanted = vertical(5)
    assert [edge_f1(vertical(column), wanted).item() for column in (5, 6, 7)] == [1.0, 1.0, 0.0]
    both = wanted + vertical(12)  # half of what is found is right, and all that is wanted is found
    assert edge_f1(both, wanted).item() == pytest.approx(2 * 0.5 / 1.5)
    assert edge_f1(torch.zeros_like(wanted), wanted).item() == 0.0


def test_a_drawn_edge_map_is_read_as_the_edges_that_it_was_drawn_from(pairs: DrawingPairs) -> None:
    torch.testing.assert_close(controls_edges.as_edges(pairs.sources), edges(pairs.targets))


def test_a_row_exceeds_its_baselines_drawing_by_drawing() -> None:
    wanted = torch.cat([vertical(column) for column in (3, 7, 12)])
    none, some = torch.zeros_like(wanted), wanted.clone()
    some[2] = 0
    rows = compared({PLAIN: (none, wanted), f"condition: {WRONG}": (some, wanted), "its edges": (wanted, wanted)})
    assert rows["its edges"]["more"][PLAIN] == [1.0, 1.0, 1.0]
    mean, low, high = rows["its edges"]["more"][WRONG]
    assert (mean, low, high) == (pytest.approx(1 / 3), 0.0, 1.0)  # one drawing of three is better, and is drawn or not
    assert rows[PLAIN]["more"] == rows[f"condition: {WRONG}"]["more"] == {}
    alone = compared({"estimate": (wanted, wanted)})["estimate"]
    assert alone["more"] == {WRONG: [1.0, 1.0, 1.0]}  # where there are no baselines, than of another's edges
    text = page({"joint": rows}, "the command", SETTINGS)
    assert "| its edges | 1.000 (1.000 to 1.000) | 0.000 (0.000 to 0.000) | +1.000 (+1.000 to +1.000) | +0.333" in text


def test_easycontrol_is_compared_with_no_control_with_another_condition_and_with_a_classifier_beside_it(
    pairs: DrawingPairs, tmp_path: Path
) -> None:
    flux, weights = sampler(tmp_path, "flux"), tmp_path / "lora.safetensors"
    lora = EasyControlTraining(CASES["flux"].build().transformer, 4, "spatial")
    save_weights(weights, {name: one.detach() for name, one in written(lora.layers).items()})
    requested = Requested(["Animals & Nature", "Animals & Nature", "Food & Drink"], *JUDGES, scale=50.0)
    swapped = DrawingPairs(pairs.targets, pairs.sources.roll(1, 0), pairs.captions)
    ways = ways_of_easycontrol(weights, pairs, requested)
    made = {name: flux(pairs, ways[name], "")[0] for name in (PLAIN, WRONG, ALONE, GUIDED)}
    assert torch.equal(made[WRONG], flux(swapped, ways_of_easycontrol(weights, swapped, requested)[ALONE], "")[0])
    assert all(not torch.equal(made[one], made[ALONE]) for one in (PLAIN, WRONG, GUIDED))
    found, drawn = controls_edges.easycontrol(flux, weights, pairs, requested)
    assert found["the drawings themselves"]["own"] == [1.0, 1.0, 1.0]
    assert found["the drawings themselves"]["other"][0] < 0.5
    assert {PLAIN, WRONG} <= set(found[GUIDED]["more"]) and {PLAIN, ALONE} == set(found[GUIDED]["more of the category"])
    assert drawn.height > 7 * 64
    text = page({"easycontrol": found}, "command", SETTINGS)
    assert "| the drawings themselves | 1.000 (1.000 to 1.000) |" in text
    assert text.count(f"| {GUIDED} | ") == 2


def test_a_category_is_reached_where_the_judge_finds_it() -> None:
    yellow = torch.ones(1, 3, 64, 64)
    yellow[:, 2, 8:56, 8:56] = -1
    found = [Requested([name], *JUDGES, scale=1.0).reached(yellow).item() for name in CATEGORIES]
    assert sorted(found) == [0.0] * 8 + [1.0]


def test_unicon_without_effect_makes_what_no_control_makes_and_estimates_nothing(
    pairs: DrawingPairs, tmp_path: Path
) -> None:
    sd = sampler(tmp_path, "sd15")
    model = UniConTraining(CASES["sd15"].build().unet, UniConSettings(rank=4))  # its post projections are 0
    save(tmp_path / "edge", {name: block for name, block in model.blocks.items()})
    found, _ = controls_edges.unicon(sd, tmp_path / "edge", pairs[range(2)])
    for name in ("condition: its edges", f"condition: {WRONG}", "coarse: its edges"):
        assert all(found[name][kind] == found[PLAIN][kind] for kind in ("own", "other"))
    assert found["condition: its edges"]["more"] == {PLAIN: [0.0, 0.0, 0.0], WRONG: [0.0, 0.0, 0.0]}
    assert set(found["estimate: edges of the drawing"]["more"]) == {WRONG}


def test_smooth_is_compared_at_each_scale_with_none(
    pairs: DrawingPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = FeatureNetwork("means", "mean colours", lambda images: images.float().mean((2, 3)))
    monkeypatch.setattr(controls, "feature_network", lambda name: means)
    sd = sampler(tmp_path, "sd15")
    lora = SmoothTraining(CASES["sd15"].build().unet, 4)
    with torch.no_grad():
        for index, weight in enumerate(lora.weights):
            weight.copy_(noise(f"weight.{index}", *weight.shape) / 4)
    save_weights(tmp_path / "lora.safetensors", {name: t.detach() for name, t in smooth_written(lora.loras).items()})
    found, _ = controls.smooth(sd, tmp_path / "lora.safetensors", pairs, [1.0], 2, pairs.targets)
    assert list(found) == ["scale=0", "scale=1"]
    assert found["scale=0"]["each"] != found["scale=1"]["each"]
    assert "| scale=0 | " in page({"smooth": found}, "the command", SETTINGS)
