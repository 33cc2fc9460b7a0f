"""Where a pipeline rescales its own combination, all terms are summed first, at every step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    Cosmos2TextToImagePipeline,
    JoyImageEditPlusPipeline,
    LongCatImagePipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
)
from known_delta import known
from recorder import Record, recorded
from zoo import CASES, run

import trimtab
from trimtab.pipelines.own_cfg import counts_from_cond, rescales

SCALE = 5.0


@functools.cache
def z_image() -> tuple[Any, Record]:
    pipe = CASES["z_image"].build()
    return trimtab.guide(pipe), recorded(pipe, "transformer")


@pytest.fixture
def z() -> Iterator[tuple[Any, Record]]:
    pipe, record = z_image()
    record.steps.clear()
    yield pipe, record
    pipe.clear_guidance()


@dataclass
class KnownDelta(trimtab.Guidance):
    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> torch.Tensor:
        assert step.own is not None and step.sample is not None
        assert step.own.shape == step.sample.shape and step.own.ndim == 4
        return known(step.own)


def at_most(combined: torch.Tensor, cond: torch.Tensor, times: float) -> torch.Tensor:
    """Z-Image's `cfg_normalization`: no longer than its conditional prediction, times a factor."""
    return combined * (times * cond.norm() / combined.norm()).clamp(max=1.0)


@pytest.mark.parametrize("normalization", [True, 0.5, 1.75])
def test_a_delta_is_summed_before_z_image_bounds_its_combination(z: tuple[Any, Record], normalization: float) -> None:
    """It counts its scale from the conditional prediction, takes lists, and flips the sign; 1.75 is hardly reached."""
    pipe, record = z
    pipe.add_guidance(KnownDelta())
    run(pipe, CASES["z_image"], cfg_normalization=normalization)
    assert len(record.steps) == 3
    for step in record.steps:
        cond, uncond = step.forwards[0].output.squeeze(2).split(1)
        expected = -at_most(cond + SCALE * (cond - uncond) - known(step.sample), cond, float(normalization))
        torch.testing.assert_close(step.model_output, expected, rtol=0, atol=2e-6)


def test_pag_is_part_of_what_z_image_bounds(z: tuple[Any, Record]) -> None:
    pipe, record = z
    with pipe.guidance("pag", scale=3.0):
        run(pipe, CASES["z_image"], cfg_normalization=True)
    for step in record.steps:
        cond, uncond = step.forwards[0].output.squeeze(2).split(1)
        perturbed = step.forwards[1].output.squeeze(2)[:1]
        combined = cond + SCALE * (cond - uncond) + 3.0 * (cond - perturbed)
        torch.testing.assert_close(step.model_output, -at_most(combined, cond, 1.0), rtol=0, atol=2e-6)


def test_whether_a_pipeline_rescales_is_asked_by_an_argument_or_written_in_its_call() -> None:
    assert not rescales(ZImagePipeline, {"cfg_normalization": False})
    assert rescales(ZImagePipeline, {"cfg_normalization": 0.5})
    assert rescales(LongCatImagePipeline, {"enable_cfg_renorm": True, "cfg_renorm_min": 0.0})
    assert rescales(JoyImageEditPlusPipeline, {"guidance_scale": 4.0})
    assert not rescales(StableDiffusionPipeline, {"guidance_rescale": 0.0})
    assert not rescales(Cosmos2TextToImagePipeline, {"guidance_scale": 7.0})


def test_from_which_prediction_a_pipeline_counts_its_scale_is_written_in_its_call() -> None:
    assert counts_from_cond(ZImagePipeline) and counts_from_cond(Cosmos2TextToImagePipeline)
    assert not counts_from_cond(StableDiffusionPipeline) and not counts_from_cond(JoyImageEditPlusPipeline)
