"""`perp_neg` subtracts only the part of a negative prompt that is perpendicular to the prompt."""

from __future__ import annotations

import pytest
import torch
from guided_runs import built, check_everywhere, close, guided, stock, watched
from zoo import CASES

from trimtab.guidance.errors import ConflictError, UnsupportedPipelineError
from trimtab.guidance.plugins.perp_neg import perpendicular


def test_the_perpendicular_part_has_no_share_in_the_other() -> None:
    to, delta = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    part = perpendicular(delta, to)
    assert ((part * to).sum(dim=(1, 2, 3)).abs() < 1e-3).all()
    for image in range(2):
        basis = to[image].flatten() / to[image].norm()
        projector = torch.eye(256) - torch.outer(basis, basis)
        close(part[image].flatten(), projector @ delta[image].flatten(), 1e-5)


def test_to_nothing_everything_is_perpendicular() -> None:
    delta = torch.randn(1, 4, 8, 8)
    assert torch.equal(perpendicular(delta, torch.zeros_like(delta)), delta)


@pytest.mark.parametrize("negative", ["blurry", ("blurry", "two blue boats"), None])
def test_the_model_output_is_its_formula(negative: str | tuple[str, ...] | None) -> None:
    record = watched("sd15", "perp_neg", {"scale": 6.0, "negative_scale": 0.8, "negative_prompt": negative})
    count = len(negative) if isinstance(negative, tuple) else 1
    for step in record.steps:
        own_uncond, cond, empty, *others = step.forwards[0].output
        assert len(others) == (0 if negative is None else count)
        towards, away = cond - empty, torch.zeros_like(cond)
        for other in others or [own_uncond]:
            delta = other - empty
            away += delta - (delta * towards).sum() / (towards * towards).sum() * towards
        close(step.model_output[0], empty + 6.0 * (towards - 0.8 * away), 1e-5)


@pytest.mark.parametrize(("name", "off"), [("sd15", {"guidance_scale": 1.0}), ("flux", {}), ("wan", {})])
def test_without_negatives_it_is_plain_guidance_from_the_empty_prompt(name: str, off: dict[str, float]) -> None:
    perp = guided(name, "perp_neg", {"scale": 3.0, "negative_scale": 0.0}, **off)
    close(perp, guided(name, "cfg", {"scale": 3.0, "negative_prompt": ""}, **off), 1e-5)


def test_a_negative_that_equals_the_prompt_takes_nothing_away() -> None:
    same = guided("sd15", "perp_neg", {"scale": 3.0, "negative_prompt": CASES["sd15"].call["prompt"]})
    close(same, guided("sd15", "perp_neg", {"scale": 3.0, "negative_scale": 0.0}), 1e-4)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux", "flux_true_cfg"])
def test_on_every_kind_of_denoiser_it_acts_alike_however_rows_are_computed(name: str) -> None:
    check_everywhere(name, "perp_neg", {"negative_prompt": "two blue boats"}, {"start": 0.0, "stop": 0.0})


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_every_image_of_a_batch_is_as_it_is_alone(name: str, guidance_scale: float) -> None:
    prompts, side = ["a red fox", "two cats"], 16 if name == "sd15" else 8
    latents = torch.randn(2, 4, side, side)
    call = {"guidance_scale": guidance_scale, "negative_prompt": None}
    perp = {"negative_prompt": "two blue boats"}
    alone = [
        guided(name, "perp_neg", perp, prompt=p, latents=x[None], **call) for p, x in zip(prompts, latents, strict=True)
    ]
    close(guided(name, "perp_neg", perp, prompt=prompts, latents=latents, **call), torch.cat(alone), 1e-5)


def test_scale_zero_is_the_empty_prompt_alone() -> None:
    close(guided("sd15", "perp_neg", {"scale": 0.0}), stock("sd15", prompt="", guidance_scale=1.0), 1e-5)


def test_it_and_cfg_exclude_each_other() -> None:
    pipe = built("sd15")
    with pipe.guidance("cfg"), pytest.raises(ConflictError, match="the slot 'cfg'"):
        pipe.add_guidance("perp_neg")


def test_a_pipeline_without_prompts_is_refused() -> None:
    with pytest.raises(UnsupportedPipelineError, match="takes no prompts"):
        built("dit").add_guidance("perp_neg")
