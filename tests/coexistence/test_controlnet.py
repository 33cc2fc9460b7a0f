"""Several ControlNets and guess mode: extra rows are controlled as the pipeline controls its own rows of their kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from configured import close
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from fingerprint import of_pipeline
from recorder import recorded
from zoo import CASES, picture, run

import trimtab

CASE = CASES["controlnet"]


def several() -> Any:
    first, second = CASE.build(), CASE.build()
    parts = {**first.components, "controlnet": MultiControlNetModel([first.controlnet, second.controlnet])}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SEVERAL = {"image": [picture(), picture()], "controlnet_conditioning_scale": [0.7, 0.4]}
GUESS = {"guess_mode": True}


@pytest.mark.parametrize(("build", "call"), [(several, SEVERAL), (CASE.build, GUESS), (several, SEVERAL | GUESS)])
def test_controls_reach_every_branch(build: Any, call: dict[str, Any]) -> None:
    """PAG alike in whatever calls its rows are; and `cfg` is the pipeline's own guidance at that scale, to rounding."""
    pipe = build()
    stock, stronger = run(pipe, CASE, **call), run(pipe, CASE, guidance_scale=7.0, **call)
    trimtab.guide(pipe)
    frame = of_pipeline(pipe, values=False)
    results = []
    for pipe.guidance_rows in ("auto", "batched", "sequential"):
        with pipe.guidance("pag", scale=2.0):
            results.append(run(pipe, CASE, **call))
    del pipe.guidance_rows
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5 * float(stock.abs().max()))
    assert not torch.allclose(results[0], stock, atol=1e-3)
    with pipe.guidance("cfg", scale=7.0):
        result = run(pipe, CASE, **call)
    torch.testing.assert_close(result, stronger, rtol=0, atol=1e-5 * float(stronger.abs().max()))
    assert of_pipeline(pipe, values=False) == frame
    assert torch.equal(run(pipe, CASE, **call), stock)


