"""`dynamic_threshold` is the thresholding of Diffusers' schedulers, on any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from guided_runs import built, close, guided, stock
from zoo import CASES

import trimtab
from trimtab.guidance.noise import Level
from trimtab.guidance.plugins.dynamic_threshold import DynamicThreshold
from trimtab.guidance.run import Step

STEP = Step(0, 1, 0.0, Level(0.5, 0.5))
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "clip_sample": False}


def sampled(kind: Any, scheduler: Any, guidance: dict[str, float] | None, **call: Any) -> torch.Tensor:
    pipe = kind(unet=CASES["ddpm"].build().unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    if guidance is not None:
        trimtab.guide(pipe).add_guidance("dynamic_threshold", **guidance)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(generator=generator, num_inference_steps=4, output_type="np", **call).images)


@pytest.mark.parametrize("largest", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "scheduler", "call"),
    [(DDPMPipeline, DDPMScheduler, {}), (DDIMPipeline, DDIMScheduler, {"use_clipped_model_output": True})],
)
def test_it_equals_the_schedulers_own(kind: Any, scheduler: Any, call: dict[str, Any], largest: float) -> None:
    expected = sampled(kind, scheduler(**THRESHOLDING, sample_max_value=largest), None, **call)
    plain = scheduler(clip_sample=False)
    assert not torch.allclose(sampled(kind, plain, None, **call), expected, atol=1e-2)
    close(sampled(kind, plain, {"ratio": 0.9, "max_value": largest}, **call), expected, 1e-5)


def test_each_image_has_its_own_threshold() -> None:
    small, large = torch.randn(2, 3, 8, 8).clamp(-0.9, 0.9), 4.0 * torch.randn(2, 3, 8, 8)
    edited = DynamicThreshold(ratio=0.9).guide_x0(STEP, torch.cat([small, large]))
    assert torch.equal(edited[:2], small)
    for given, found in zip(large, edited[2:], strict=True):
        s = torch.quantile(given.abs(), 0.9)
        close(found, given.clamp(-s, s) / s, 1e-6)
        assert found.abs().max() <= 1.0


def test_the_bound_is_the_range_of_clean_data() -> None:
    x0 = 4.0 * torch.randn(1, 3, 8, 8)
    close(DynamicThreshold(bound=2.0).guide_x0(STEP, x0), 2.0 * DynamicThreshold().guide_x0(STEP, x0 / 2.0), 1e-6)


@pytest.mark.parametrize(("name", "bound", "said"), [("sd15", 1.0, True), ("sd15", 4.0, False), ("ddpm", 1.0, False)])
def test_a_bound_of_pixels_on_latents_is_named(
    name: str, bound: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    guided(name, "dynamic_threshold", {"bound": bound})
    assert ("dynamic_threshold: bound=1 is the range of pixels" in caplog.text) == said


@pytest.mark.parametrize("name", ["sd15", "dit", "flux", "sd3", "wan"])
def test_on_every_kind_of_denoiser_it_acts_at_no_cost(name: str) -> None:
    thresholded = guided(name, "dynamic_threshold", {"ratio": 0.8, "bound": 0.5})
    assert torch.isfinite(thresholded).all()
    assert not torch.allclose(thresholded, stock(name), atol=1e-3)
    assert built(name).last_guided_run.evaluations == 3 * CASES[name].rows * CASES[name].calls
    close(guided(name, "dynamic_threshold", {"bound": float("inf")}), stock(name), 1e-5)
