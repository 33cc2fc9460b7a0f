"""What a guidance adds arrives at the stock `scheduler.step` as itself, whatever the pipeline does with its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from recorder import Enough, Record, SchedulerStep, recorded
from zoo import CASES, T5, Case, run
from zoo.diffusion_transformers import lumina2

import trimtab
from trimtab.conformance.tiny import assemble
from trimtab.guidance.base import Guidance
from trimtab.guidance.branch import Predictions
from trimtab.guidance.noise import noise_algebra, split_variance
from trimtab.guidance.run import Step


def fixed(like: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """The same standard normal tensor `[1, ...]` in every run, repeated for each image."""
    noise = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))
    return noise.to(like).expand_as(like)


@dataclass
class KnownDelta(Guidance):
    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        assert step.own is not None
        return 0.1 * fixed(step.own)


@dataclass
class SampleDelta(Guidance):
    """Known as well, and different for every image."""

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        assert step.sample is not None
        return 0.1 * step.sample


@dataclass
class ShiftedClean(Guidance):
    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return x0 + 0.1 * fixed(x0)


@dataclass
class LinearLoss(Guidance):
    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return (0.1 * fixed(x0) * x0).flatten(1).sum(1)


@dataclass
class LossThroughDenoiser(Guidance):
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    differentiate: ClassVar[str] = "x_t"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return squared(x0)


def squared(x0: torch.Tensor) -> torch.Tensor:
    """A loss `[batch]` that is not linear, so that its gradient depends on where it is taken."""
    return 0.1 * (x0 - fixed(x0)).square().flatten(1).sum(1)


@functools.cache
def built(name: str) -> tuple[Any, Record]:
    """A guidable pipeline that stops after its first step, with the record of what happens underneath."""
    case = CASES[name]
    pipe = case.build()
    record = recorded(pipe, case.denoiser, steps=1)
    return trimtab.guide(pipe), record


def first_step(name: str, **override: Any) -> SchedulerStep:
    pipe, record = built(name)
    record.steps.clear()
    with suppress(Enough):
        run(pipe, CASES[name], **override)
    return record.steps[0]


def first_steps(name: str, guidance: Guidance, **override: Any) -> tuple[SchedulerStep, SchedulerStep, Any]:
    """What the scheduler received first in a stock run and in a guided one, and the pipeline."""
    pipe, _ = built(name)
    plain = first_step(name, **override)
    with pipe.guidance(guidance):
        steered = first_step(name, **override)
    assert_same_start(plain, steered)
    return plain, steered, pipe


def assert_same_start(plain: SchedulerStep, steered: SchedulerStep) -> None:
    """The pipeline's own rows of the first step are the stock run's, bit for bit."""
    assert torch.equal(plain.sample, steered.sample)
    for ours, theirs in zip(steered.forwards, plain.forwards, strict=True):
        assert torch.equal(ours.output[: theirs.rows], theirs.output)


def without_variance(step: SchedulerStep) -> torch.Tensor:
    return split_variance(step.model_output, step.sample)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6, size: float | None = None) -> None:
    """Equal relative to the largest entry, of `expected` or of what it was computed from."""
    largest = expected.abs().max().item() if size is None else size
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


AT_ONCE = [name for name, case in CASES.items() if case.kind != "rows_converted"]
AFFINE = [name for name in AT_ONCE if CASES[name].kind != "norm_rescaled"]


@pytest.mark.parametrize("name", AFFINE)
def test_a_known_delta_arrives_as_itself(name: str) -> None:
    plain, steered, _ = first_steps(name, KnownDelta())
    own, arrived = without_variance(plain), without_variance(steered)
    close(arrived, own + 0.1 * fixed(own))
    variance = split_variance(plain.model_output, plain.sample)[1]
    if variance is not None:
        assert torch.equal(split_variance(steered.model_output, steered.sample)[1], variance)


BATCHES: dict[str, dict[str, Any]] = {
    "sd15": {"prompt": ["a red fox", "two blue boats"], "negative_prompt": ["blurry", "grey"]},
    "dit": {"class_labels": [1, 5]},
    "flux_true_cfg": {"num_images_per_prompt": 2},
    "wan": {"num_videos_per_prompt": 2},
    "instruct_pix2pix": {"num_images_per_prompt": 2},
    "ltx_condition": {"num_videos_per_prompt": 2},
    "z_image": {"num_images_per_prompt": 2},
    "svd": {"num_videos_per_prompt": 2},
    "flux": {"prompt": ["a red fox", "two blue boats"]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_it_does_for_every_image_of_a_batch(name: str) -> None:
    plain, steered, _ = first_steps(name, SampleDelta(), **BATCHES[name])
    own, arrived = without_variance(plain), without_variance(steered)
    close(arrived, own + 0.1 * plain.sample)


def test_a_known_delta_arrives_where_the_pipelines_cfg_is_off() -> None:
    plain, steered, _ = first_steps("sd15", KnownDelta(), guidance_scale=1.0)
    close(steered.model_output, plain.model_output + 0.1 * fixed(plain.model_output))


# -- the pipeline's own rescale stays last -----------------------------------------------------------------------------
def rescaled_by_std(step: SchedulerStep, delta: torch.Tensor) -> torch.Tensor:
    uncond, cond = step.forwards[0].output.chunk(2)
    return rescale_noise_cfg(uncond + 5.0 * (cond - uncond) + delta, cond, guidance_rescale=0.7)


def rescaled_by_norm(step: SchedulerStep, delta: torch.Tensor) -> torch.Tensor:
    cond, uncond = (forward.output for forward in step.forwards)
    total = uncond + 3.0 * (cond - uncond) + delta
    return total * cond.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)


RESCALED: dict[str, tuple[Callable[[SchedulerStep, torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "sd15": (rescaled_by_std, {"guidance_rescale": 0.7}),
    "sdxl": (rescaled_by_std, {"guidance_rescale": 0.7}),
    "ltx": (rescaled_by_std, {"guidance_rescale": 0.7}),
    "qwenimage": (rescaled_by_norm, {}),
}


@pytest.mark.parametrize("kind", [KnownDelta, SampleDelta])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", RESCALED)
def test_a_delta_is_summed_before_the_pipelines_own_rescale(name: str, images: int, kind: type[Guidance]) -> None:
    by_hand, override = RESCALED[name]
    counts = {"num_videos_per_prompt" if name == "ltx" else "num_images_per_prompt": images}
    plain, steered, _ = first_steps(name, kind(), **override, **counts)
    close(by_hand(plain, torch.zeros(())), plain.model_output)
    delta = fixed(plain.sample) if kind is KnownDelta else plain.sample
    close(steered.model_output, by_hand(plain, 0.1 * delta), 2e-6)


@pytest.mark.parametrize("changed", [2.0, 9.0])
def test_it_is_where_a_callback_changes_the_scale_in_the_run(changed: float) -> None:
    case = CASES["sd15"]
    pipe = trimtab.guide(case.build())
    record = recorded(pipe, case.denoiser, steps=2)

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = changed
        return tensors

    pipe.add_guidance(KnownDelta())
    with suppress(Enough):
        run(pipe, case, guidance_rescale=0.7, callback_on_step_end=change)
    uncond, cond = record.steps[1].forwards[0].output.chunk(2)
    total = uncond + changed * (cond - uncond) + 0.1 * fixed(uncond)
    close(record.steps[1].model_output, rescale_noise_cfg(total, cond, guidance_rescale=0.7), 2e-6)


def test_a_rescale_that_the_pipeline_turns_off_changes_nothing() -> None:
    plain, steered, _ = first_steps("sd15", KnownDelta(), guidance_scale=1.0, guidance_rescale=0.7)
    close(steered.model_output, plain.model_output + 0.1 * fixed(plain.model_output))


# -- clean estimates ---------------------------------------------------------------------------------------------------
def clean(step: SchedulerStep) -> torch.Tensor:
    algebra = noise_algebra(step.scheduler)
    level = algebra.level(torch.as_tensor(step.timestep).flatten()[0], index=0)
    return algebra.x0(step.model_output, step.sample, level)


@pytest.mark.parametrize("name", AT_ONCE)
def test_an_edited_clean_estimate_arrives(name: str) -> None:
    plain, steered, _ = first_steps(name, ShiftedClean())
    before, after = clean(plain), clean(steered)
    close(after - before, 0.1 * fixed(before), 1e-5, size=max(1.0, before.abs().max().item()))


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_loss_on_the_clean_estimate_moves_it_against_its_gradient(name: str) -> None:
    plain, steered, _ = first_steps(name, LinearLoss())
    before, after = clean(plain), clean(steered)
    close(after - before, -0.1 * fixed(before), 1e-5, size=max(1.0, before.abs().max().item()))


def doubled(denoiser: Any, given: dict[str, Any], x_t: torch.Tensor) -> torch.Tensor:
    """CFG at 5 over `[uncond; cond]` in one call, further channels of the input as they were."""
    whole = given["sample"]
    scaled = x_t * (whole[:1, :4] / x_t).median().detach()  # what scale_model_input did
    sample = torch.cat([torch.cat([scaled, scaled]), whole[:, 4:]], dim=1)
    uncond, cond = denoiser(**{**given, "sample": sample}, return_dict=False)[0].chunk(2)
    return uncond + 5.0 * (cond - uncond)


def dit(denoiser: Any, given: dict[str, Any], x_t: torch.Tensor) -> torch.Tensor:
    """CFG at 4 over `[cond; uncond]`; the variance is dropped."""
    half = x_t[:1]
    rows = denoiser(**{**given, "hidden_states": torch.cat([half, half])}, return_dict=False)[0]
    cond, uncond = rows[:, :4].chunk(2)
    return uncond + 4.0 * (cond - uncond)


def alone(denoiser: Any, given: dict[str, Any], x_t: torch.Tensor) -> torch.Tensor:
    return denoiser(**{**given, "hidden_states": x_t}, return_dict=False)[0]


def two_calls(denoiser: Any, given: tuple[dict[str, Any], ...], x_t: torch.Tensor) -> torch.Tensor:
    cond, uncond = (alone(denoiser, each, x_t) for each in given)
    return uncond + 5.0 * (cond - uncond)


def joined(denoiser: Any, given: dict[str, Any], x_t: torch.Tensor) -> torch.Tensor:
    """The reference image's tokens follow those of the sample, and are cut off again."""
    tokens = x_t.shape[1]
    whole = torch.cat([x_t, given["hidden_states"][:, tokens:]], dim=1)
    return alone(denoiser, given, whole)[:, :tokens]


