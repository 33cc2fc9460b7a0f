"""`slg` is Stable Diffusion 3's own skip layer guidance, on any transformer and on the blocks inside a UNet."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from guided_runs import built, check_everywhere, close, guided, watched
from zoo import CASES, run

from trimtab.guidance.errors import ParameterError
from trimtab.pipelines.families import Family
from trimtab.pipelines.skipping import resolve_blocks, skippable

ALWAYS = {"start": 0.0, "stop": 1.0}


@pytest.mark.parametrize("layers", [[1], [1, 2], [3]])
def test_it_equals_that_of_the_sd3_pipeline(layers: list[int]) -> None:
    call = {"skip_guidance_layers": layers, "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.8}
    expected = run(CASES["sd3"].build(), CASES["sd3"], num_inference_steps=4, **call)
    names = tuple(f"blocks.{layer}" for layer in layers)
    ours = guided("sd3", "slg", {"layers": names, "stop": 0.8}, num_inference_steps=4)
    close(ours, expected, 2e-6)
    assert not torch.allclose(ours, guided("sd3", "slg", {"scale": 0.0}, num_inference_steps=4), atol=1e-3)


def test_it_equals_it_bit_for_bit_as_calls_of_its_own() -> None:
    call = {"skip_guidance_layers": [1, 2], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.8}
    expected = run(CASES["sd3"].build(), CASES["sd3"], num_inference_steps=4, **call)
    names = ("blocks.1", "blocks.2")
    assert torch.equal(
        guided("sd3", "slg", {"layers": names, "stop": 0.8}, "sequential", num_inference_steps=4), expected
    )


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd35", "flux", "wan", "qwenimage"])
def test_on_every_kind_of_denoiser_it_acts_and_costs_nothing_at_scale_zero(name: str) -> None:
    check_everywhere(name, "slg", ALWAYS, {"scale": 0.0})


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_model_output_is_its_formula(name: str) -> None:
    record = watched(name, "slg", {"scale": 2.0, **ALWAYS})
    for step in record.steps:
        *own, skipped = step.forwards[0].output.split(1)
        usual = own[0] if name == "flux" else own[0] + 5.0 * (own[1] - own[0])
        close(step.model_output, usual + 2.0 * (own[-1] - skipped), 1e-6)


def test_by_default_it_acts_early_and_not_in_the_first_step() -> None:
    record = watched("sd3", "slg", {}, num_inference_steps=10)
    assert [sum(forward.rows for forward in step.forwards) for step in record.steps] == [2, 3, *[2] * 8]


@pytest.mark.parametrize(("count", "chosen"), [(24, [7, 8, 9]), (38, [11, 12, 13, 14, 15])])
def test_auto_is_blocks_seven_to_nine_of_twenty_four(count: int, chosen: list[int]) -> None:
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=count, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
            joint_attention_dim=8, pooled_projection_dim=8,
        )  # fmt: skip
    assert resolve_blocks(Family(model), "auto", "slg") == tuple(f"transformer_blocks.{index}" for index in chosen)


def test_on_flux_it_leaves_the_single_blocks_alone() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=8, num_single_layers=8, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=8,
            pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    assert resolve_blocks(Family(model), "auto", "slg") == ("transformer_blocks.2",)
    assert len(skippable(Family(model))) == 16
    assert resolve_blocks(Family(model), "single_transformer_blocks.(1|3)", "slg") == (
        "single_transformer_blocks.1", "single_transformer_blocks.3",
    )  # fmt: skip


def test_a_denoiser_without_such_blocks_is_refused() -> None:
    with pytest.raises(ParameterError, match="UNet2DModel has no block that returns what it takes"):
        built("ddpm").add_guidance("slg")


def test_blocks_that_match_nothing_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"slg: layers='blocks.40' matches no block of SD3Transformer2DModel"):
        built("sd3").add_guidance("slg", layers="blocks.40")
