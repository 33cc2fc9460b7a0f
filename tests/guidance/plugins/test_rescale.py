"""`rescale` is the `guidance_rescale` of Diffusers' pipelines, also where a pipeline has none, and after all deltas."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from guided_runs import built, check_everywhere, close, guided, stock
from recorder import recorded
from zoo import CASES, run

import trimtab


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ltx"])
def test_it_equals_the_pipelines_guidance_rescale(name: str) -> None:
    expected = stock(name, guidance_rescale=0.7)
    assert not torch.allclose(expected, stock(name), atol=1e-3)
    close(guided(name, "rescale", {"phi": 0.7}), expected)


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "dit", "wan"])
def test_where_there_is_cfg_it_acts_and_costs_nothing(name: str) -> None:
    check_everywhere(name, "rescale", {"phi": 0.7}, {"phi": 0.0})


def test_without_any_guidance_there_is_nothing_to_rescale() -> None:
    close(guided("flux", "rescale", {"phi": 1.0}), stock("flux"), 1e-5)
    assert built("flux").last_guided_run.evaluations == 3


def test_it_comes_after_all_deltas_in_whatever_order_they_were_attached() -> None:
    case = CASES["sd15"]
    pipe = case.build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("rescale", phi=0.7)
    pipe.add_guidance("pag", scale=2.0, layers="mid")
    pipe.add_guidance("cfg", scale=3.0)
    run(pipe, case)
    uncond, cond, perturbed = record.steps[0].forwards[0].output
    total = uncond + 3.0 * (cond - uncond) + 2.0 * (cond - perturbed)
    close(record.steps[0].model_output, rescale_noise_cfg(total[None], cond[None], 0.7), 1e-6)
