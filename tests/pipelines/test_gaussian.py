"""Guided sampling of a Gaussian, whose exact denoiser is known, through a real pipeline and every parametrisation.

The same guidance must lead to the same picture whether the denoiser predicts noise, velocity, the clean sample or a
flow, and to that of a loop that edits the exact clean estimate by itself.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config

import trimtab
from trimtab.guidance.base import Guidance
from trimtab.guidance.branch import Predictions
from trimtab.guidance.noise import Level, noise_algebra
from trimtab.guidance.plugins.cfg import CFG
from trimtab.guidance.run import Step

from ..guidance.gaussian import Gaussian, image, noise, predict, sample
from ..guidance.scheduler_cases import CASES, Case

# torchsde's Brownian tree rounds its times and warns of it at every call.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

DATA = Gaussian(image(1), 0.2)
OTHER = Gaussian(image(2), 0.5)
TARGET = image(3)


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of `DATA`, and of `OTHER` for the null class."""

    @register_to_config
    def __init__(self, kind: str, sigma_data: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(
        self, hidden: torch.Tensor, timestep: Any, class_labels: torch.Tensor, alpha: float, sigma: float, factor: float
    ) -> torch.Tensor:
        level, x_t = Level(alpha, sigma), hidden * factor * self.scale
        other = (class_labels == 1)[:, None, None, None]
        x0 = torch.where(other, OTHER.x0(x_t, level), DATA.x0(x_t, level))
        return predict(self.config.kind, x0, x_t, level, self.config.sigma_data)


class GaussianPipeline(DiffusionPipeline):
    null_class = 1

    def __init__(self, unet: GaussianDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, case: Case, class_labels: list[int] | None = None, **ignored: Any) -> tuple[torch.Tensor]:
        scheduler, generator = self.scheduler, torch.Generator().manual_seed(0)
        scheduler.set_timesteps(**case.timesteps)
        algebra = noise_algebra(scheduler)
        if case.first:
            scheduler.set_begin_index(case.first)
        start = algebra.levels()[case.first]
        latents = start.alpha * DATA.mean + start.sigma * noise(0)
        for timestep in scheduler.timesteps[case.first :]:
            level = algebra.level(timestep)
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            labels = torch.tensor(class_labels or [0])
            factor = float(latents.norm() / scaled.norm())
            prediction = self.unet(
                scaled, timestep, class_labels=labels, alpha=level.alpha, sigma=level.sigma, factor=factor
            )
            options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        return (latents,)


SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def plain_cases(name: str) -> list[Case]:
    """The parametrisations of one scheduler that walk through the same levels: one option, all prediction types."""
    told = {"prediction_type", "clip_sample", "sigma_data", "noise_sampler_seed", "shift"}
    cases = {case.kind: case for case in CASES if case.name == name and case.config.keys() <= told}
    first = max(case.first for case in cases.values())
    return [dataclasses.replace(case, first=first) for case in cases.values()]


BY_SCHEDULER = {name: plain_cases(name) for name in SCHEDULERS}
ALL = [case for cases in BY_SCHEDULER.values() for case in cases]


@dataclass
class TowardsTarget(Guidance):
    """An edit of the clean estimate."""

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return x0 + 0.3 * (TARGET - x0)


@dataclass
class CleanShift(Guidance):
    """A delta that moves the clean estimate by `0.1 alpha TARGET`, written for each parametrisation by hand."""

    kind: str = trimtab.parameter("epsilon", "What the denoiser predicts.")
    sigma_data: float = trimtab.parameter(1.0, "Standard deviation of the data, for the EDM parametrisations.")

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        level, still = step.level, torch.zeros_like(TARGET)
        # A prediction is linear in the clean estimate at fixed x_t, so that its change is that from 0 to the shift.
        shift = 0.1 * level.alpha * TARGET
        return predict(self.kind, shift, still, level, self.sigma_data) - predict(
            self.kind, still, still, level, self.sigma_data
        )


@dataclass
class QuadraticLoss(Guidance):
    """`0.15 |x_0 - TARGET|^2`, whose gradient moves the clean estimate as `TowardsTarget` does."""

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return 0.15 * (x0 - TARGET).square().flatten(1).sum(1)


Edit = Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]


def towards_target(x0: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
    return x0 + 0.3 * (TARGET - x0)


def clean_shift(x0: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
    return x0 + 0.1 * level.alpha * TARGET


def away_from_other(x0: torch.Tensor, x_t: torch.Tensor, level: Level) -> torch.Tensor:
    other = OTHER.x0(x_t, level)
    return other + 1.5 * (x0 - other)


GUIDANCES: dict[str, tuple[Callable[[Case], Any], Edit]] = {
    "guide_x0": (lambda case: TowardsTarget(), towards_target),
    "loss": (lambda case: QuadraticLoss(), towards_target),
    "delta": (lambda case: CleanShift(kind=case.kind, sigma_data=sigma_data(case)), clean_shift),
    "cfg": (lambda case: CFG(scale=1.5), away_from_other),
}


def sigma_data(case: Case) -> float:
    return float(case.config.get("sigma_data", 1.0))


def guided(case: Case, guidance: str) -> torch.Tensor:
    pipe = trimtab.guide(GaussianPipeline(GaussianDenoiser(case.kind, sigma_data(case)), case.build()))
    pipe.add_guidance(GUIDANCES[guidance][0](case))
    return pipe(case)[0]


def by_hand(case: Case, guidance: str) -> torch.Tensor:
    """The same run without the engine: each clean estimate edited by its formula."""

    def visit(call: int, x_t: torch.Tensor, prediction: torch.Tensor, level: Level) -> torch.Tensor:
        edited = GUIDANCES[guidance][1](DATA.x0(x_t, level), x_t, level)
        return predict(case.kind, edited, x_t, level, sigma_data(case))

    return sample(case.build(), case.kind, DATA, noise(0), case.first, visit)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_guided_run_is_the_edited_run_by_hand(case: Case, guidance: str) -> None:
    expected = by_hand(case, guidance)
    unguided = sample(case.build(), case.kind, DATA, noise(0), case.first)
    assert (expected - unguided).abs().max() > 0.02
    torch.testing.assert_close(guided(case, guidance), expected, rtol=0, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", [name for name, cases in BY_SCHEDULER.items() if len(cases) > 1])
def test_a_guided_run_does_not_depend_on_the_parametrisation(name: str, guidance: str) -> None:
    first, *others = (guided(case, guidance) for case in BY_SCHEDULER[name])
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=2e-3 * first.abs().max().item())
