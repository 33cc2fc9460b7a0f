"""The noise algebra against Diffusers' own conversions and against closed-form denoisers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from trimtab.guidance.errors import GuidanceRuntimeError, ParameterError, UnsupportedSchedulerError
from trimtab.guidance.noise import Level, NoiseAlgebra, noise_algebra, split_variance
from trimtab.guidance.schedulers import REFUSED, SUPPORTED

from .gaussian import Gaussian, advance, predict, sample
from .scheduler_cases import CASES, EPSILON_V_SAMPLE, Case

SHAPE = (1, 4, 32, 32)


def image(seed: int) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def prepared(scheduler: Any, steps: int = 10) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


# -- which schedulers ------------------------------------------------------------------------------------------------


def exported() -> set[str]:
    names = {*dir(diffusers), *dir(diffusers.schedulers), "ScoreSdeVpScheduler"}
    return {name for name in names if name.endswith("Scheduler") and isinstance(scheduler_class(name), type)}


def scheduler_class(name: str) -> Any:
    return getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)


def test_every_exported_scheduler_is_covered_or_refused() -> None:
    assert exported() == SUPPORTED.keys() | REFUSED.keys()
    assert not SUPPORTED.keys() & REFUSED.keys()


def test_every_covered_scheduler_is_tested() -> None:
    assert {case.name for case in CASES} == SUPPORTED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_reason_and_remedy(name: str) -> None:
    owner = scheduler_class(name)
    with pytest.raises(UnsupportedSchedulerError, match=rf"{name} cannot be guided: .*(use|guide|no other scheduler)"):
        noise_algebra(owner.__new__(owner))


def test_an_unknown_scheduler_is_refused_with_what_works_instead() -> None:
    class Homemade(SchedulerMixin):
        pass

    with pytest.raises(UnsupportedSchedulerError, match=r"Homemade cannot be guided.*DDIMScheduler"):
        noise_algebra(Homemade())


def test_a_subclass_of_the_same_name_is_its_diffusers_class() -> None:
    scheduler = prepared(EulerDiscreteScheduler())
    stock = type(scheduler)
    guided = type(stock.__name__, (stock,), {"__module__": stock.__module__})
    renamed = type("Mine", (stock,), {"__module__": "mine"})
    for owner in (guided, renamed):
        scheduler.__class__ = owner
        assert noise_algebra(scheduler).levels() == noise_algebra(prepared(stock())).levels()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(prediction_type="flow_prediction"), "allowed: epsilon, original_sample, sample, v_prediction"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "with use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True), "use_flow_sigmas=True"),
        (EDMEulerScheduler(prediction_type="sample"), "allowed: epsilon, v_prediction"),
        (FlowMatchLCMScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True, stochastic_sampling=True), "stochastic_sampling=False"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerMixin) else None,
)
def test_a_configuration_without_a_defined_clean_estimate_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=message):
        noise_algebra(scheduler)


# -- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_single_image_stays_on_its_path_at_every_call(case: Case) -> None:
    """x_t = alpha x_0 + sigma n at every call of step, with n of standard deviation 1 and the same for every x_0."""
    image_of: list[torch.Tensor] = [image(2), image(3)]
    residues: list[list[torch.Tensor]] = [[], []]
    levels: list[Level] = []
    for x_0, found in zip(image_of, residues, strict=True):
        levels.clear()

        def visit(
            call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level, x_0: Any = x_0, found: Any = found
        ) -> torch.Tensor:
            levels.append(level)
            found.append((x_t - level.alpha * x_0) / math.hypot(level.alpha, level.sigma))
            return prediction

        scheduler = case.build()
        sample(scheduler, case.kind, Gaussian(x_0), noise(1), first=case.first, visit=visit)
    assert levels == noise_algebra(scheduler).levels()[case.first :]
    for one, other, level in zip(*residues, levels, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=case.tolerance)
        assert float(one.std()) == pytest.approx(
            level.sigma / math.hypot(level.alpha, level.sigma), rel=0.06, abs=case.tolerance
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_levels_are_known_before_anything_was_stepped(case: Case) -> None:
    levels = noise_algebra(case.build()).levels()
    ratios = [level.ratio for level in levels]
    assert all(level.alpha >= 0 and level.sigma >= 0 for level in levels)
    assert sorted(ratios) in (ratios, ratios[::-1])


def test_ratio_of_pure_noise_is_infinite() -> None:
    assert Level(0.0, 1.0).ratio == math.inf
    assert Level(0.5, 1.0).ratio == 2.0


def test_without_an_index_the_scheduler_says_where_it_is() -> None:
    scheduler = prepared(EulerDiscreteScheduler())
    algebra = noise_algebra(scheduler)
    third = algebra.levels()[3]
    assert algebra.level(scheduler.timesteps[3]) == third
    scheduler.set_begin_index(3)
    assert algebra.level(scheduler.timesteps[0]) == third
    assert algebra.level(scheduler.timesteps[0], index=5) == algebra.levels()[5]


def test_a_run_that_starts_in_the_middle_starts_with_the_first_of_two_evaluations() -> None:
    scheduler = prepared(HeunDiscreteScheduler())
    twice = scheduler.timesteps[3]
    assert scheduler.timesteps[4] == twice
    scheduler.scale_model_input(noise(0), twice)
    assert scheduler.step_index == 4
    assert noise_algebra(prepared(HeunDiscreteScheduler())).level(twice) == noise_algebra(scheduler).levels()[4]


def test_a_timestep_of_the_whole_batch_may_be_given_once_or_for_each_sample() -> None:
    algebra = noise_algebra(prepared(DDIMScheduler()))
    assert algebra.level(torch.tensor([500, 500])) == algebra.level(torch.tensor(500)) == algebra.level(500)
    with pytest.raises(ParameterError, match="several noise levels"):
        algebra.level(torch.tensor([500, 400]))


def test_a_timestep_that_is_not_on_the_schedule_is_an_error() -> None:
    with pytest.raises(ParameterError, match=r"timestep=12\.5 is none of EulerDiscreteScheduler's"):
        noise_algebra(prepared(EulerDiscreteScheduler())).level(12.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_observed_input_scale_agrees_with_the_rules(dtype: torch.dtype) -> None:
    scheduler = prepared(KDPM2AncestralDiscreteScheduler())
    scales: list[float] = []
    original = scheduler.scale_model_input

    def observe(x_t: torch.Tensor, timestep: Any) -> torch.Tensor:
        scaled = original(x_t.to(dtype), timestep)
        scales.append(float((scaled.float() * x_t).sum() / (x_t * x_t).sum()))
        return scaled

    scheduler.scale_model_input = observe
    algebra = noise_algebra(scheduler)

    def visit(call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level) -> torch.Tensor:
        assert math.hypot(1, level.sigma) * scales[-1] == pytest.approx(1, abs=2e-3)
        assert algebra.level(scheduler.timesteps[call], input_scale=scales[-1]) == level
        return prediction

    sample(scheduler, "epsilon", Gaussian(image(1)), noise(2), visit=visit)
    assert len(scales) == len(algebra.levels())


def test_an_input_scale_that_contradicts_the_rule_wins() -> None:
    scheduler = prepared(EulerDiscreteScheduler())
    level = noise_algebra(scheduler).level(scheduler.timesteps[0], input_scale=0.6)
    assert level == Level(1.0, pytest.approx(4 / 3))


def test_inversion_is_called_with_the_level_that_it_goes_to() -> None:
    scheduler = prepared(diffusers.DDIMInverseScheduler())
    levels = noise_algebra(scheduler).levels()
    assert levels[0] == Level(1.0, 0.0)
    assert levels[1:] == noise_algebra(prepared(DDIMScheduler())).levels()[:0:-1]


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [
        (DDIMScheduler(), 3, [0, 1, 2]),
        (HeunDiscreteScheduler(), 3, [0, 0, 1, 1, 2]),
        (PNDMScheduler(skip_prk_steps=True), 4, [0, 0, 1, 2, 3]),
        (PNDMScheduler(), 5, [0] * 4 + [1] * 4 + [2] * 4 + [3, 4]),
    ],
    ids=["one call a level", "two calls a level", "multistep", "Runge-Kutta"],
)
def test_calls_are_counted_into_noise_levels(scheduler: Any, steps: int, expected: list[int]) -> None:
    assert noise_algebra(prepared(scheduler, steps)).noise_steps() == expected


# -- conversions: Diffusers' own ---------------------------------------------------------------------------------------


def own_x0(scheduler: Any, prediction: torch.Tensor, x_t: torch.Tensor, call: int, memory: dict[str, Any]) -> Any:
    """The clean estimate that the scheduler itself works with in its next step, and the sample after that step."""
    if hasattr(scheduler, "convert_model_output") and not isinstance(scheduler, diffusers.DEISMultistepScheduler):
        if scheduler.step_index is None:
            scheduler._init_step_index(scheduler.timesteps[call])
        clean = scheduler.convert_model_output(prediction, sample=x_t)
        return clean, advance(scheduler, call, prediction, x_t, memory)
    after = advance(scheduler, call, prediction, x_t, memory)
    result = memory.get("result", {})
    if "denoised" in result:
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(scheduler.timesteps[call])
        return (result["denoised"] - skip * x_t) / out, after
    return memory.get("clean") if not result else result.get("pred_original_sample"), after


@pytest.mark.parametrize("case", CASES, ids=str)
def test_x0_is_the_scheduler_s_own(case: Case) -> None:
    """With arbitrary predictions, at every call; schedulers that keep their estimate to themselves are passed over."""
    scheduler = case.build()
    algebra = noise_algebra(scheduler)
    levels = algebra.levels()
    x_t = levels[0].sigma * noise(0) + levels[0].alpha * image(0)
    memory: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    for call, level in enumerate(levels):
        scheduler.scale_model_input(x_t, scheduler.timesteps[call]) if hasattr(scheduler, "scale_model_input") else None
        prediction = noise(call)
        mine = algebra.x0(prediction, x_t, level)
        own, after = own_x0(scheduler, prediction, x_t, call, memory)
        if own is None:
            pytest.skip("it returns no clean estimate")
        scale = 1 + float(own.abs().max())
        torch.testing.assert_close(mine / scale, own.to(mine.dtype) / scale, rtol=0, atol=1e-5)
        x_t = after