@pytest.mark.parametrize("rows", ["auto", "sequential"])
@pytest.mark.parametrize("own", [1.0, 5.0])
@pytest.mark.parametrize(("build", "call"), [(CASE.build, {}), (CASE.build, GUESS), (several, SEVERAL)])
def test_a_further_prompt_is_controlled_as_the_pipelines_negative_one(
    build: Any, call: dict[str, Any], own: float, rows: str
) -> None:
    """The ControlNet runs once more, with that prompt; in guess mode the negative prompt has no residuals."""
    pipe = build()
    stock = run(pipe, CASE, guidance_scale=7.0, negative_prompt="blurry", **call)
    prompts: list[int] = []
    pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(len(kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    trimtab.guide(pipe).add_guidance("cfg", scale=7.0, negative_prompt="blurry")
    pipe.guidance_rows = rows
    frame = of_pipeline(pipe, values=False)
    close(run(pipe, CASE, guidance_scale=own, **call), stock, 1e-5)
    asked = 1 if call is GUESS else 2
    assert len(prompts) == asked * CASE.call["num_inference_steps"]
    assert of_pipeline(pipe, values=False) == frame


def test_a_branch_of_that_prompt_is_controlled_alike() -> None:
    """Perp-Neg with a negative prompt of nothing is CFG, whose unconditional prediction is the pipeline's own."""
    pipe = CASE.build()
    stock = run(pipe, CASE, guidance_scale=7.0, negative_prompt="")
    with trimtab.guide(pipe).guidance("perp_neg", scale=7.0, negative_prompt=""):
        close(run(pipe, CASE, guidance_scale=1.0, negative_prompt=""), stock, 1e-5)
    with pipe.guidance("perp_neg", scale=7.0, negative_prompt="blurry"):
        assert not torch.allclose(run(pipe, CASE, guidance_scale=1.0), stock, atol=1e-3)


def flux() -> Any:
    """Flux, whose negative prompt is a call of its own that is given the residuals of the prompt."""
    pipe: Any = CASES["flux_true_cfg"].build()
    control: Any = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=0, num_attention_heads=2, attention_head_dim=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in (*control.controlnet_blocks, control.controlnet_x_embedder):
            layer.reset_parameters()
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_residuals_that_a_pipeline_shares_between_its_prompts_are_shared() -> None:
    case, pipe = CASES["flux_true_cfg"], flux()
    call = {"control_image": picture(), "negative_prompt": "blurry"}
    stock = run(pipe, case, true_cfg_scale=4.0, **call)
    without = run(pipe, case, true_cfg_scale=4.0, controlnet_conditioning_scale=0.0, **call)
    assert not torch.allclose(without, stock, atol=1e-3)
    with trimtab.guide(pipe).guidance("cfg", scale=4.0):
        close(run(pipe, case, true_cfg_scale=1.0, **call), stock, 1e-5)


class Halving(UNet2DConditionModel):
    """Stands for a pipeline that changes the residuals on their way to the denoiser."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["mid_block_additional_residual"] = 0.5 * kwargs["mid_block_additional_residual"]
        return super().__call__(*args, **kwargs)


def test_a_further_prompt_is_refused_where_the_residuals_are_not_found() -> None:
    pipe = CASE.build()
    record = recorded(pipe, "unet")
    pipe.unet.__class__ = Halving
    trimtab.guide(pipe).add_guidance("cfg", scale=7.0)
    with pytest.raises(trimtab.UnsupportedPipelineError, match=r"ControlNet returned is not found .* guidance_scale"):
        run(pipe, CASE, guidance_scale=1.0)
    assert not record.forwards


@dataclass
class Twice(trimtab.Guidance):
    """Evaluates each step twice, and asks for a further prompt at that."""

    def branches(self, step: trimtab.Step) -> Sequence[trimtab.Branch]:
        return (trimtab.Branch(trimtab.Prompt("blurry")),)

    def repeats(self, step: trimtab.Step) -> int:
        return 2


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("build", "call"), [(CASE.build, {}), (several, SEVERAL), (CASE.build, GUESS)])
@pytest.mark.parametrize("guidance", [Twice(), "sag"])
def test_what_is_predicted_at_another_x_t_has_the_residuals_for_that(
    guidance: Any, build: Any, call: dict[str, Any], scale: float
) -> None:
    """And of each row's prompt: the ControlNet, asked for them once more, says the same."""
    pipe = build()
    asked: list[dict[str, Any]] = []
    hook = pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True
    )
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance(guidance, name="another")
    run(pipe, CASE, guidance_scale=scale, **call)
    hook.remove()
    own = 1 if scale == 1.0 else 2
    each = [own, 1] if guidance == "sag" else [own + 1] * 2
    assert [forward.rows for forward in record.forwards] == each * CASE.call["num_inference_steps"]
    prompt = asked[0]["encoder_hidden_states"][-1]
    for forward in record.forwards:
        given = forward.arguments
        text = given["encoder_hidden_states"]
        more = {"encoder_hidden_states": text, "controlnet_cond": of_rows(asked[0]["controlnet_cond"], text)}
        with torch.no_grad():
            down, mid = pipe.controlnet(given["sample"], given["timestep"], **{**asked[0], **more})
        residuals = (*given["down_block_additional_residuals"], given["mid_block_additional_residual"])
        for actual, expected in zip(residuals, (*down, mid), strict=True):
            controlled = torch.tensor([call is not GUESS or torch.equal(row, prompt) for row in text])
            close(actual, expected * controlled[:, None, None, None], 1e-5)


def of_rows(images: Any, like: torch.Tensor) -> Any:
    """Conditioning images, the same for each row."""
    if isinstance(images, list):
        return [of_rows(image, like) for image in images]
    return images[:1].expand(len(like), -1, -1, -1)


def test_another_point_is_refused_where_the_residuals_are_not_found() -> None:
    pipe = CASE.build()
    pipe.unet.__class__ = Halving
    trimtab.guide(pipe).add_guidance("sag")
    with pytest.raises(trimtab.UnsupportedPipelineError, match=r"not found .* at another x_t; leave out what blurs"):
        run(pipe, CASE)
