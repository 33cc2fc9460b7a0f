"""Calibration along the trajectory: the error itself, and a report of a classifier whose confidence is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from torch import nn
from zoo.class_conditional import class_conditional

import trimtab
from trimtab.cli import main
from trimtab.pipelines.calibration import calibrate, calibration_error, table

NAMES = ["one", "two"]


class Sure(nn.Module):
    """Names class 1 with the confidence of two logits, behind a ReLU that softplus would move."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.relu, self.logit = nn.ReLU(), logit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ones = self.relu(torch.ones(len(images), 1))
        return torch.cat([torch.zeros_like(ones), self.logit * ones], 1)


def test_the_error_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    # Two bins of two: accuracy 1/2 at confidence 0.9, and 1 at 0.7.
    assert calibration_error(probabilities, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5 * 0.4 + 0.5 * 0.3)


def test_perfect_calibration_has_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(100_000, generator=generator)
    labels = (torch.rand(100_000, generator=generator) < p).long()
    assert calibration_error(torch.stack([1 - p, p], 1), labels) < 0.01


def test_a_classifier_that_is_half_right_and_quite_sure() -> None:
    pipe, network = trimtab.guide(class_conditional(NAMES)), Sure(3.0)
    rows = calibrate(pipe, network, [0, 1], count=6, steps=3, betas=(None, 2.0), batch=4)
    assert [row.step for row in rows] == [0, 1, 2]
    assert rows[0].ratio > rows[1].ratio > rows[2].ratio
    for row in rows:
        assert row.accuracy == {None: 0.5, 2.0: 0.5}
        assert row.error[None] == pytest.approx(torch.tensor(3.0).sigmoid().item() - 0.5, abs=1e-5)
        assert row.confidence[2.0] > row.confidence[None]
    assert "lowest: ReLU" in table(rows)
    assert isinstance(network.relu, nn.ReLU) and not pipe.guidances


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_a_level_that_is_evaluated_twice_is_looked_at_once(scheduler: Any) -> None:
    pipe = trimtab.guide(class_conditional(NAMES))
    pipe.scheduler = scheduler
    rows = calibrate(pipe, Sure(3.0), [0, 1], count=2, steps=4, betas=(None,))
    assert [row.step for row in rows] == [0, 1, 2, 3]


def test_nothing_to_ask_for_is_an_error() -> None:
    with pytest.raises(trimtab.ParameterError, match=r"classes=\[\]"):
        calibrate(trimtab.guide(class_conditional(NAMES)), Sure(1.0), [])


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :2] / 0


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"betas": (0.0,)}, trimtab.ParameterError, r"betas=\[0.0\]; allowed: numbers above 0, and None"),
        ({"betas": ()}, trimtab.ParameterError, r"betas=\[\]; allowed"),
        ({"batch": 0}, trimtab.ParameterError, "batch=0; allowed: at least one"),
        ({"classes": [0, None]}, trimtab.ParameterError, "classes holds None, which stands for no class"),
        ({"classes": ["one", "four"]}, trimtab.ParameterError, r"calibrate: classes=.*: .* no class 'four'"),
        ({"classes": [0, 12]}, trimtab.ParameterError, r"classes=\[0, 12\]: .* no class 12; this model"),
        ({"classes": [0, 1], "classifier": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, trimtab.ParameterError,
         "is out of range; allowed: 0 to 0"),
        ({"classifier": Broken()}, trimtab.GuidanceRuntimeError, "logits are not finite at step 0 of 2, with ReLU"),
    ],
)  # fmt: skip
def test_what_would_give_a_false_table_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe, calls = trimtab.guide(class_conditional(NAMES)), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"classifier": Sure(1.0), "classes": [0, 1], "count": 2, "steps": 2, "betas": (None,), **changed}
    with pytest.raises(error, match=message):
        calibrate(pipe, **given)
    assert len(calls) <= (error is trimtab.GuidanceRuntimeError)


class Names(nn.Module):
    """Names the class that an image was made of, as it knows them in another order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([1, 0]).repeat(len(images) // 2 + 1)[: len(images)]
        return 5.0 * nn.functional.one_hot(wanted, 2).float() + 0 * images.flatten(1)[:, :2]


@pytest.mark.parametrize("classes", [[0, 1], ["one", "two"]])
def test_classes_go_by_name_whatever_their_order_in_the_classifier(classes: list[Any]) -> None:
    pipe = trimtab.guide(class_conditional(NAMES))
    rows = calibrate(pipe, Names(), classes, count=4, steps=2, betas=(None,), labels=("Two", "One"))
    assert all(row.accuracy == {None: 1.0} for row in rows)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1],
                                       layer_type="basic", id2label={0: "Sandal", 1: "Bag"})  # fmt: skip
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    options = ["calibrate", str(tmp_path), "--class", "Sandal", "--class", "Bag", "--count", "2", "--steps", "2"]
    assert main(options) == 0
    assert "mean ECE" in capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
