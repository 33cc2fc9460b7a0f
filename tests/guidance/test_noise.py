"""The noise algebra against Diffusers' own conversions and against closed-form denoisers."""

from __future__ import annotations

import itertools
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

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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
    """The clean estimate that the scheduler itself works with in its next step, which it takes; None if it tells none."""
    if hasattr(scheduler, "convert_model_output") and not isinstance(scheduler, diffusers.DEISMultistepScheduler):
        if scheduler.step_index is None:
            scheduler._init_step_index(scheduler.timesteps[call])
        clean = scheduler.convert_model_output(prediction, sample=x_t)
        advance(scheduler, call, prediction, x_t, memory)
        return clean
    advance(scheduler, call, prediction, x_t, memory)
    result = memory.get("result", {})
    if "denoised" in result:
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(scheduler.timesteps[call])
        return (result["denoised"] - skip * x_t) / out
    return result.get("pred_original_sample") if result else memory.get("clean")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_x0_is_the_scheduler_s_own(case: Case) -> None:
    """With arbitrary predictions, at every call; schedulers that keep their estimate to themselves are passed over."""
    scheduler = case.build()
    algebra = noise_algebra(scheduler)
    memory: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    for call, level in enumerate(algebra.levels()):
        x_t = level.alpha * image(call) + level.sigma * noise(call)
        prediction = noise(100 + call)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x_t, scheduler.timesteps[call])
        own = own_x0(scheduler, prediction, x_t, call, memory)
        if own is None:
            pytest.skip("it tells no clean estimate")
        # Near pure noise, epsilon gives the clean sample by a difference of large numbers.
        rounding = 2e-6 * max(1.0, level.sigma, 1 / level.alpha if level.alpha else 1.0)
        torch.testing.assert_close(algebra.x0(prediction, x_t, level), own.to(x_t.dtype), rtol=1e-5, atol=5 * rounding)


# -- conversions: exact denoisers --------------------------------------------------------------------------------------

MIXTURE = Gaussian(image(7), torch.rand(SHAPE, generator=torch.Generator().manual_seed(8)) + 0.05)

