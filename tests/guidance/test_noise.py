"""Conversions against Diffusers' own, and against one another."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
)

from trimtab.guidance.errors import GuidanceRuntimeError
from trimtab.guidance.noise import Level, NoiseAlgebra, noise_algebra, split_variance

from .gaussian import SHAPE, advance, image, noise, predict, prepared
from .scheduler_cases import CASES, EPSILON_V_SAMPLE, TELLS_NO_X0, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- conversions: Diffusers' own ---------------------------------------------------------------------------------------


def own_x0(scheduler: Any, prediction: torch.Tensor, x_t: torch.Tensor, call: int, memory: dict[str, Any]) -> Any:
    """The clean estimate that the scheduler itself works with in the step that is taken here."""
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


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in TELLS_NO_X0], ids=str)
def test_x0_is_the_scheduler_s_own(case: Case) -> None:
    """With arbitrary predictions, at every call."""
    scheduler = case.build()
    algebra = noise_algebra(scheduler)
    memory: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    for call, level in enumerate(algebra.levels()):
        x_t = level.alpha * image(call) + level.sigma * noise(call)
        prediction = noise(100 + call)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x_t, scheduler.timesteps[call])
        own = own_x0(scheduler, prediction, x_t, call, memory)
        assert own is not None
        # Near pure noise, epsilon gives the clean sample by a difference of large numbers.
        rounding = 2e-6 * max(1.0, level.sigma, 1 / level.alpha if level.alpha else 1.0)
        torch.testing.assert_close(algebra.x0(prediction, x_t, level), own.to(x_t.dtype), rtol=1e-5, atol=5 * rounding)


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
        if level.alpha > 0:
            torch.testing.assert_close(algebra.from_epsilon(n, x_t, level), prediction, rtol=1e-6, atol=1e-6)
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
