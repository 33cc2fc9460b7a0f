"""A further prompt is encoded as the pipeline encodes its own, by whatever method its call uses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from fingerprint import of_pipeline
from zoo import CASES, picture, run
from zoo.prompts import PROMPT_CASES

import trimtab
from trimtab.guidance.base import Guidance
from trimtab.guidance.branch import COND, UNCOND, Branch, Predictions, Prompt
from trimtab.guidance.errors import UnsupportedPipelineError
from trimtab.guidance.parameters import parameter
from trimtab.guidance.run import Step

OWN: dict[str, dict[str, Any]] = {"instruct_pix2pix": {"image": picture()}}
NONE = [name for name, case in PROMPT_CASES.items() if "negative_prompt" not in case.call]


@functools.cache
def built(name: str) -> Any:
    """One guidable pipeline of a kind; nothing is left attached to it between tests."""
    return trimtab.guide(PROMPT_CASES[name].build())


def called(name: str, **call: Any) -> torch.Tensor:
    return run(built(name), PROMPT_CASES[name], **OWN.get(name, {}), **call)


@dataclass
class Asked(Guidance):
    """Asks for further prompts, and for nothing to be changed."""

    name: ClassVar[str] = "test.asked"

    texts: tuple[str, ...] = parameter((), "Further prompts.")

    @property
    def further(self) -> list[Branch]:
        return [Branch(Prompt(text)) for text in self.texts]

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND, *self.further)

    def delta(self, step: Step, predictions: Predictions) -> None:
        SEEN.append([float((predictions[UNCOND] - predictions[one]).abs().max()) for one in self.further])


SEEN: list[list[float]] = []
"""How far each further prompt's prediction is from the pipeline's own unconditional one, at each step."""


def differences(name: str, *texts: str, rows: str = "auto", **call: Any) -> list[list[float]]:
    pipe = built(name)
    pipe.guidance_rows = rows
    SEEN.clear()
    try:
        with pipe.guidance(Asked(texts=texts)):
            called(name, **call)
    finally:
        pipe.guidance_rows = "auto"
    assert SEEN
    return list(SEEN)


@pytest.mark.parametrize("rows", ["auto", "sequential"])
@pytest.mark.parametrize("name", [name for name in PROMPT_CASES if name != "shap_e"])
def test_the_prompt_that_the_pipeline_avoids_gives_its_own_unconditional_prediction(name: str, rows: str) -> None:
    negative = "" if name in NONE else "blurry"
    for same, other in differences(name, negative, "two blue boats", rows=rows):
        assert same < 1e-5
        assert other > 1e-3


@pytest.mark.parametrize("name", [name for name in PROMPT_CASES if name != "instruct_pix2pix"])
def test_cfg_in_place_of_none_is_the_pipelines_own(name: str) -> None:
    own = called(name, guidance_scale=3.0)
    plain = called(name, guidance_scale=1.0)
    assert not torch.allclose(own, plain, atol=1e-3 * float(own.abs().max()))
    with built(name).guidance("cfg", scale=3.0):
        guided = called(name, guidance_scale=1.0)
    torch.testing.assert_close(guided, own, rtol=0, atol=1e-4 * float(own.abs().max()))


def test_a_prompt_of_its_own_is_given_to_a_pipeline_that_knows_no_negative_one() -> None:
    """Shap-E's unconditional rows are zeros; a further prompt is encoded as the prompt is."""
    same, other = zip(*differences("shap_e", "a red fox in the snow", "two blue boats"), strict=True)
    assert min(*same, *other) > 1e-3


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("audio_ldm", {"num_waveforms_per_prompt": 2}),
        ("kandinsky_prior", {"num_images_per_prompt": 2}),
        ("semantic", {"num_images_per_prompt": 2}),
        ("ldm", {}),
    ],
)
def test_each_of_several_prompts_has_its_own_rows(name: str, call: dict[str, Any]) -> None:
    negative = {} if name in NONE else {"negative_prompt": ["blurry", "blurry"]}
    prompts = {"prompt": ["a red fox", "two blue boats"], **negative, **call}
    for (same,) in differences(name, "" if name in NONE else "blurry", **prompts):
        assert same < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["kandinsky", "ldm", "semantic", "instruct_pix2pix"])
def test_sag_acts_beside_the_pipelines_own_prediction(name: str, guidance_scale: float) -> None:
    plain = called(name, guidance_scale=guidance_scale)
    with built(name).guidance("sag", scale=3.0):
        guided = called(name, guidance_scale=guidance_scale)
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, plain, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", PROMPT_CASES)
def test_afterwards_every_object_is_as_a_stock_run_leaves_it(name: str) -> None:
    pipe, call = trimtab.guide(PROMPT_CASES[name].build()), OWN.get(name, {})
    expected = run(pipe, PROMPT_CASES[name], **call)
    stock = of_pipeline(pipe)
    with pipe.guidance(Asked(texts=("blurry",))):
        run(pipe, PROMPT_CASES[name], **call)
    assert torch.equal(run(pipe, PROMPT_CASES[name], **call), expected)
    assert of_pipeline(pipe) == stock


def test_what_the_call_was_given_as_negative_beside_its_prompts_is_its_unconditional_side() -> None:
    """Kandinsky 2.2's decoder takes embeddings of images and no prompt."""
    pipe = trimtab.guide(CASES["kandinsky_combined"].build().decoder_pipe)
    embeds = {name: PROMPT_CASES["kandinsky"].call[name] for name in ("image_embeds", "negative_image_embeds")}
    call = {**embeds, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}

    def sampled(guidance_scale: float) -> torch.Tensor:
        images: torch.Tensor = pipe(**call, guidance_scale=guidance_scale, generator=torch.manual_seed(0)).images
        return images

    own = sampled(3.0)
    with pipe.guidance("cfg", scale=3.0):
        torch.testing.assert_close(sampled(1.0), own, rtol=0, atol=1e-5 * float(own.abs().max()))
    with pytest.raises(UnsupportedPipelineError, match="which takes no prompts"):
        pipe.add_guidance("cfg", negative_prompt="blurry")


def test_a_combined_pipeline_is_guided_by_another_prompt_stage_by_stage() -> None:
    pipe = trimtab.guide(CASES["kandinsky_combined"].build())
    with pytest.raises(UnsupportedPipelineError, match="guide these by themselves"):
        pipe.add_guidance("cfg", negative_prompt="blurry")