FAMILIES: dict[str, tuple[type, tuple[str, ...], dict[str, Any]]] = {
    "DDIM": (diffusers.DDIMScheduler, EPSILON_V_SAMPLE, {"clip_sample": False}),
    "Euler": (EulerDiscreteScheduler, EPSILON_V_SAMPLE, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, EPSILON_V_SAMPLE, {}),
    "DPM-Solver++ on the flow path": (
        DPMSolverMultistepScheduler,
        ("flow_prediction", "epsilon", "sample"),
        {"use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "DPM-Solver++ singlestep": (diffusers.DPMSolverSinglestepScheduler, EPSILON_V_SAMPLE, {}),
    "Heun": (HeunDiscreteScheduler, EPSILON_V_SAMPLE, {}),
    "KDPM2 ancestral": (KDPM2AncestralDiscreteScheduler, ("epsilon", "v_prediction"), {}),
    "DPM-Solver SDE": (diffusers.DPMSolverSDEScheduler, ("epsilon", "v_prediction"), {"noise_sampler_seed": 0}),
    "EDM Euler": (EDMEulerScheduler, ("edm_epsilon", "edm_v_prediction"), {"sigma_data": 0.7}),
}


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_denoisers_sample_alike_in_every_parametrisation(family: str, guided: bool) -> None:
    """Also under a guidance that moves the clean estimate by a fixed amount."""
    owner, kinds, config = FAMILIES[family]
    delta = 0.3 * image(9)
    results = []
    for kind in kinds:
        scheduler = prepared(owner(prediction_type=kind.removeprefix("edm_"), **config), 12)
        algebra = noise_algebra(scheduler)

        def visit(
            call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level, algebra: NoiseAlgebra = algebra
        ) -> torch.Tensor:
            return algebra.from_x0(algebra.x0(prediction, x_t, level) + delta, x_t, level) if guided else prediction

        results.append(sample(scheduler, kind, MIXTURE, noise(10), visit=visit))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-3)
    scheduler = prepared(owner(prediction_type=kinds[0].removeprefix("edm_"), **config), 12)
    unguided = sample(scheduler, kinds[0], MIXTURE, noise(10))
    assert torch.allclose(unguided, results[0], atol=2e-3) is not guided


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (DDIMScheduler(clip_sample=False), "epsilon"),
        (DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), "v_prediction"),
        (DPMSolverMultistepScheduler(), "epsilon"),
        (diffusers.DPMSolverSinglestepScheduler(), "epsilon"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow_prediction"),
        (diffusers.DEISMultistepScheduler(), "epsilon"),
        (EulerDiscreteScheduler(), "epsilon"),
        (HeunDiscreteScheduler(), "epsilon"),
        (diffusers.KDPM2DiscreteScheduler(), "epsilon"),
        (EDMEulerScheduler(), "edm_epsilon"),
        (diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"), "edm_v_prediction"),
        (FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "reversed_flow_prediction"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "flow_prediction"),
        (diffusers.MiniMaxH3Scheduler(shift=3.0), "reversed_flow_prediction"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerMixin) else value,
)
def test_many_steps_follow_the_probability_flow(scheduler: Any, kind: str) -> None:
    """With the exact denoiser a deterministic scheduler solves the ODE whose solution is known in closed form."""
    scheduler.set_timesteps(200)
    levels = noise_algebra(scheduler).levels()
    last: list[torch.Tensor] = []

    def visit(call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level) -> torch.Tensor:
        last[:] = [x_t]
        return prediction

    sample(scheduler, kind, MIXTURE, noise(11), visit=visit)
    start = levels[0].alpha * MIXTURE.mean + levels[0].sigma * noise(11)
    exact = MIXTURE.solution(start, levels[0], levels[-1])
    torch.testing.assert_close(last[0], exact, rtol=0, atol=0.05)


# -- conversions: consistency ------------------------------------------------------------------------------------------


def mixed(algebra: NoiseAlgebra, level: Level) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A clean image, a noise and their mixture, in float64."""
    clean, n = image(12).double(), noise(13).double()
    return clean, n, level.alpha * clean + level.sigma * n


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trips(case: Case) -> None:
    scheduler = case.build()
    algebra = noise_algebra(scheduler)
    for level in algebra.levels():
        if level.alpha == 0 and case.kind == "epsilon":
            continue
        clean, n, x_t = mixed(algebra, level)
        prediction = algebra.from_x0(clean, x_t, level)
        data = float(getattr(scheduler.config, "sigma_data", 1.0))
        torch.testing.assert_close(prediction, predict(case.kind, clean, x_t, level, data), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(algebra.x0(prediction, x_t, level), clean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(algebra.epsilon(prediction, x_t, level), n, rtol=1e-6, atol=1e-6)
        v = predict("v_prediction", clean, x_t, level)
        torch.testing.assert_close(algebra.velocity(prediction, x_t, level), v, rtol=1e-6, atol=1e-6)


def test_an_epsilon_prediction_is_its_own_noise_to_the_last_bit() -> None:
    algebra = noise_algebra(prepared(EulerDiscreteScheduler()))
    prediction = noise(0)
    assert torch.equal(algebra.epsilon(prediction, noise(1), algebra.levels()[-1]), prediction)


@pytest.mark.parametrize("axis", [1, 2])
def test_learned_variance_is_left_out_and_kept(axis: int) -> None:
    """Channels come first in images and second in some videos."""
    algebra = noise_algebra(prepared(DDPMScheduler(variance_type="learned_range")))
    level = algebra.levels()[4]
    _, n, x_t = mixed(algebra, level)
    variance = noise(14).double()
    prediction = torch.cat([n, variance], dim=axis)
    mean, kept = split_variance(prediction, x_t)
    assert torch.equal(mean, n) and kept is not None and torch.equal(kept, variance)
    clean = algebra.x0(prediction, x_t, level)
    torch.testing.assert_close(clean, image(12).double())
    assert torch.equal(algebra.epsilon(prediction, x_t, level), n)
    assert algebra.velocity(prediction, x_t, level).shape == x_t.shape
    edited = algebra.from_x0(clean, x_t, level, prediction)
    torch.testing.assert_close(edited, prediction)


def test_a_prediction_of_another_shape_is_an_error() -> None:
    algebra = noise_algebra(prepared(DDIMScheduler()))
    with pytest.raises(GuidanceRuntimeError, match=r"\(1, 3, 8, 8\) does not fit a sample of shape \(1, 4, 8, 8\)"):
        algebra.x0(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8), algebra.levels()[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    algebra = noise_algebra(prepared(EulerDiscreteScheduler()))
    level = algebra.levels()[0]
    clean, n, x_t = (tensor.to(dtype) for tensor in mixed(algebra, level))
    estimate = algebra.x0(n, x_t, level)
    assert estimate.dtype == dtype
    assert torch.equal(estimate, (x_t.float() - level.sigma * n.float()).to(dtype))
    assert algebra.from_x0(clean, x_t, level).dtype == dtype
    assert algebra.x0(n, x_t.float(), level).dtype == torch.float32
    assert algebra.from_x0(clean.float(), x_t.float(), level, prediction=n).dtype == dtype


def test_gradients_pass_through() -> None:
    algebra = noise_algebra(prepared(DDIMScheduler(prediction_type="v_prediction")))
    level = algebra.levels()[3]
    prediction, x_t = noise(1).requires_grad_(), noise(2).requires_grad_()
    algebra.x0(prediction, x_t, level).sum().backward()
    assert prediction.grad is not None and x_t.grad is not None
    torch.testing.assert_close(prediction.grad, torch.full(SHAPE, -level.sigma))
    torch.testing.assert_close(x_t.grad, torch.full(SHAPE, level.alpha))


def test_pure_noise_has_a_clean_estimate_unless_the_network_predicts_the_noise() -> None:
    zero_snr: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in EPSILON_V_SAMPLE:
        algebra = noise_algebra(prepared(DDIMScheduler(prediction_type=kind, **zero_snr)))
        level = algebra.levels()[0]
        assert level == Level(0.0, 1.0)
        clean, n, x_t = mixed(algebra, level)
        prediction = algebra.from_x0(clean, x_t, level)
        torch.testing.assert_close(algebra.epsilon(prediction, x_t, level), n)
        if kind == "epsilon":
            with pytest.raises(GuidanceRuntimeError, match=r"DDIMScheduler: at alpha=0, sigma=1 .* no clean estimate"):
                algebra.x0(prediction, x_t, level)
        else:
            torch.testing.assert_close(algebra.x0(prediction, x_t, level), clean)


def test_a_clean_sample_admits_no_other_clean_estimate() -> None:
    algebra = noise_algebra(prepared(diffusers.DDIMInverseScheduler()))
    level = algebra.levels()[0]
    x_t = image(1)
    assert torch.equal(algebra.x0(noise(1), x_t, level), x_t)
    with pytest.raises(GuidanceRuntimeError, match=r"sigma=0 .* give the guidance sigma_min above 0"):
        algebra.from_x0(image(2), x_t, level)


def test_a_consistency_model_at_its_smallest_sigma_cannot_be_guided() -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(40)
    algebra = noise_algebra(scheduler)
    with pytest.raises(GuidanceRuntimeError, match=r"smallest sigma=0\.002"):
        algebra.from_x0(image(1), noise(1), algebra.levels()[-1])
