"""Recurrence: a step evaluated again at x_t noised back, counted, planned, reproducible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from guided_runs import built
from zoo import CASES, run

import trimtab
from trimtab import Guidance, Step, parameter
from trimtab.guidance.noise import noise_algebra
from trimtab.pipelines.recurrence import noised_back


@dataclass
class Again(Guidance):
    """Evaluates each step several times, and remembers x_t."""

    times: int = parameter(3, "How often.")
    seen: list = parameter([], "Every x_t.")

    def repeats(self, step: Step) -> int:
        return self.times

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        self.seen.append(step.sample)
        return x0


@pytest.mark.parametrize(
    ("name", "extra"), [("sd15", 2), ("sd3", 2), ("flux", 1), ("wan", 2), ("dit", 2), ("ddpm", 1), ("z_image", 2)]
)
def test_each_evaluation_is_planned_and_counted(name: str, extra: int) -> None:
    pipe, case = built(name), CASES[name]
    with pipe.guidance(Again(), name="again"):
        plan = pipe.explain_guidance(**case.call)
        run(pipe, case)
    done = pipe.last_guided_run
    assert done.evaluations == plan.evaluations == 3 * extra * len(plan.steps)
    assert done.forward_calls == plan.calls
    assert "evaluated up to 3 times" in str(plan)


def test_branches_ride_along_in_every_evaluation() -> None:
    pipe, case = built("sd15"), CASES["sd15"]
    with pipe.guidance(Again(times=2), name="again"), pipe.guidance("pag"):
        plan = pipe.explain_guidance(**case.call)
        run(pipe, case)
    assert pipe.last_guided_run.evaluations == plan.evaluations == 2 * 3 * 3
    assert pipe.last_guided_run.forward_calls == plan.calls == 6


def test_the_same_seed_is_the_same_picture_and_another_x_t_is_evaluated() -> None:
    pipe, case, again = built("sd15"), CASES["sd15"], Again(times=2)
    with pipe.guidance(again, name="again"):
        first, second = run(pipe, case, seed=5), run(pipe, case, seed=5)
    assert torch.equal(first, second)
    assert not torch.equal(again.seen[0], again.seen[1])


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (DDIMScheduler(clip_sample=False), "epsilon"),
        (EulerDiscreteScheduler(), "epsilon"),
        (FlowMatchEulerDiscreteScheduler(), "flow"),
    ],
    ids=["vp", "sigma", "flow"],
)
@pytest.mark.parametrize("position", [3, 9])
def test_noised_back_it_lies_at_its_level_again(scheduler: Any, kind: str, position: int) -> None:
    """With data of variance 4, x_t of the exact denoiser has variance 4 alpha^2 + sigma^2, and so must x_t'."""
    scheduler.set_timesteps(10)
    algebra = noise_algebra(scheduler)
    levels = algebra.levels()
    level = levels[position]
    following = levels[position + 1] if position < 9 else trimtab.Level(1.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(1, 200_000, generator=generator) for _ in range(2))
    x0 = 2 * x0
    sample = level.alpha * x0 + level.sigma * n
    prediction = n if kind == "epsilon" else n - x0
    step = Step(position, 10, 0.0, level, sample, next_level=following, algebra=algebra)
    again = noised_back(step, prediction, lambda onward: onward, generator)
    assert again.var().item() == pytest.approx(4 * level.alpha**2 + level.sigma**2, rel=0.02)
    # What it still knows of the noise it had: r sigma_s of sigma_t.
    kept = (again * n).mean().item()
    assert kept == pytest.approx(level.alpha / following.alpha * following.sigma, abs=0.02 * max(1, level.sigma))


def test_schedulers_that_go_on_from_elsewhere_are_refused() -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    refusal = r"again: repeats above 1 .* use DPMSolverMultistep"
    with pytest.raises(trimtab.UnsupportedSchedulerError, match=refusal):
        pipe.add_guidance(Again(), name="again")


def test_they_are_refused_before_the_first_call_where_a_scheduler_is_given_later() -> None:
    pipe, calls = trimtab.guide(CASES["sd15"].build()), []
    pipe.add_guidance(Again(), name="again")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(trimtab.UnsupportedSchedulerError, match="again: repeats above 1"):
        run(pipe, CASES["sd15"])
    assert not calls


def test_a_pipeline_that_rescales_its_own_combination_is_refused() -> None:
    pipe = built("qwenimage")
    with (
        pipe.guidance(Again(), name="again"),
        pytest.raises(trimtab.UnsupportedPipelineError, match="rescales its own combination"),
    ):
        run(pipe, CASES["qwenimage"])
