"""An IP-Adapter, loaded as from a file: every branch sees its image as its condition's rows do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from configured import close
from fingerprint import of_pipeline
from recorder import recorded
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo import CASES, picture, run

import trimtab

CASE = CASES["sd15"]
IMAGE = 8
"""Channels of an image embedding."""


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """Stable Diffusion with a tiny adapter of four image tokens, its weights drawn large enough to matter."""
    pipe: Any = CASE.build()
    draw = torch.Generator().manual_seed(1)
    width, tokens = pipe.unet.config.cross_attention_dim, 4
    weights = {
        "image_proj.proj.weight": torch.randn(tokens * width, IMAGE, generator=draw),
        "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    crossing = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for index, name in enumerate(crossing):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for side in ("k", "v"):
            matrix = torch.randn(attention.inner_dim, width, generator=draw) / width**0.5
            weights[f"ip_adapter.{2 * index + 1}.to_{side}_ip.weight"] = matrix
    save_file(weights, tmp_path / "adapter.safetensors")
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    return pipe


def vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=IMAGE, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(config).eval()


def seen(scale_of_cfg: float = 5.0) -> dict[str, Any]:
    """The call's arguments: the embeddings of no image, where there is an unconditional row, and of an image."""
    image = torch.randn(1, 1, IMAGE, generator=torch.Generator().manual_seed(2))
    rows = [torch.zeros_like(image), image] if scale_of_cfg > 1 else [image]
    return {"guidance_scale": scale_of_cfg, "ip_adapter_image_embeds": [torch.cat(rows)]}


@pytest.mark.parametrize("plugin", ["pag", "seg"])
def test_perturbed_branches_see_the_image(pipe: Any, plugin: str) -> None:
    """However rows are computed, at any strength of the adapter; at scale 0, and afterwards, it is stock."""
    trimtab.guide(pipe)
    changes = []
    for strength in (1.0, 0.3):
        pipe.set_ip_adapter_scale(strength)
        stock = run(pipe, CASE, **seen())
        frame = of_pipeline(pipe, values=False)
        results = []
        for pipe.guidance_rows in ("auto", "batched", "sequential"):
            with pipe.guidance(plugin, scale=2.0):
                results.append(run(pipe, CASE, **seen()))
        del pipe.guidance_rows
        for result in results[1:]:
            close(result, results[0], 1e-5)
        with pipe.guidance(plugin, scale=0.0):
            assert torch.equal(run(pipe, CASE, **seen()), stock)
        assert of_pipeline(pipe, values=False) == frame
        changes.append(results[0] - stock)
    assert all(change.abs().max() > 1e-3 for change in changes)
    assert not torch.allclose(*changes, atol=1e-3)


def test_cfg_is_the_pipelines_own_guidance_at_that_scale(pipe: Any) -> None:
    expected = run(pipe, CASE, **seen(7.0))
    with trimtab.guide(pipe).guidance("cfg", scale=7.0):
        close(run(pipe, CASE, **seen()), expected, 1e-5)
        pipe.set_ip_adapter_scale(0.0)
        assert not torch.allclose(run(pipe, CASE, **seen()), expected, atol=1e-3)


@pytest.mark.parametrize("rows", ["auto", "sequential"])
def test_a_further_prompt_sees_the_embedding_of_no_image(pipe: Any, rows: str) -> None:
    """As the pipeline's own negative prompt does."""
    expected = run(pipe, CASE, **seen(7.0), negative_prompt="blurry")
    trimtab.guide(pipe).guidance_rows = rows
    with pipe.guidance("cfg", scale=7.0, negative_prompt="blurry"):
        close(run(pipe, CASE, **seen(5.0)), expected, 1e-5)


@pytest.mark.parametrize("own", [1.0, 5.0])
def test_the_embedding_of_no_image_is_made_where_the_pipeline_needs_none(pipe: Any, own: float) -> None:
    """From `ip_adapter_image`, by the pipeline's own image encoder."""
    pipe.register_modules(image_encoder=vision(), feature_extractor=CLIPImageProcessor(size=16, crop_size=16))
    call = {"ip_adapter_image": picture(), "negative_prompt": "blurry"}
    expected = run(pipe, CASE, guidance_scale=7.0, **call)
    trimtab.guide(pipe)
    frame = of_pipeline(pipe, values=False)
    with pipe.guidance("cfg", scale=7.0):
        close(run(pipe, CASE, guidance_scale=own, **call), expected, 1e-5)
    assert of_pipeline(pipe, values=False) == frame


def test_a_branch_that_would_see_the_image_is_refused_by_plan_and_run_before_the_first_call(pipe: Any) -> None:
    """An embedding was given, and none of no image beside it."""
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("cfg", scale=7.0)
    refusal = r"its IP-Adapter .* guidance scale above 1"
    with pytest.raises(trimtab.UnsupportedPipelineError, match=refusal) as planned:
        pipe.explain_guidance(**{**CASE.call, **seen(1.0)})
    with pytest.raises(trimtab.UnsupportedPipelineError, match=refusal) as refused:
        run(pipe, CASE, **seen(1.0))
    assert str(planned.value) == str(refused.value)
    assert not record.forwards