def listed(denoiser: Any, given: dict[str, Any], x_t: torch.Tensor) -> torch.Tensor:
    """Lists of images, `[cond; uncond]` at g = 5 counted from the conditional row, and the sign flipped."""
    rows = torch.stack(denoiser(**{**given, "x": [*x_t.unsqueeze(2), *x_t.unsqueeze(2)]}, return_dict=False)[0])
    cond, uncond = rows.squeeze(2).chunk(2)
    return -(cond + 5.0 * (cond - uncond))


THROUGH: dict[str, Callable[[Any, Any, torch.Tensor], torch.Tensor]] = {
    "sd15": doubled,
    "sdxl": doubled,
    "sd_inpaint": doubled,
    "dit": dit,
    "flux": alone,
    "flux_kontext": joined,
    "wan": two_calls,
    "z_image": listed,
}


@pytest.mark.parametrize("name", THROUGH)
def test_a_loss_is_differentiated_through_the_denoiser(name: str) -> None:
    case = CASES[name]
    plain, steered, pipe = first_steps(name, LossThroughDenoiser())
    denoiser = getattr(pipe, case.denoiser)
    assert all(weight.grad is None for weight in denoiser.parameters())

    given = [{k: v for k, v in forward.arguments.items() if k != "return_dict"} for forward in plain.forwards]
    x_t = plain.sample.clone().requires_grad_(True)
    prediction = THROUGH[name](denoiser, given[0] if len(given) == 1 else tuple(given), x_t)
    sample = x_t[: len(prediction)]
    algebra = noise_algebra(pipe.scheduler)
    level = algebra.level(torch.as_tensor(plain.timestep).flatten()[0], index=0)
    x0 = algebra.x0(prediction, sample, level)
    close(prediction.detach(), plain.model_output[: len(sample)], 1e-5)
    gradient = torch.autograd.grad(squared(x0).sum(), x_t)[0][: len(sample)]

    moved = clean(steered)[: len(sample)] - clean(plain)[: len(sample)]
    close(moved, -gradient, 1e-4)


