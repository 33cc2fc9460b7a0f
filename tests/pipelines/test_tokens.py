"""Image tokens are told from others by what a poisoned image taints, in whatever order an architecture joins them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from zoo import CASES, run

import trimtab
from trimtab.guidance.branch import AttentionTokens
from trimtab.guidance.errors import ParameterError, UnsupportedPipelineError
from trimtab.pipelines.families import Family
from trimtab.pipelines.tokens import Apart, Places, locate, may_hold_others


def first_call(name: str) -> tuple[Family, tuple[Any, ...], dict[str, Any]]:
    """The denoiser of a case, and the arguments of its first call."""
    case = CASES[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = denoiser.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    run(pipe, case)
    hook.remove()
    return Family(denoiser), *seen[0]


def places(name: str, layer: str) -> Places:
    family, args, kwargs = first_call(name)
    return locate(Apart(family, [layer]), family.denoiser, args, kwargs)[layer]


@pytest.mark.parametrize(
    ("name", "layer", "image", "length"),
    [
        ("flux", "transformer_blocks.1.attn", 16, 40),  # joined inside the attention, text first
        ("flux", "single_transformer_blocks.0.attn", 16, 40),  # joined before the block, text first
        ("flux_kontext", "single_transformer_blocks.0.attn", 32, 56),  # the reference image's tokens are image tokens
    ],
)
def test_text_first(name: str, layer: str, image: int, length: int) -> None:
    span = AttentionTokens(length - image, length)
    assert places(name, layer) == Places(span, span)


def test_image_first() -> None:
    span = AttentionTokens(0, 16)
    assert places("sd3", "transformer_blocks.2.attn") == Places(span, span)
    assert places("sd35", "transformer_blocks.1.attn2") == Places(span, span)  # image alone
    # Z-Image joins them in the denoiser and pads the image to 32 tokens; those of the padding are none.
    assert places("z_image", "layers.1.attention") == Places(span, span)


def test_further_keys() -> None:
    """The queries are all of image tokens, the keys of text and image."""
    image = AttentionTokens(0, 64)
    cascade = places("cascade_prior", "down_blocks.0.2.attention")
    assert cascade.queries == cascade.keys == image
    both = places("if_", "mid_block.attentions.0")
    assert both.keys is not None and both.keys.start > 0
    assert both.queries == AttentionTokens(0, both.keys.stop - both.keys.start)


@pytest.mark.parametrize("name", ["sd15", "wan", "pixart", "dit", "ddpm"])
def test_it_is_not_asked_where_text_comes_in_by_cross_attention_or_not_at_all(name: str) -> None:
    family, args, kwargs = first_call(name)
    assert not may_hold_others(family, family.auto, args, kwargs)


@pytest.mark.parametrize("name", ["sd15", "wan", "pixart"])
def test_it_would_find_image_tokens_alone_there(name: str) -> None:
    family, args, kwargs = first_call(name)
    for found in locate(Apart(family, family.auto), family.denoiser, args, kwargs).values():
        assert found.keys == found.queries and found.queries.start == 0


class Attention(nn.Module):
    """Attention over all tokens, `softmax` written out or by the common function."""

    def __init__(self, common: bool) -> None:
        super().__init__()
        self.to_q, self.processor, self.common = nn.Linear(4, 4), None, common

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = self.to_q(hidden_states)[:, None]
        if self.common:
            return nn.functional.scaled_dot_product_attention(states, states, states)[:, 0]
        return ((states @ states.mT).softmax(-1) @ states)[:, 0]


class Joining(nn.Module):
    """A denoiser that joins tokens as `order` says."""

    def __init__(self, order: str, *common: bool) -> None:
        super().__init__()
        self.order, self.blocks = order, nn.ModuleList(nn.Sequential(Attention(each)) for each in common)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        parts = {"i": hidden_states, "t": encoder_hidden_states}
        if self.order == "row by row":
            states = torch.cat([torch.cat([hidden_states[0], encoder_hidden_states[0]])[None],
                                torch.cat([encoder_hidden_states[1], hidden_states[1]])[None]])  # fmt: skip
        else:
            states = torch.cat([parts[letter] for letter in self.order], dim=1)
        for block in self.blocks:
            states = states + block(states)
        return states


@pytest.mark.parametrize(
    ("order", "common", "reason"),
    [
        ("iti", [True], "has its image tokens in several places"),
        ("t", [True], "holds no image tokens"),
        ("row by row", [True], "in another place for every prompt of the batch"),
        ("ti", [False, True], "follows a layer whose attention is not scaled_dot_product_attention"),
    ],
)
def test_what_cannot_be_told_is_refused(order: str, common: list[bool], reason: str) -> None:
    denoiser = Joining(order, *common)
    layer = f"blocks.{len(common) - 1}.0"
    with pytest.raises(UnsupportedPipelineError, match=f"Joining: {layer} .*{reason}"):
        locate(Apart(Family(denoiser), [layer]), denoiser, [torch.randn(2, 5, 4), torch.randn(2, 3, 4)], {})


def test_looking_leaves_the_denoiser_as_it_was() -> None:
    denoiser = Joining("ti", True, True)
    given = [torch.randn(2, 5, 4), torch.randn(2, 3, 4)]
    before = denoiser(*given)
    assert locate(Apart(Family(denoiser), ["blocks.0.0"]), denoiser, given, {})[
        "blocks.0.0"
    ].queries == AttentionTokens(3, 8)
    assert torch.equal(denoiser(*given), before)
    assert all("forward" not in vars(module) for module in denoiser.modules())


def test_a_denoiser_without_self_attention_is_refused_when_attached() -> None:
    plain = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = trimtab.guide(diffusers.DDPMPipeline(plain, diffusers.DDPMScheduler()))
    with pytest.raises(ParameterError, match=r"pag: layers='auto': UNet2DModel has no self-attention"):
        pipe.add_guidance("pag")
