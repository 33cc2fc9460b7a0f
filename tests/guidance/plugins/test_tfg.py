"""Training-free guidance: each preset's update against its paper's, derived by hand on a Gaussian.

For data N(m, v) the clean estimate is affine in x_t: `x0 = m + k (x_t - a m)` with `k = a v / (s^2 + a^2 v)`, so the
gradient through the denoiser is k times that at the clean estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import nn
from zoo import CASES, run
from zoo.class_conditional import class_conditional

import trimtab
from trimtab.guidance.noise import Level, noise_algebra
from trimtab.guidance.plugins.tfg import TFG

from .gaussian_run import noise, pipeline

MEAN, VARIANCE = 0.3, 0.5
TARGET = torch.tensor([0.9, -0.4, 0.1, -0.8])
STEPS = 5


def square(image: torch.Tensor) -> torch.Tensor:
    return 0.5 * (image - TARGET).square().flatten(1).sum(1)


def norm(image: torch.Tensor) -> torch.Tensor:
    return (image - TARGET).flatten(1).norm(dim=1)


Shift = Callable[[torch.Tensor, torch.Tensor, float, Level, Level], torch.Tensor]
"""Takes x_t, x0, k, and both levels; returns by what the paper's update moves x_s, against plain DDIM."""


def by_hand(shift: Shift, steps: int = STEPS, times: int = 1) -> torch.Tensor:
    """Plain DDIM with the shift, where each step is taken several times from an x_t that is noised back."""
    generator = torch.Generator().manual_seed(1)
    scheduler = pipeline([MEAN], [VARIANCE]).scheduler
    scheduler.set_timesteps(steps)
    levels = [*noise_algebra(scheduler).levels(), Level(1.0, 0.0)]
    x_t = noise()
    for t, s in pairwise(levels):
        ratio = t.alpha / s.alpha
        for left in reversed(range(times)):
            k = t.alpha * VARIANCE / (t.sigma**2 + t.alpha**2 * VARIANCE)
            x0 = MEAN + k * (x_t - t.alpha * MEAN)
            n = (x_t - t.alpha * x0) / t.sigma
            x_s = s.alpha * x0 + s.sigma * n + shift(x_t, x0, k, t, s)
            if left:
                z = torch.randn(x_t.shape, generator=generator)
                x_t = ratio * x_s + math.sqrt(t.sigma**2 - (ratio * s.sigma) ** 2) * z
        x_t = x_s
    return x_t


def guided(preset: str, energy: Any, **parameters: Any) -> torch.Tensor:
    pipe = pipeline([MEAN], [VARIANCE])
    pipe.add_guidance("tfg", preset=preset, energy=energy, **parameters)
    return pipe(noise(), STEPS, generator=torch.Generator().manual_seed(1))


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (expected - by_hand(lambda *_: torch.zeros(()))).abs().max() > 0.02
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def test_dps() -> None:
    """x_s <- x_s - (zeta / |r|) grad_{x_t} |r|^2 / 2 = x_s - zeta grad |r|."""
    zeta = 0.2

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        residual = x0 - TARGET
        return -zeta * k * residual / residual.norm()

    check(guided("dps", norm, rho=zeta), by_hand(shift))


def test_mpgd_moves_the_clean_estimate_and_keeps_the_noise() -> None:
    check(guided("mpgd", square, mu=0.3), by_hand(lambda x_t, x0, k, t, s: -s.alpha * 0.3 * (x0 - TARGET)))


