"""Levels against a denoiser of a single image, whose state must stay on `alpha x_0 + sigma n`."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)

from trimtab.guidance.errors import ParameterError
from trimtab.guidance.gradient import levels_of_run
from trimtab.guidance.noise import Level, noise_algebra

from .gaussian import Gaussian, image, noise, prepared, sample
from .scheduler_cases import CASES, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


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
    assert all(level.alpha >= 0 and level.sigma >= 0 for level in levels)
    descending = levels if levels[0].ratio > levels[-1].ratio else levels[::-1]
    for level, following in itertools.pairwise(descending):
        assert following.ratio <= level.ratio * (1 + 1e-4)


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


def test_before_set_timesteps_there_are_no_levels() -> None:
    with pytest.raises(ParameterError, match=r"MiniMaxH3Scheduler has no timesteps yet; .*set_timesteps"):
        noise_algebra(diffusers.MiniMaxH3Scheduler()).levels()


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
    ("owner", "config", "steps", "expected"),
    [
        (DDIMScheduler, {}, 3, [0, 1, 2]),
        (HeunDiscreteScheduler, {}, 3, [0, 0, 1, 1, 2]),
        (PNDMScheduler, {"skip_prk_steps": True}, 4, [0, 0, 1, 2, 3]),
        (PNDMScheduler, {}, 5, [0] * 4 + [1] * 4 + [2] * 4 + [3, 4]),
    ],
    ids=["one call a level", "two calls a level", "multistep", "Runge-Kutta"],
)
def test_calls_are_counted_into_noise_levels(
    owner: Any, config: dict[str, Any], steps: int, expected: list[int]
) -> None:
    assert noise_algebra(prepared(owner(**config), steps)).noise_steps() == expected


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_levels_that_a_scheduler_goes_through_twice_are_one_whatever_their_rounding(steps: int) -> None:
    scheduler = KDPM2AncestralDiscreteScheduler()
    scheduler.set_timesteps(steps)
    ratios = [level.ratio for level in noise_algebra(scheduler).levels()]
    distinct = [level for level in set(ratios) if not any(0 < other - level < 1e-3 * level for other in ratios)]
    step = SimpleNamespace(algebra=noise_algebra(scheduler))
    found = levels_of_run(step)
    assert [level.ratio for level in found[:-1]] == pytest.approx(sorted(distinct, reverse=True), rel=1e-3)
    assert found[-1].ratio == 0 and len(set(ratios)) > len(found) - 1


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")], ids=str)
def test_neighbours_among_a_thousand_levels_are_not_one(scheduler: Any) -> None:
    scheduler.set_timesteps(1000)
    levels = noise_algebra(scheduler).levels()
    assert not any(one.alike(other) for one, other in itertools.pairwise(levels))


@pytest.mark.parametrize(("alpha", "holds"), [(0.0, False), (1e-6, False), (0.068, True), (1.0, True)])
def test_a_millionth_of_signal_is_none(alpha: float, holds: bool) -> None:
    """As UniPC begins with on flow models; Stable Diffusion begins with 0.068."""
    assert Level(alpha, math.sqrt(1 - alpha**2)).holds_signal is holds
