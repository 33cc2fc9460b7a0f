"""Which layers a specification stands for, on the architectures that people use (meta device, no weights)."""

from __future__ import annotations

import diffusers
import pytest
import torch

from trimtab.guidance.errors import ParameterError
from trimtab.pipelines.families import Family
from trimtab.pipelines.fashion.train import build_unet


def on_meta(name: str, **config: object) -> Family:
    with torch.device("meta"):
        return Family(getattr(diffusers, name)(**config))


@pytest.fixture(scope="module")
def sd15() -> Family:
    return on_meta("UNet2DConditionModel", cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def sdxl() -> Family:
    return on_meta(
        "UNet2DConditionModel",
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
    )


def test_self_attentions_are_those_of_the_published_models(sd15: Family, sdxl: Family) -> None:
    """6, 1 and 9 in the down, middle and up blocks of SD1.5; 24, 10 and 36 of SDXL."""
    for family, counts in ((sd15, (6, 1, 9)), (sdxl, (24, 10, 36))):
        groups = [[n for n in family.attentions if n.startswith(g)] for g in ("down_blocks", "mid_block", "up_blocks")]
        assert tuple(map(len, groups)) == counts
        assert list(family.attentions) == [name for group in groups for name in group]  # in call order


def test_auto_is_the_middle_block_of_a_unet_with_a_prompt(sd15: Family, sdxl: Family) -> None:
    assert sd15.auto == sd15.resolve("mid", "pag") and len(sd15.auto) == 1
    assert sdxl.auto == sdxl.resolve("mid", "pag") and len(sdxl.auto) == 10


def test_auto_is_the_lowest_resolution_of_a_unet_without_prompt() -> None:
    family = Family(build_unet())
    assert {name.split(".attentions")[0] for name in family.auto} == {"down_blocks.2", "mid_block", "up_blocks.0"}


@pytest.mark.parametrize(
    ("name", "config", "auto", "kind"),
    [
        ("SD3Transformer2DModel", {"num_layers": 24}, "transformer_blocks.13.attn", "mmdit"),
        ("PixArtTransformer2DModel", {}, "transformer_blocks.15.attn1", "dit"),
        ("DiTTransformer2DModel", {}, "transformer_blocks.15.attn1", "dit"),
        ("FluxTransformer2DModel", {}, "single_transformer_blocks.12.attn", "mmdit"),
        ("QwenImageTransformer2DModel", {"num_layers": 60}, "transformer_blocks.32.attn", "mmdit"),
        ("WanTransformer3DModel", {"num_layers": 40}, "blocks.22.attn1", "dit"),
    ],
)
def test_auto_is_the_block_past_the_middle_of_a_transformer(
    name: str, config: dict[str, int], auto: str, kind: str
) -> None:
    family = on_meta(name, **config)
    assert family.auto == (auto,) and family.name == kind


def test_official_names_count_self_attentions(sd15: Family) -> None:
    assert sd15.resolve("m0", "pag") == sd15.auto
    assert sd15.resolve("u2", "pag") == ("up_blocks.1.attentions.2.transformer_blocks.0.attn1",)
    assert sd15.resolve(("d0", "u8"), "pag") == (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1",
    )


def test_a_block_number_is_matched_whole() -> None:
    family = on_meta("SD3Transformer2DModel", num_layers=24)
    assert family.resolve("blocks.1", "pag") == ("transformer_blocks.1.attn",)
    assert family.resolve("blocks.(1|13)", "pag") == ("transformer_blocks.1.attn", "transformer_blocks.13.attn")
    assert len(family.resolve("transformer_blocks.1[0-9]", "pag")) == 10
    assert family.resolve("transformer_blocks.5.attn", "pag") == ("transformer_blocks.5.attn",)


@pytest.mark.parametrize("spec", ["blocks.24", "mid", "nowhere", "blocks.("])
def test_what_matches_nothing_is_refused_with_what_there_is(spec: str) -> None:
    family = on_meta("SD3Transformer2DModel", num_layers=24)
    with pytest.raises(
        ParameterError, match=r"pag: layers=.* matches no self-attention of SD3Transformer2DModel.*blocks"
    ):
        family.resolve(spec, "pag")
