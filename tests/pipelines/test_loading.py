"""A guidable pipeline saves, loads, copies, pickles and converts as its stock class does, its guidances with it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from zoo import CASES, run

import trimtab
from trimtab import ParameterError

CASE = CASES["sd15"]


@pytest.fixture
def pipe() -> Any:
    return trimtab.guide(CASE.build())


# -- saving and loading ------------------------------------------------------------------------------------------------
def test_a_saved_pipeline_is_a_stock_one_with_a_recipe_beside_it(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance("pag", scale=2.0, layers=["mid"], stop=0.8)
    guided = run(pipe, CASE)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert [entry["plugin"] for entry in json.loads((tmp_path / "guidance.json").read_text())["guidances"]] == ["pag"]

    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    again = trimtab.GuidedPipeline.from_pretrained(tmp_path)
    assert again.guidances["pag"].parameters == pipe.guidances["pag"].parameters
    torch.testing.assert_close(run(again, CASE), guided, atol=1e-4, rtol=0)  # weights laid out anew round differently
    with pytest.raises(TypeError, match="from_pretrained"):
        trimtab.GuidedPipeline(unet=pipe.unet)


def test_without_guidance_no_recipe_is_written(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "guidance.json").exists()
    assert not trimtab.GuidedPipeline.from_pretrained(tmp_path).guidances


def test_an_older_recipe_does_not_come_back(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance("pag")
    pipe.save_pretrained(tmp_path)
    pipe.clear_guidance()
    pipe.save_pretrained(tmp_path)
    assert not trimtab.GuidedPipeline.from_pretrained(tmp_path).guidances


def test_a_recipe_replaces_what_is_attached_and_a_bad_one_changes_nothing(pipe: Any, tmp_path: Path) -> None:
    pipe.add_guidance("pag", name="mine", scale=2.0, sigma_max=7.0)
    pipe.save_guidance(tmp_path)
    other = trimtab.guide(CASE.build())
    other.add_guidance("cfg")
    other.load_guidance(tmp_path)
    assert list(other.guidances) == ["mine"]
    assert other.guidances["mine"].parameters == pipe.guidances["mine"].parameters

    recipe = json.loads((tmp_path / "guidance.json").read_text())
    recipe["guidances"][0]["parameters"]["layers"] = "nowhere"
    (tmp_path / "guidance.json").write_text(json.dumps(recipe))
    with pytest.raises(ParameterError, match="layers='nowhere'"):
        other.load_guidance(tmp_path)
    assert list(other.guidances) == ["mine"]


# -- conversions -------------------------------------------------------------------------------------------------------
def test_it_passes_through_auto_pipelines_and_from_pipe_in_both_directions(pipe: Any) -> None:
    pipe.add_guidance("pag")
    text = AutoPipelineForText2Image.from_pipe(pipe)
    image = AutoPipelineForImage2Image.from_pipe(pipe)
    direct = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for converted, kind in ((image, StableDiffusionImg2ImgPipeline), (direct, StableDiffusionImg2ImgPipeline)):
        assert type(converted) is kind
        assert converted.unet is pipe.unet and converted.vae is pipe.vae
    assert text.unet is pipe.unet
    direct.set_progress_bar_config(disable=True)
    stock = run(direct, CASES["sd_img2img"])
    guided = run(pipe, CASE)
    assert torch.equal(run(direct, CASES["sd_img2img"]), stock)  # beside the guided one, it stays stock
    assert torch.equal(run(pipe, CASE), guided)
    back = trimtab.guide(AutoPipelineForText2Image.from_pipe(image))
    assert isinstance(back, StableDiffusionPipeline) and back.unet is pipe.unet and not back.guidances
    with back.guidance("pag"):
        back.set_progress_bar_config(disable=True)
        assert torch.equal(run(back, CASE), run(pipe, CASE))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe)), copy.copy])
def test_copies_are_guided_alike_and_independent(pipe: Any, copied: Callable[[Any], Any]) -> None:
    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, CASE)
    twin = copied(pipe)
    assert type(twin) is type(pipe) and list(twin.guidances) == ["pag"]
    assert torch.equal(run(twin, CASE), guided)
    twin.clear_guidance()
    assert list(pipe.guidances) == ["pag"]
    assert torch.equal(run(pipe, CASE), guided)


def test_two_pipelines_may_share_a_denoiser(pipe: Any) -> None:
    other = trimtab.guide(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    other.set_progress_bar_config(disable=True)
    stock = run(pipe, CASE)
    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, CASE)
    assert torch.equal(run(other, CASE), stock)
    other.add_guidance("pag", scale=5.0)
    stronger = run(other, CASE)
    assert not torch.equal(stronger, guided)
    assert torch.equal(run(pipe, CASE), guided)
    assert torch.equal(run(other, CASE), stronger)


def test_a_guidance_runs_under_offload_hooks_set_before_or_after(pipe: Any) -> None:
    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, CASE)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert torch.equal(run(pipe, CASE), guided)
    assert torch.equal(run(pipe, CASE), guided)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(run(pipe, CASE), guided)
