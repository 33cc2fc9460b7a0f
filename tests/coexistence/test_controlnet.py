"""Several ControlNets and guess mode: extra rows are controlled as the conditional row is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline
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


@pytest.mark.parametrize(
    ("plugin", "parameters", "scale"),
    [("cfg", {"scale": 7.0}, 1.0), ("cfg", {"scale": 7.0, "negative_prompt": "blurry"}, 5.0)],
)
@pytest.mark.parametrize(("build", "call"), [(CASE.build, {}), (CASE.build, GUESS), (several, SEVERAL)])
def test_a_branch_for_which_there_is_no_control_is_refused_before_the_first_call(
    build: Any, call: dict[str, Any], plugin: str, parameters: dict[str, Any], scale: float
) -> None:
    """Its residuals would be those of another prompt."""
    pipe = build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance(plugin, **parameters)
    with pytest.raises(trimtab.UnsupportedPipelineError, match=r"its ControlNet .* guidance scale above 1"):
        run(pipe, CASE, **call, guidance_scale=scale)
    assert not record.forwards
