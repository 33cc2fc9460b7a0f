"""`interval` is classifier-free guidance between two noise levels, and the conditional prediction outside of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HeliosScheduler
from guided_runs import built, check_everywhere, close, guided, stock, watched
from zoo import CASES

from trimtab.guidance.errors import ConflictError, ParameterError, UnsupportedSchedulerError
from trimtab.guidance.noise import noise_algebra

MIDDLE = {"low": 0.6, "high": 6.0}


def ratios(record: Any, name: str) -> list[float]:
    algebra = noise_algebra(built(name).scheduler)
    return [algebra.level(step.timestep, index=index).ratio for index, step in enumerate(record.steps)]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_inside_it_guides_and_outside_it_is_the_conditional_prediction(name: str, scale: float | None) -> None:
    record = watched(name, "interval", {"scale": scale, **MIDDLE}, num_inference_steps=6)
    stock(name, num_inference_steps=6)
    inside = [0.6 < ratio <= 6.0 for ratio in ratios(record, name)]
    assert True in inside and False in inside
    for step, within in zip(record.steps, inside, strict=True):
        uncond, cond = step.forwards[0].output.chunk(2)
        expected = uncond + (5.0 if scale is None else scale) * (cond - uncond) if within else cond
        close(step.model_output, expected, 1e-6)


def test_where_the_pipeline_has_no_cfg_only_the_interval_costs() -> None:
    record = watched("sd15", "interval", {"scale": 3.0, **MIDDLE}, num_inference_steps=6, guidance_scale=1.0)
    rows = [sum(forward.rows for forward in step.forwards) for step in record.steps]
    assert rows == [2 if 0.6 < ratio <= 6.0 else 1 for ratio in ratios(record, "sd15")]
    assert set(rows) == {1, 2}


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd3", "wan", "flux_true_cfg"])
def test_on_every_kind_of_denoiser_it_acts_and_is_nothing_over_the_whole_range(name: str) -> None:
    check_everywhere(name, "interval", {"high": 0.28}, {"low": 0.0, "high": float("inf")})


def test_scale_one_is_the_conditional_prediction() -> None:
    close(guided("sd15", "interval", {"scale": 1.0}), stock("sd15", guidance_scale=1.0), 1e-5)


def test_it_and_cfg_exclude_each_other() -> None:
    pipe = built("sd15")
    with pipe.guidance("cfg"), pytest.raises(ConflictError, match="the slot 'cfg'"):
        pipe.add_guidance("interval")


def test_a_scheduler_without_known_levels_is_refused() -> None:
    pipe = CASES["sd3"].build()
    pipe.scheduler = HeliosScheduler()
    import trimtab

    with pytest.raises(UnsupportedSchedulerError, match="interval: the noise level is needed"):
        trimtab.guide(pipe).add_guidance("interval")


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ParameterError, match="interval: low=3 lies above high=1"):
        built("sd15").add_guidance("interval", low=3.0, high=1.0)


def test_the_window_is_half_open() -> None:
    record = watched("sd15", "interval", {}, num_inference_steps=2)
    first = ratios(record, "sd15")[1]
    for low, high, guides in ((first, 100.0, False), (0.0, first, True)):
        record = watched("sd15", "interval", {"scale": 3.0, "low": low, "high": high}, num_inference_steps=2)
        uncond, cond = record.steps[1].forwards[0].output.chunk(2)
        close(record.steps[1].model_output, uncond + (3.0 if guides else 1.0) * (cond - uncond), 1e-6)
    assert torch.isfinite(record.steps[1].model_output).all()
