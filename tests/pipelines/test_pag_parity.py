"""`pag` is Diffusers' perturbed-attention guidance where that is right, and right where that is wrong."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0
from recorder import recorded
from torch.nn import functional as F
from zoo import CASES, pag_twin, run

import trimtab
from trimtab.guidance.base import Guidance, Run, Step
from trimtab.guidance.branch import COND, AttentionTokens, Branch, Predictions
from trimtab.guidance.plugins.pag import IdentityAttention
from trimtab.pipelines.families import Family

LAYERS = {"sd15": "mid", "sdxl": "mid", "pixart": "blocks.1", "sd3": "blocks.2"}


@functools.cache
def built(name: str) -> Any:
    """One guidable pipeline of a kind; nothing is left attached to it between tests."""
    return trimtab.guide(CASES[name].build())


def theirs(name: str, **call: Any) -> torch.Tensor:
    return run(pag_twin(CASES[name].build()), CASES[name], **call)


def ours(name: str, rows: str = "auto", pag: dict[str, Any] | None = None, **call: Any) -> torch.Tensor:
    pipe = built(name)
    pipe.guidance_rows = rows
    with pipe.guidance("pag", **{"layers": LAYERS.get(name, "auto"), **(pag or {})}):
        return run(pipe, CASES[name], **call)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# -- parity ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_it_equals_the_pag_pipeline_of_diffusers(name: str, guidance_scale: float) -> None:
    expected = theirs(name, pag_scale=3.0, guidance_scale=guidance_scale)
    actual = ours(name, guidance_scale=guidance_scale)
    assert not torch.allclose(actual, run(built(name), CASES[name], guidance_scale=guidance_scale), atol=1e-3)
    close(actual, expected, 1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_cfg_it_does_bit_for_bit(name: str) -> None:
    assert torch.equal(ours(name), theirs(name, pag_scale=3.0))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_without_cfg_it_does_bit_for_bit_where_rows_join_from_the_start(name: str) -> None:
    # The shared prefix computes one row where Diffusers computes two equal ones, which moves the last bit.
    call = {"guidance_scale": 1.0}
    assert torch.equal(ours(name, "batched", **call), theirs(name, pag_scale=3.0, **call))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_it_does_with_the_pipelines_own_rescale(name: str) -> None:
    close(ours(name, guidance_rescale=0.7), theirs(name, pag_scale=3.0, guidance_rescale=0.7), 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_it_does_with_an_adaptive_scale(name: str) -> None:
    expected = theirs(name, pag_scale=3.0, pag_adaptive_scale=0.005)
    assert not torch.allclose(expected, theirs(name, pag_scale=3.0), atol=1e-3)
    close(ours(name, pag={"scale": 3.0, "adaptive_scale": 0.005}), expected, 1e-6)


def test_several_layers_are_perturbed_alike() -> None:
    pipe = CASES["sd15"].build()
    expected = run(pag_twin(pipe, ["down.block_1", "mid"]), CASES["sd15"], pag_scale=3.0)
    close(ours("sd15", pag={"layers": ["down_blocks.1", "mid"]}), expected, 1e-6)


# -- qk-norm -----------------------------------------------------------------------------------------------------------
def test_with_qk_norm_the_unperturbed_rows_are_the_stock_processors() -> None:
    case = CASES["sd35"]
    stock = case.build()
    plain = recorded(stock, "transformer")
    run(stock, case)
    pipe = case.build()
    steered = recorded(pipe, "transformer")
    trimtab.guide(pipe).add_guidance("pag", layers="blocks.2")
    run(pipe, case)
    assert torch.equal(steered.forwards[0].output[:2], plain.forwards[0].output)
    assert steered.forwards[0].rows == 3


def test_with_qk_norm_those_of_diffusers_are_not() -> None:
    attention = built("sd35").transformer.transformer_blocks[2].attn
    image, text = torch.randn(3, 16, 32), torch.randn(3, 6, 32)
    stock, _ = attention(image, text)
    processor = attention.processor
    attention.set_processor(PAGCFGJointAttnProcessor2_0())
    try:
        forked, _ = attention(image, text)
    finally:
        attention.set_processor(processor)
    assert (forked[:2] - stock[:2]).abs().max() > 1e-3


# -- defects of the guiders --------------------------------------------------------------------------------------------
def test_it_acts_with_cfg_off_on_the_conditional_prediction() -> None:
    case = CASES["sd15"]
    pipe = case.build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("pag", scale=3.0, layers="mid")
    run(pipe, case, guidance_scale=1.0)
    cond, perturbed = record.forwards[0].output
    assert not torch.allclose(cond, perturbed, atol=1e-4)
    close(record.steps[0].model_output[0], cond + 3.0 * (cond - perturbed), 1e-6)
    text = record.forwards[0].arguments["encoder_hidden_states"]
    assert torch.equal(text[0], text[1])


@dataclass
class FailsInPerturbedPass(Guidance):
    @dataclass(frozen=True)
    class Broken(IdentityAttention):
        def attention(self, *args: Any) -> torch.Tensor:
            raise RuntimeError("broken on purpose")

    def setup(self, run: Run) -> None:
        run.state.branch = Branch("cond", self.Broken(run.attention_layers("mid")))

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return (step.state.branch,)


@pytest.mark.parametrize("rows", trimtab.pipelines.guided.ROWS)
def test_an_exception_in_a_perturbed_pass_leaves_nothing(rows: str) -> None:
    case = CASES["sd15"]
    pipe = trimtab.guide(case.build())
    pipe.guidance_rows = rows
    before = run(pipe, case)
    attributes = {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()}
    with pytest.raises(RuntimeError, match="broken on purpose"), pipe.guidance(FailsInPerturbedPass()):
        run(pipe, case)
    assert torch.equal(run(pipe, case), before)
    for name, module in pipe.unet.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("spec", ["blocks.1", "transformer_blocks.1"])
def test_a_block_number_does_not_hit_those_that_begin_with_it(spec: str) -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_layers=12, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, caption_channels=8
        )
    assert Family(model).resolve(spec, "pag") == ("transformer_blocks.1.attn1",)


def dense_identity(query: Any, key: Any, value: Any, tokens: AttentionTokens, scale: float | None, mask: Any) -> Any:
    """The perturbed attention by its definition: row by row, a softmax over the keys that the row may see."""
    length = query.shape[-2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    image = torch.arange(tokens.start, tokens.stop)
    allowed[tokens.start : tokens.stop, tokens.start : tokens.stop] = False
    allowed[image, image] = True
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits + mask
    return logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ value


@pytest.mark.parametrize("tokens", [AttentionTokens(0, 9), AttentionTokens(5, 14), AttentionTokens(0, 14)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_image_tokens_see_themselves_and_the_text_and_text_tokens_everything(
    tokens: AttentionTokens, scale: float | None, masked: bool
) -> None:
    query, key, value = torch.randn(3, 2, 4, 14, 8)
    mask = torch.zeros(2, 1, 1, 14) if masked else None
    if mask is not None and tokens.stop - tokens.start < 14:
        padding = 1 if tokens.start else 13  # a text token that is padding
        mask[1, ..., padding] = -1e9
    perturbation = IdentityAttention(())
    expected = dense_identity(query, key, value, tokens, scale, mask)
    torch.testing.assert_close(perturbation.attention(query, key, value, tokens, mask, scale), expected)
    if mask is not None:
        kept = mask > -1
        torch.testing.assert_close(perturbation.attention(query, key, value, tokens, kept, scale), expected)
    plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    text = [index for index in range(14) if not tokens.start <= index < tokens.stop]
    torch.testing.assert_close(expected[..., text, :], plain[..., text, :])


# -- which tokens are image, seen at the real processors ---------------------------------------------------------------
@dataclass(frozen=True)
class Spy(IdentityAttention):
    """Remembers the queries and tokens that it is given."""

    seen: ClassVar[list[tuple[torch.Tensor, ...]]] = []

    def attention(self, query: Any, key: Any, value: Any, tokens: Any, mask: Any, scale: Any) -> torch.Tensor:
        result = super().attention(query, key, value, tokens, mask, scale)
        self.seen.append((query, key, value, result, tokens))
        return result


@dataclass
class Spying(Guidance):
    layers: str = trimtab.parameter("auto", "Perturbed layers.")

    def setup(self, run: Run) -> None:
        run.state.branch = Branch("cond", Spy(run.attention_layers(self.layers)))

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return (COND, step.state.branch)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        return predictions[COND] - predictions[step.state.branch]


IMAGE_TOKENS = {
    # case and layer: tokens of the image, and of the text before it
    ("flux", "transformer_blocks.1"): (16, 24),
    ("flux", "single_transformer_blocks.0"): (16, 24),
    ("flux_true_cfg", "single_transformer_blocks.1"): (16, 24),
    ("sd3", "transformer_blocks.2"): (16, 0),
    ("sd35", "transformer_blocks.2"): (16, 0),
    ("qwenimage", "transformer_blocks.1"): (16, None),
    ("sd15", "mid"): (16, 0),
}