def test_the_size_of_a_gradient_at_the_clean_estimate_is_ruled_as_well() -> None:
    stock = by_hand(lambda *_: torch.zeros(()))
    moved = guided("mpgd", square, mu=0.3, grad_norm="clip", max_norm=1e-6)
    torch.testing.assert_close(moved, stock, atol=2e-4, rtol=1e-3)

    def unit(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        towards = TARGET - x0
        return s.alpha * 0.1 * towards / towards.square().mean().sqrt()

    check(guided("mpgd", square, mu=0.3, grad_norm="unit", max_norm=0.1), by_hand(unit))


@pytest.mark.parametrize("update", ["sample", "clean"])
def test_a_pipeline_that_steps_its_batch_twice_over_has_one_image_in_two_rows(update: str) -> None:
    """DiT hands both halves of its batch to the scheduler."""
    pipe, case = trimtab.guide(CASES["dit"].build()), CASES["dit"]

    def brightness(image: torch.Tensor) -> torch.Tensor:
        return -image.flatten(1).sum(1)

    def images(labels: list[int], seeds: list[int]) -> torch.Tensor:
        return run(pipe, case, class_labels=labels, generator=[torch.Generator().manual_seed(i) for i in seeds])

    with pipe.guidance("tfg", energy=brightness, preset="mpgd", mu=20.0, update=update):
        both = images([1, 5], [1, 2])
        torch.testing.assert_close(both[1:], images([5], [2]), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(both, images([1, 5], [1, 2]), atol=1e-3)


def test_mpgd_needs_no_gradient_through_the_denoiser() -> None:
    pipe = pipeline([MEAN], [VARIANCE])
    pipe.add_guidance("tfg", preset="mpgd", energy=square)
    assert not any(step.gradient for step in pipe.explain_guidance(STEPS).steps)


def test_lgd_without_samples_is_the_score_of_the_energy() -> None:
    """eps <- eps + sigma grad_{x_t} E, so that both the estimate and the noise of DDIM change."""

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        change = t.sigma * k * (x0 - TARGET)
        return (s.sigma - s.alpha * t.sigma / t.alpha) * change

    check(guided("lgd", square, smoothing=0.0), by_hand(shift))


def test_smoothing_a_gaussian_likelihood_widens_it_by_the_variance_of_the_samples() -> None:
    """`E = |x - y|^2 / 2` smoothed by N(0, w^2) is `|x - y|^2 / (2 (1 + w^2))`, w^2 = 1 - abar: LGD's r_t."""

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        change = t.sigma * k * (x0 - TARGET) / (1 + t.sigma**2)
        return (s.sigma - s.alpha * t.sigma / t.alpha) * change

    torch.testing.assert_close(guided("lgd", square, samples=3_000), by_hand(shift), atol=0.05, rtol=0)


@pytest.mark.parametrize("times", [1, 2])
def test_ugd_forward_and_backward(times: int) -> None:
    """eps <- eps + s sigma grad_{x_t} E - (alpha / sigma) D, with D from gradient steps at the clean estimate."""
    mu, iterations, scale = 0.2, 3, 0.5

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        backward = ((1 - mu) ** iterations - 1) * (x0 - TARGET)
        change = scale * t.sigma * k * (x0 - TARGET) - t.alpha / t.sigma * backward
        return (s.sigma - s.alpha * t.sigma / t.alpha) * change

    actual = guided("ugd", square, rho=scale, mu=mu, iterations=iterations, recurrence=times)
    check(actual, by_hand(shift, times=times))


def test_tfg_with_its_schedule() -> None:
    """rho_t and mu_t grow as alpha_t, with mean 1 over the run; Delta_0 is iterated from the unmoved estimate."""
    rho, mu, iterations = 0.1, 0.1, 2
    scheduler = pipeline([MEAN], [VARIANCE]).scheduler
    scheduler.set_timesteps(STEPS)
    shares = [level.alpha**2 for level in noise_algebra(scheduler).levels()] + [1.0]
    ratios = [a / b for a, b in pairwise(shares)]

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        scale = (t.alpha / s.alpha) ** 2 / (sum(ratios) / len(ratios))
        clean = ((1 - mu * scale) ** iterations - 1) * (x0 - TARGET)
        return s.alpha * (-rho * scale * k * (x0 - TARGET) / t.alpha + clean)

    actual = guided("tfg", square, rho=rho, mu=mu, iterations=iterations, smoothing=0.0)
    check(actual, by_hand(shift))


def test_freedom_is_a_gradient_step_and_goes_back_in_time() -> None:
    """x_s <- x_s - rho grad_{x_t} E, then from x_t noised back, twice in all, which is its preset."""

    def shift(x_t: torch.Tensor, x0: torch.Tensor, k: float, t: Level, s: Level) -> torch.Tensor:
        return -0.2 * k * (x0 - TARGET)

    check(guided("freedom", square, rho=0.2), by_hand(shift, times=2))


def test_freedom_evaluates_each_step_again_and_comes_closer() -> None:
    def far(**parameters: Any) -> float:
        pipe = pipeline([MEAN], [VARIANCE])
        pipe.add_guidance("tfg", preset="freedom", energy=square, rho=0.3, **parameters)
        out = pipe(noise(batch=200), STEPS, generator=torch.Generator().manual_seed(1))
        assert pipe.last_guided_run.evaluations == STEPS * parameters["recurrence"]
        return float((out - TARGET).square().mean())

    assert far(recurrence=3) < 0.8 * far(recurrence=1)


def posterior_error(pipe: Any, observed: float, noise_std: float, steps: int = 100) -> tuple[float, float]:
    """Mean and variance of the samples minus those of `N(m, v)` observed as `y = x + noise`, in closed form."""
    out = pipe(noise(width=1, batch=20_000), steps)
    precision = 1 / VARIANCE + 1 / noise_std**2
    mean = (MEAN / VARIANCE + observed / noise_std**2) / precision
    return out.mean().item() - mean, out.var().item() - 1 / precision


@pytest.mark.parametrize("flow", [False, True], ids=["vp", "flow"])
def test_the_posterior_of_a_gaussian_and_the_known_error_of_dps(flow: bool) -> None:
    """With the exact likelihood `p(y | x_t) = N(y; x0, s^2 + v_t)`, v_t = Var(x_0 | x_t), the posterior is sampled.

    A point estimate (`p(y | x_t) ~ N(y; x0, s^2)`, as in DPS) leaves v_t out, so it is too sure: its variance is too
    small. That is the method's own error.
    """
    observed, std = 1.2, 0.4

    def energy(spread: Callable[[Level], float]) -> Any:
        # E takes images only, so the level reaches it through the guidance's step.
        class Exact(trimtab.guidance.plugins.tfg.TFG):
            def smoothed_energy(self, step: Any, x0: torch.Tensor) -> torch.Tensor:
                return (x0 - observed).square().flatten(1).sum(1) / (2 * (std**2 + spread(step.level)))

        return Exact(preset="lgd", smoothing=0.0, energy=square)

    def posterior_variance(level: Level) -> float:
        return level.sigma**2 * VARIANCE / (level.sigma**2 + level.alpha**2 * VARIANCE)

    errors = {}
    for name, spread in (("exact", posterior_variance), ("point", lambda level: 0.0)):
        pipe = pipeline([MEAN], [VARIANCE], flow=flow)
        pipe.add_guidance(energy(spread))
        errors[name] = posterior_error(pipe, observed, std)
    assert abs(errors["exact"][0]) < 0.015 and abs(errors["exact"][1]) < 0.015
    assert errors["point"][1] < -0.02


def test_switched_off_it_is_the_stock_run() -> None:
    pipe = pipeline([MEAN], [VARIANCE])
    stock = pipe(noise(), STEPS)
    pipe.add_guidance("tfg", energy=square, scale=0.0)
    assert torch.equal(pipe(noise(), STEPS), stock)
    assert pipe.last_guided_run.evaluations == STEPS


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    pipe = pipeline([MEAN], [VARIANCE])
    pipe.add_guidance("tfg", energy=square, rho=0.1, mu=0.1, smoothing=0.5)
    both = noise(batch=2)
    torch.testing.assert_close(pipe(both, STEPS)[:1], pipe(both[:1], STEPS), atol=1e-5, rtol=0)


def test_a_missing_energy_is_an_error_that_says_what_is_needed() -> None:
    with pytest.raises(trimtab.ParameterError, match="tfg: energy=None; needed: a function of images"):
        pipeline([MEAN], [VARIANCE]).add_guidance("tfg")


def test_an_energy_that_is_not_finite_names_step_and_plug_in() -> None:
    pipe = pipeline([MEAN], [VARIANCE])
    pipe.add_guidance("tfg", preset="mpgd", energy=lambda image: (image - image.detach()).flatten(1).norm(dim=1).sqrt())
    with pytest.raises(trimtab.GuidanceRuntimeError, match="tfg: the gradient is not finite at step 0 of 5"):
        pipe(noise(), STEPS)
    assert math.isfinite(pipe.unet.scale.item())


class Learned(nn.Module):
    """An energy with a batch norm, as it comes from a training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images).square().flatten(1).mean(1)


@pytest.mark.parametrize("preset", ["dps", "mpgd"])
def test_a_network_as_energy_is_borrowed(preset: str) -> None:
    pipe, energy = trimtab.guide(class_conditional(["one"])), Learned().train()
    before = {name: value.clone() for name, value in energy.state_dict().items()}
    with pipe.guidance("tfg", preset=preset, energy=energy):
        pipe(0, num_inference_steps=2)
    assert energy.training and energy.norm.weight.requires_grad and energy.norm.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in energy.state_dict().items())


@pytest.mark.parametrize("preset", ["dps", "mpgd"])
@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: x.square().mean(), r"energy returned <float32 tensor \[\]>; needed: one number an image, a tensor"),
        (lambda x: 1.0, "energy returned 1.0; needed: one number an image"),
        (lambda x: x.detach().flatten(1).mean(1), "energy does not depend on the images that it is given"),
    ],
)
def test_an_energy_that_is_none_is_an_error_by_name(preset: str, energy: Any, message: str) -> None:
    pipe = trimtab.guide(class_conditional(["one"]))
    with pipe.guidance("tfg", preset=preset, energy=energy), pytest.raises(trimtab.GuidanceRuntimeError, match=message):
        pipe(0, num_inference_steps=2)


def test_the_memory_of_gradients_at_the_clean_estimate_is_weighed() -> None:
    pipe = trimtab.guide(class_conditional(["one"]))
    pipe.add_guidance("tfg", preset="mpgd", energy=lambda x: x.square().flatten(1).mean(1))
    assert "to be seen after a run" in str(pipe.explain_guidance(2))
    pipe(0, num_inference_steps=2)
    assert pipe.last_guided_run.graph_bytes >= 8 * 8 * 4
    assert "in the last run: 0.0 MiB" in str(pipe.explain_guidance(2))


@pytest.mark.parametrize("schedule", ["increase", "decrease"])
def test_a_level_that_is_evaluated_twice_has_one_weight(schedule: str) -> None:
    """With mean 1 over the levels."""
    weights: dict[float, set[float]] = {}

    class Watched(TFG):
        def guide_x0(self, step: Any, x0: torch.Tensor) -> torch.Tensor:
            weights.setdefault(round(step.level.ratio, 6), set()).add(self.weight("mu", step))
            return x0

    pipe = trimtab.guide(class_conditional(["one"]))
    pipe.scheduler = HeunDiscreteScheduler()
    pipe.add_guidance(Watched(preset="mpgd", mu=2.0, mu_schedule=schedule, energy=square))
    pipe(0, num_inference_steps=4)
    assert len(weights) == 4 and all(len(found) == 1 for found in weights.values())
    assert sum(value for found in weights.values() for value in found) == pytest.approx(4 * 2.0, rel=1e-5)


def test_what_is_held_at_a_time_does_not_grow_with_the_iterations() -> None:
    pipe, kept = trimtab.guide(class_conditional(["one"])), []
    for iterations in (1, 8):
        with pipe.guidance("tfg", preset="mpgd", iterations=iterations, energy=lambda x: x.square().flatten(1).mean(1)):
            pipe(0, num_inference_steps=2)
        kept.append(pipe.last_guided_run.graph_bytes)
    assert kept[0] == kept[1] > 0