LARGER = {**T5, "height": 64, "width": 64}


@pytest.mark.parametrize("normalised", [True, False])
def test_a_pipeline_that_may_rescale_and_flips_the_sign(normalised: bool) -> None:
    """Lumina 2: whether it rescales is seen at the first scheduler step only; both ways are right before that."""
    case = Case("lumina2", lambda: assemble(lumina2), LARGER, "sign_flipped", denoiser="transformer", rows=1, calls=2)
    pipe = case.build()
    record = recorded(pipe, "transformer")
    trimtab.guide(pipe)
    call = {"cfg_normalization": normalised}
    run(pipe, case, **call)
    plain = record.steps.copy()
    record.steps.clear()
    with pipe.guidance(KnownDelta()):
        run(pipe, case, **call)
    cond, uncond = (forward.output for forward in plain[0].forwards)
    total = uncond + 5.0 * (cond - uncond) - 0.1 * fixed(cond)
    if normalised:
        total = total * cond.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)
    close(record.steps[0].model_output, -total, 2e-6)


def stepped(name: str, *guidances: Guidance, **override: Any) -> list[SchedulerStep]:
    pipe = CASES[name].build()
    record = recorded(pipe)
    trimtab.guide(pipe)
    for guidance in guidances:
        pipe.add_guidance(guidance)
    run(pipe, CASES[name], **override)
    return record.steps


