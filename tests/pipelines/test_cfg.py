"""`cfg` is classifier-free guidance: the pipeline's own where it has it, the same formula where it has none."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from recorder import recorded
from zoo import CASES, run
from zoo.class_conditional import class_conditional

import trimtab


@functools.cache
def built(name: str) -> Any:
    """One guidable pipeline of a kind; nothing is left attached to it between tests."""
    return trimtab.guide(CASES[name].build())


def with_cfg(name: str, cfg: dict[str, Any], **call: Any) -> torch.Tensor:
    with built(name).guidance("cfg", **cfg):
        return run(built(name), CASES[name], **call)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# -- in place of none --------------------------------------------------------------------------------------------------
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # case: the pipeline's own guidance at g = 3, and its being off
    **{
        name: ({"guidance_scale": 3.0}, {"guidance_scale": 1.0})
        for name in ("sd15", "sdxl", "sd3", "sd35", "pixart", "wan", "ltx", "sd_inpaint", "animatediff")
    },
    "flux_true_cfg": ({"true_cfg_scale": 3.0}, {"true_cfg_scale": 1.0}),
    "z_image": ({"guidance_scale": 2.0}, {"guidance_scale": 0.0}),  # counts g - 1
}


@pytest.mark.parametrize("negative_prompt", ["blurry", None])
@pytest.mark.parametrize("name", OWN)
def test_it_equals_the_pipelines_own(name: str, negative_prompt: str | None) -> None:
    on, off = OWN[name]
    # Flux takes no negative prompt for no guidance at all, and PixArt fails on it.
    empty = "" if name in ("flux_true_cfg", "pixart") else None
    negative = {"negative_prompt": empty if negative_prompt is None else negative_prompt}
    own = run(built(name), CASES[name], **on, **negative)
    assert not torch.allclose(own, run(built(name), CASES[name], **off, **negative), atol=1e-3)
    close(with_cfg(name, {"scale": 3.0}, **off, **negative), own)


def embedded(pipe: Any, name: str, **text: str) -> dict[str, torch.Tensor]:
    """A negative prompt by its embeddings, as the call takes them."""
    with torch.no_grad():
        if name == "flux_true_cfg":
            states, pooled, _ = pipe.encode_prompt(text["negative_prompt"], None, max_sequence_length=24)
            return {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
        found = pipe.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **text)
    names = {"sd15": ("", "prompt_embeds"), "sdxl": ("", "prompt_embeds", "", "pooled_prompt_embeds")}[name]
    return {f"negative_{names[i]}": found[i] for i in range(len(names)) if names[i]}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_true_cfg"])
def test_a_negative_prompt_may_be_given_by_its_embeddings_where_the_pipelines_own_guidance_is_off(
    name: str, images: int
) -> None:
    on, off = OWN[name]
    call: dict[str, Any] = {"num_images_per_prompt": images, "negative_prompt": None}
    call |= embedded(built(name), name, negative_prompt="two blue boats")
    if name == "sdxl":  # which wants all four or none
        states, _, pooled, _ = built(name).encode_prompt("a red fox", do_classifier_free_guidance=False)
        call |= {"prompt": None, "prompt_embeds": states, "pooled_prompt_embeds": pooled}
    close(with_cfg(name, {"scale": 3.0}, **off, **call), run(built(name), CASES[name], **on, **call))


def test_the_second_encoder_may_have_a_negative_prompt_of_its_own() -> None:
    on, off = OWN["flux_true_cfg"]
    call = {"negative_prompt": "blurry", "negative_prompt_2": "two blue boats"}
    own = run(built("flux_true_cfg"), CASES["flux_true_cfg"], **on, **call)
    close(with_cfg("flux_true_cfg", {"scale": 3.0}, **off, **call), own)


@pytest.mark.parametrize("rows", ["auto", "sequential"])
def test_another_prompt_arrives_where_the_pipeline_shares_one_embedding_among_the_images(rows: str) -> None:
    """Flux does not repeat embeddings that it is given."""
    pipe, case = built("flux_true_cfg"), CASES["flux_true_cfg"]
    states, pooled, _ = pipe.encode_prompt("a red fox", None, max_sequence_length=24)
    call = {"prompt": None, "prompt_embeds": states, "pooled_prompt_embeds": pooled, "num_images_per_prompt": 2}
    own = run(pipe, case, **call, true_cfg_scale=3.0, negative_prompt=None,
              **embedded(pipe, "flux_true_cfg", negative_prompt="blurry"))  # fmt: skip
    cfg = {"scale": 3.0, "negative_prompt": "blurry"}
    pipe.guidance_rows = rows
    try:
        close(with_cfg("flux_true_cfg", cfg, **call, true_cfg_scale=1.0, negative_prompt=None), own)
    finally:
        pipe.guidance_rows = "auto"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "wan", "flux_true_cfg"])
def test_its_negative_prompt_is_the_pipelines(name: str) -> None:
    on, off = OWN[name]
    own = run(built(name), CASES[name], **on, negative_prompt="two blue boats")
    close(with_cfg(name, {"scale": 3.0, "negative_prompt": "two blue boats"}, **off, negative_prompt="blurry"), own)
    close(with_cfg(name, {"scale": 3.0, "negative_prompt": "two blue boats"}, **on, negative_prompt="blurry"), own)


def test_on_a_dit_it_uses_the_null_class() -> None:
    own = run(built("dit"), CASES["dit"], guidance_scale=3.0)
    close(with_cfg("dit", {"scale": 3.0}, guidance_scale=1.0), own)


def test_with_a_batch_of_prompts_each_has_its_own_negative() -> None:
    prompts = {"prompt": ["a red fox", "two blue boats"], "negative_prompt": ["blurry", "grey"]}
    own = run(built("sd15"), CASES["sd15"], guidance_scale=3.0, **prompts)
    close(with_cfg("sd15", {"scale": 3.0}, guidance_scale=1.0, **prompts), own)
    own = run(built("flux_true_cfg"), CASES["flux_true_cfg"], **prompts)
    close(with_cfg("flux_true_cfg", {"scale": 3.0}, true_cfg_scale=1.0, **prompts), own)


def test_on_qwen_image_it_is_the_plain_formula_without_the_pipelines_norm() -> None:
    case = CASES["qwenimage"]
    for scale in (1.0, 3.0):
        pipe = case.build()
        record = recorded(pipe, "transformer")
        trimtab.guide(pipe).add_guidance("cfg", scale=4.0)
        run(pipe, case, true_cfg_scale=scale)
        cond, uncond = (forward.output for forward in record.steps[0].forwards)
        close(record.steps[0].model_output, uncond + 4.0 * (cond - uncond), 1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_on_a_class_conditional_model_it_is_the_formula(scale: float) -> None:
    pipe = class_conditional(["circle", "square", "cross"])
    start = torch.randn(2, 1, 8, 8)
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(4)
    sample = start
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            cond = unet(sample, timestep, class_labels=torch.tensor([1, 2])).sample
            uncond = unet(sample, timestep, class_labels=torch.tensor([3, 3])).sample
            sample = scheduler.step(uncond + scale * (cond - uncond), timestep, sample).prev_sample
    trimtab.guide(pipe).add_guidance("cfg", scale=scale)
    guided = pipe(["square", 2], num_inference_steps=4, latents=start, output_type="pt").images
    close(guided, sample, 1e-6)


def test_without_a_class_there_is_nothing_to_guide_towards() -> None:
    pipe = class_conditional(["circle", "square", "cross"])
    start = torch.randn(1, 1, 8, 8)
    call = {"num_inference_steps": 2, "latents": start, "output_type": "pt"}
    plain = pipe(None, **call).images
    trimtab.guide(pipe).add_guidance("cfg", scale=3.0)
    close(pipe(None, **call).images, plain, 1e-6)


# -- in place of the pipeline's own ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart", "dit", "wan", "ltx_condition", "controlnet"])
def test_it_replaces_the_pipelines_own(name: str) -> None:
    own = run(built(name), CASES[name], guidance_scale=3.0)
    assert not torch.allclose(own, run(built(name), CASES[name], guidance_scale=7.0), atol=1e-3)
    close(with_cfg(name, {"scale": 3.0}, guidance_scale=7.0), own)


def test_it_replaces_flux_true_cfg() -> None:
    own = run(built("flux_true_cfg"), CASES["flux_true_cfg"], true_cfg_scale=2.0)
    close(with_cfg("flux_true_cfg", {"scale": 2.0}, true_cfg_scale=7.0), own)


def test_it_replaces_the_pipelines_rescale_as_well() -> None:
    own = run(built("sd15"), CASES["sd15"], guidance_scale=3.0)
    close(with_cfg("sd15", {"scale": 3.0}, guidance_scale=7.0, guidance_rescale=0.7), own)


@pytest.mark.parametrize("own", [1.0, 7.0])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_its_rescale_is_the_pipelines_guidance_rescale(name: str, own: float) -> None:
    expected = run(built(name), CASES[name], guidance_scale=3.0, guidance_rescale=0.7)
    assert not torch.allclose(expected, run(built(name), CASES[name], guidance_scale=3.0), atol=1e-3)
    close(with_cfg(name, {"scale": 3.0, "rescale": 0.7}, guidance_scale=own), expected)


def test_the_rescale_comes_after_other_deltas() -> None:
    case = CASES["sd15"]
    pipe = case.build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("cfg", scale=3.0, rescale=0.7)
    pipe.add_guidance("pag", scale=2.0, layers="mid")
    run(pipe, case)
    uncond, cond, perturbed = record.steps[0].forwards[0].output
    total = uncond + 3.0 * (cond - uncond) + 2.0 * (cond - perturbed)
    close(record.steps[0].model_output, rescale_noise_cfg(total[None], cond[None], 0.7), 1e-6)


# -- interval and scale 1 ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("own", [1.0, 7.0])
def test_outside_its_interval_the_pipeline_is_left_alone(own: float) -> None:
    case = CASES["sd15"]
    pipe = case.build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("cfg", scale=3.0, start=0.25, stop=0.75)
    run(pipe, case, num_inference_steps=4, guidance_scale=own)
    for index, step in enumerate(record.steps):
        inside = index in (1, 2)
        (forward,) = step.forwards
        assert forward.rows == (2 if inside or own > 1 else 1)
        if own == 1.0:
            cond, uncond = forward.output[:1], forward.output[-1:]
        else:
            uncond, cond = forward.output.chunk(2)
        close(step.model_output, uncond + (3.0 if inside else own) * (cond - uncond), 1e-6)


def test_scale_one_is_the_conditional_prediction_and_costs_nothing() -> None:
    plain = run(built("sd15"), CASES["sd15"], guidance_scale=1.0)
    assert torch.equal(with_cfg("sd15", {"scale": 1.0}, guidance_scale=1.0), plain)
    assert built("sd15").last_guided_run.evaluations == 3
    close(with_cfg("sd15", {"scale": 1.0}, guidance_scale=7.0), plain)
    assert built("sd15").last_guided_run.evaluations == 6


@pytest.mark.parametrize("rows", ["sequential", "batched"])
def test_the_picture_does_not_depend_on_how_rows_are_computed(rows: str) -> None:
    for name in ("sd15", "pixart", "flux_true_cfg", "dit"):
        off = OWN.get(name, ({}, {"guidance_scale": 1.0}))[1]
        expected = with_cfg(name, {"scale": 3.0}, **off)
        built(name).guidance_rows = rows
        close(with_cfg(name, {"scale": 3.0}, **off), expected)
        built(name).guidance_rows = "auto"
