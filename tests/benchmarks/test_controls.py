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
from trimtab.benchmarks import controls
from trimtab.benchmarks.controls_page import page
from trimtab.benchmarks.emoji import Sampler
from trimtab.benchmarks.likeness import edge_f1
from trimtab.evaluation.features import FeatureNetwork
from trimtab.pipelines.emoji.data import edges
from trimtab.pipelines.emoji.pairs import DrawingPairs

RIGHT = "its edges, strength=1"
SETTINGS = {"count": 3, "ways": 2, "steps": 1, "guidance": 2.0}


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
    torch.testing.assert_close(controls.as_edges(pairs.sources), edges(pairs.targets))


def test_easycontrol_is_compared_with_no_control_and_with_another_condition(
    pairs: DrawingPairs, tmp_path: Path
) -> None:
    flux, weights = sampler(tmp_path, "flux"), tmp_path / "lora.safetensors"
    lora = EasyControlTraining(CASES["flux"].build().transformer, 4, "spatial")
    save_weights(weights, {name: one.detach() for name, one in written(lora.layers).items()})
    swapped = DrawingPairs(pairs.targets, pairs.sources.roll(1, 0), pairs.captions)
    ways = controls.ways_of_easycontrol(weights, pairs)
    made = [flux(pairs, ways[name], "")[0] for name in ("no control", "another drawing's edges", RIGHT)]
    assert torch.equal(made[1], flux(swapped, controls.ways_of_easycontrol(weights, swapped)[RIGHT], "")[0])
    assert not torch.equal(made[0], made[2]) and not torch.equal(made[1], made[2])
    found, drawn = controls.easycontrol(flux, weights, pairs)
    assert found["the drawings themselves"]["own"] == [1.0, 1.0, 1.0]
    assert found["the drawings themselves"]["other"][0] < 0.5
    assert drawn.height > 6 * 64
    assert "| the drawings themselves | 1.000 (1.000 to 1.000) |" in page({"easycontrol": found}, "command", SETTINGS)


def test_unicon_without_effect_makes_what_no_control_makes_and_estimates_nothing(
    pairs: DrawingPairs, tmp_path: Path
) -> None:
    sd = sampler(tmp_path, "sd15")
    model = UniConTraining(CASES["sd15"].build().unet, UniConSettings(rank=4))  # its post projections are 0
    save(tmp_path / "edge", {name: block for name, block in model.blocks.items()})
    found, _ = controls.unicon(sd, tmp_path / "edge", pairs[range(2)])
    assert found["condition: its edges"] == found["condition: another drawing's edges"] == found["no control"]
    assert found["coarse: its edges"] == found["no control"]
    assert set(found["estimate: edges of the drawing"]) == {"own", "other"}


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
