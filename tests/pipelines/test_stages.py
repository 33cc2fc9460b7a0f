"""The stages of a call, and which models of a pipeline are denoisers, where names alone would mislead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ChromaInpaintPipeline
from zoo import picture
from zoo.prompts import controlnet_xs, unclip

import trimtab
from trimtab.conformance.tiny import assemble
from trimtab.pipelines.own_cfg import has_cfg

STEPS = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_pipeline_whose_schedulers_all_have_a_name_is_planned_stage_by_stage(scale: float) -> None:
    """unCLIP: the prior has no attention to perturb; prior and decoder have scales of their own, enlargers none."""
    pipe: Any = trimtab.guide(assemble(unclip))
    call = {"prompt": "a red fox", **STEPS, "output_type": "pt"}
    call |= {"prior_guidance_scale": scale, "decoder_guidance_scale": scale}

    def sampled() -> torch.Tensor:
        return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0)).images)

    stock = sampled()
    pipe.add_guidance("pag", scale=2.0)
    plan = pipe.explain_guidance(**call)
    guided = sampled()
    assert torch.isfinite(guided).all() and not torch.allclose(guided, stock, atol=1e-4)
    assert pipe.last_guided_run.evaluations == plan.evaluations
    pipe.clear_guidance()
    assert torch.equal(sampled(), stock)


@pytest.mark.parametrize("rows", ["auto", "sequential"])
def test_a_unet_that_holds_its_control_is_a_denoiser(rows: str) -> None:
    """ControlNet-XS: its blocks take both streams."""
    pipe: Any = trimtab.guide(assemble(controlnet_xs))
    call = {"prompt": "a red fox", "image": picture(), "num_inference_steps": 3, "output_type": "latent"}

    def sampled() -> torch.Tensor:
        latents: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        return latents

    stock, pipe.guidance_rows = sampled(), rows
    pipe.add_guidance("pag", scale=2.0)
    plan = pipe.explain_guidance(**call)
    guided = sampled()
    assert torch.isfinite(guided).all() and not torch.allclose(guided, stock, atol=1e-3)
    assert pipe.last_guided_run.evaluations == plan.evaluations
    pipe.guidance_rows = "batched"
    torch.testing.assert_close(sampled(), guided, rtol=0, atol=1e-5 * float(stock.abs().max()))
    pipe.clear_guidance()
    assert torch.equal(sampled(), stock)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_scale_that_a_pipeline_takes_and_never_reads_tells_nothing(scale: float) -> None:
    pipe = ChromaInpaintPipeline.__new__(ChromaInpaintPipeline)
    arguments = {"guidance_scale": scale, "true_cfg_scale": 4.0, "negative_prompt": "blurry"}
    assert has_cfg(pipe, arguments) == (scale > 1)
