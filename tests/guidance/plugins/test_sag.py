"""`sag` is the self-attention guidance of `StableDiffusionSAGPipeline`, on any scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionSAGPipeline
from guided_runs import built, check_everywhere, close, guided, stock, watched
from zoo import CASES, run

import trimtab
from trimtab.guidance.errors import UnsupportedPipelineError
from trimtab.guidance.plugins.sag import _blurred

ON = {"scale": 0.75, "start": 0.0, "stop": 1.0}


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_it_equals_the_sag_pipeline_of_diffusers(guidance_scale: float) -> None:
    theirs = StableDiffusionSAGPipeline(**CASES["sd15"].build().components)
    theirs.set_progress_bar_config(disable=True)
    expected = run(theirs, CASES["sd15"], sag_scale=0.75, guidance_scale=guidance_scale)
    close(guided("sd15", "sag", {}, guidance_scale=guidance_scale), expected, 2e-6)


@pytest.mark.parametrize("name", ["sd15", "ddpm", "dit", "pixart", "sd3"])
def test_on_every_kind_of_denoiser_it_acts_and_costs_nothing_at_scale_zero(name: str) -> None:
    check_everywhere(name, "sag", ON, {"scale": 0.0})


def test_its_second_evaluation_is_at_another_point_under_the_unconditional_prompt() -> None:
    record = watched("sd15", "sag", {})
    for step in record.steps:
        own, degraded = step.forwards
        uncond, cond = own.output.chunk(2)
        usual = uncond + 5.0 * (cond - uncond)
        close(step.model_output, usual + 0.75 * (uncond - degraded.output), 1e-6)
        text = [forward.arguments["encoder_hidden_states"] for forward in step.forwards]
        assert torch.equal(text[0][:1], text[1])
        changed = (degraded.arguments["sample"] != step.sample).float().mean()
        assert changed > 0.05


def test_on_a_flow_it_is_the_noise_that_is_subtracted() -> None:
    record = watched("sd3", "sag", {"scale": 2.0})
    stock("sd3")
    first, *others = record.steps
    assert len(first.forwards) == 1  # pure noise, of which nothing can be degraded
    for step, sigma in zip(others, built("sd3").scheduler.sigmas[1:], strict=False):
        own, degraded = step.forwards
        uncond, cond = own.output.chunk(2)
        x, other = own.arguments["hidden_states"][:1], degraded.arguments["hidden_states"]
        noise, degraded_noise = (at + (1 - sigma) * v for at, v in ((x, uncond), (other, degraded.output)))
        usual = uncond + 5.0 * (cond - uncond)
        close(step.model_output, usual + 2.0 * (noise - degraded_noise) / (1 - sigma), 1e-5)


def test_it_blurs_only_where_attention_is_above_its_mean() -> None:
    some = guided("sd15", "sag", {})
    everything, nothing = (guided("sd15", "sag", {"threshold": value}) for value in (0.0, 1e6))
    assert not torch.allclose(some, everything, atol=1e-4)
    close(nothing, guided("sd15", "sag", {"scale": 0.0}), 1e-5)


@dataclass
class Keep(trimtab.Guidance):
    """Keeps the noise that each guided prediction stands for."""

    needs = frozenset({"level"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", [])

    def project(self, step: trimtab.Step, prediction: torch.Tensor, predictions: trimtab.Predictions) -> torch.Tensor:
        self.kept.append(step.epsilon(prediction))
        return prediction


def test_a_scaled_input_is_scaled_at_the_other_point_as_well() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    ddim, kept = pipe.scheduler, []
    # DDIM and Euler are the same solver in other coordinates, the second of which scales the denoiser's input.
    for scheduler in (ddim, EulerDiscreteScheduler.from_config(ddim.config, timestep_spacing="leading")):
        pipe.scheduler, keep = scheduler, Keep()
        with pipe.guidance("sag", scale=5.0), pipe.guidance(keep):
            run(pipe, CASES["sd15"])
        kept.append(keep.kept[-1])
    close(kept[1], kept[0], 2e-3)


@pytest.mark.parametrize("name", ["flux", "qwenimage", "wan", "ltx", "animatediff", "svd"])
def test_packed_latents_and_videos_are_refused_before_the_run(name: str) -> None:
    with pytest.raises(UnsupportedPipelineError, match="no picture that could be blurred"):
        built(name).add_guidance("sag")
    assert not built(name).guidances


@pytest.mark.parametrize("side", [1, 4, 9])
def test_a_picture_smaller_than_the_kernel_is_blurred_by_what_it_can_reflect(side: int) -> None:
    flat = torch.full((1, 2, side, side + 1), 0.7)
    torch.testing.assert_close(_blurred(flat, 1.0, 9), flat)
