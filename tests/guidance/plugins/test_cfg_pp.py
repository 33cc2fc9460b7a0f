"""`cfg_pp` is CFG++: guidance in the clean estimate, none in the noise that is added back."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from guided_runs import built, check_everywhere, close, guided, stock, watched
from recorder import recorded
from zoo import CASES, run

import trimtab
from trimtab.guidance.errors import ConflictError, UnsupportedSchedulerError
from trimtab.guidance.schedulers import SINGLE_STEP, SUPPORTED, check_single_step

SCALE = 0.6


def rows(step: Any) -> tuple[torch.Tensor, torch.Tensor]:
    uncond, cond = step.forwards[0].output.chunk(2)
    return uncond, uncond + SCALE * (cond - uncond)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_on_ddim_it_is_the_papers_algorithm(prediction_type: str) -> None:
    pipe = CASES["sd15"].build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("cfg_pp", scale=SCALE)
    last = run(pipe, CASES["sd15"])
    samples = [step.forwards[0].arguments["sample"][:1] for step in record.steps] + [last]
    powers = pipe.scheduler.alphas_cumprod
    for index, step in enumerate(record.steps):
        later = record.steps[index + 1].timestep if index + 1 < len(record.steps) else None
        a, b = powers[step.timestep], pipe.scheduler.final_alpha_cumprod if later is None else powers[later]
        x, (uncond, guided_) = samples[index], rows(step)
        if prediction_type == "epsilon":
            x0, noise = (x - (1 - a).sqrt() * guided_) / a.sqrt(), uncond
        else:
            x0, noise = a.sqrt() * x - (1 - a).sqrt() * guided_, a.sqrt() * uncond + (1 - a).sqrt() * x
        close(samples[index + 1], b.sqrt() * x0 + (1 - b).sqrt() * noise, 1e-5)


def test_on_euler_it_steps_along_the_unconditional_noise() -> None:
    pipe = CASES["sdxl"].build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("cfg_pp", scale=SCALE)
    last = run(pipe, CASES["sdxl"])
    sigmas = pipe.scheduler.sigmas
    inputs = [step.forwards[0].arguments["sample"][:1] for step in record.steps]
    samples = [x * (s**2 + 1).sqrt() for x, s in zip(inputs, sigmas, strict=False)] + [last]
    for index, step in enumerate(record.steps):
        uncond, guided_ = rows(step)
        x0 = samples[index] - sigmas[index] * guided_
        close(samples[index + 1], x0 + sigmas[index + 1] * uncond, 1e-5)


def test_on_a_flow_it_mixes_with_the_unconditional_noise() -> None:
    record = watched("sd3", "cfg_pp", {"scale": SCALE})
    sigmas = built("sd3").scheduler
    stock("sd3")
    sigmas = built("sd3").scheduler.sigmas
    samples = [step.forwards[0].arguments["hidden_states"][:1] for step in record.steps]
    for index, (x, following) in enumerate(itertools.pairwise(samples)):
        uncond, guided_ = rows(record.steps[index])
        s, t = sigmas[index], sigmas[index + 1]
        x0, noise = x - s * guided_, x + (1 - s) * uncond
        close(following, (1 - t) * x0 + t * noise, 1e-5)


def test_scale_zero_is_the_unconditional_run() -> None:
    close(guided("sd15", "cfg_pp", {"scale": 0.0}), guided("sd15", "cfg", {"scale": 0.0}), 1e-5)


def test_ancestral_noise_is_added_as_ever() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pipe.guidance("cfg", scale=0.0):
        expected = run(pipe, CASES["sd15"])
    with pipe.guidance("cfg_pp", scale=0.0):
        close(run(pipe, CASES["sd15"]), expected, 1e-5)


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd3", "flux_true_cfg"])
def test_on_every_kind_of_denoiser_it_acts_alike_however_rows_are_computed(name: str) -> None:
    check_everywhere(name, "cfg_pp", {}, {"start": 0.0, "stop": 0.0})


def test_it_needs_no_more_evaluations_than_cfg() -> None:
    for off in ({}, {"guidance_scale": 1.0}):
        record = watched("sd15", "cfg_pp", {}, **off)
        assert {sum(forward.rows for forward in step.forwards) for step in record.steps} == {2}


@pytest.mark.parametrize("kind", SINGLE_STEP)
def test_a_scheduler_that_is_taken_remembers_nothing(kind: str) -> None:
    steps = []
    for history in range(2):
        scheduler = getattr(diffusers, kind)()
        scheduler.set_timesteps(5)
        for index, timestep in enumerate(scheduler.timesteps[:3]):
            made = torch.Generator().manual_seed(history if index < 2 else 7)
            model_output, sample = torch.randn(2, 1, 3, 8, 8, generator=made)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            given = {} if "DDIM" in kind else {"generator": torch.Generator().manual_seed(0)}
            result = scheduler.step(model_output, timestep, sample, **given).prev_sample
        steps.append(result)
    assert torch.equal(*steps)


@pytest.mark.parametrize("kind", sorted(set(SUPPORTED) - set(SINGLE_STEP) - {"DPMSolverSDEScheduler"}))
def test_any_other_scheduler_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=f"cfg_pp: {kind} does not step from one clean estimate"):
        check_single_step(getattr(diffusers, kind)(), "cfg_pp")


def test_the_refusal_comes_when_it_is_attached_and_again_before_a_run() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    ddim = pipe.scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)
    with pytest.raises(UnsupportedSchedulerError, match="cfg_pp: DPMSolverMultistepScheduler"):
        pipe.add_guidance("cfg_pp")
    pipe.scheduler = ddim
    pipe.add_guidance("cfg_pp")
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(ddim.config)
    record = recorded(pipe, "unet")
    with pytest.raises(UnsupportedSchedulerError, match="cfg_pp: UniPCMultistepScheduler"):
        run(pipe, CASES["sd15"])
    assert not record.forwards


def test_a_flow_that_adds_fresh_noise_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UnsupportedSchedulerError, match="with stochastic_sampling=True"):
        check_single_step(scheduler, "cfg_pp")
    check_single_step(EulerDiscreteScheduler(), "cfg_pp")


def test_it_and_cfg_exclude_each_other() -> None:
    pipe = built("sd15")
    with pipe.guidance("cfg_pp"), pytest.raises(ConflictError, match="the slot 'cfg'"):
        pipe.add_guidance("cfg")
