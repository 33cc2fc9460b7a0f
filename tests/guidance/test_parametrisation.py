"""Parametrisations against closed-form denoisers: what a run samples must not depend on what its network predicts."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
)

from trimtab.guidance.noise import Level, NoiseAlgebra, noise_algebra

from .gaussian import SHAPE, Gaussian, image, noise, prepared, sample
from .scheduler_cases import EPSILON_V_SAMPLE, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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


MANY = {"num_inference_steps": 200}

DETERMINISTIC = [
    Case("DDIMScheduler", "epsilon", {"clip_sample": False}, MANY),
    Case("DDIMScheduler", "v_prediction", {"clip_sample": False, "prediction_type": "v_prediction"}, MANY),
    Case("DPMSolverMultistepScheduler", "epsilon", {}, MANY),
    Case("DPMSolverSinglestepScheduler", "epsilon", {}, MANY),
    Case(
        "UniPCMultistepScheduler",
        "flow_prediction",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        MANY,
    ),
    Case("DEISMultistepScheduler", "epsilon", {}, MANY),
    Case("EulerDiscreteScheduler", "epsilon", {}, MANY),
    Case("HeunDiscreteScheduler", "epsilon", {}, MANY),
    Case("KDPM2DiscreteScheduler", "epsilon", {}, MANY),
    Case("EDMEulerScheduler", "edm_epsilon", {}, MANY),
    Case("EDMDPMSolverMultistepScheduler", "edm_v_prediction", {"prediction_type": "v_prediction"}, MANY),
    Case("FlowMatchEulerDiscreteScheduler", "flow_prediction", {}, MANY),
    Case("FlowMatchEulerDiscreteScheduler", "reversed_flow_prediction", {"invert_sigmas": True}, MANY),
    Case("FlowMatchHeunDiscreteScheduler", "flow_prediction", {}, MANY),
    Case("MiniMaxH3Scheduler", "reversed_flow_prediction", {"shift": 3.0}, MANY),
]


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


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_many_steps_follow_the_probability_flow(case: Case) -> None:
    """With the exact denoiser a deterministic scheduler solves the ODE whose solution is known in closed form."""
    scheduler = case.build()
    levels = noise_algebra(scheduler).levels()
    last: list[torch.Tensor] = []

    def visit(call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level) -> torch.Tensor:
        last[:] = [x_t]
        return prediction

    sample(scheduler, case.kind, MIXTURE, noise(11), visit=visit)
    start = levels[0].alpha * MIXTURE.mean + levels[0].sigma * noise(11)
    exact = MIXTURE.solution(start, levels[0], levels[-1])
    torch.testing.assert_close(last[0], exact, rtol=0, atol=0.05)