@pytest.mark.parametrize(("guidance", "sign"), [(ShiftedClean(), 1.0), (LinearLoss(), -1.0)])
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_where_rows_are_made_clean_estimates_first_an_edit_of_these_arrives(
    guidance: Guidance, sign: float, scale: float
) -> None:
    """Cosmos steps with the combined clean estimates, of which the first frame is given."""
    plain = stepped("cosmos_video2world", guidance_scale=scale)
    steered = stepped("cosmos_video2world", guidance, guidance_scale=scale)
    before, after = plain[1].model_output, steered[1].model_output
    assert torch.equal(after[:, :, :1], before[:, :, :1])
    close(after[:, :, 1:], (before + sign * 0.1 * fixed(before))[:, :, 1:], 1e-5)


def test_an_edit_of_the_sample_that_would_be_lost_is_refused() -> None:
    @dataclass
    class Edit(Guidance):
        def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
            return sample + 1.0

    steered, plain = (stepped("cosmos_video2world", *edits) for edits in ([Edit()], []))
    assert torch.equal(steered[1].model_output, plain[1].model_output)
    close(steered[2].sample[:1], plain[2].sample[:1] + 1.0)
    with pytest.raises(trimtab.UnsupportedPipelineError, match="guidance_scale above 1"):
        stepped("cosmos_video2world", Edit(), guidance_scale=1.0)
