"""`pag` is Diffusers' perturbed-attention guidance where that is right, and right where that is wrong."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from recorder import recorded
from torch.nn import functional as F
from zoo import CASES, pag_twin, run

import trimtab
from trimtab.guidance.base import Guidance
from trimtab.guidance.branch import AttentionTokens, Branch
from trimtab.guidance.plugins.pag import IdentityAttention
from trimtab.guidance.run import Run, Step
from trimtab.pipelines.budget import ROWS
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
    close(ours(name, guidance_rescale=0.7), theirs(name, pag_scale=3.0, guidance_rescale=0.7), 1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_it_does_with_an_adaptive_scale(name: str) -> None:
    expected = theirs(name, pag_scale=3.0, pag_adaptive_scale=0.005)
    assert not torch.allclose(expected, theirs(name, pag_scale=3.0), atol=1e-3)
    close(ours(name, pag={"scale": 3.0, "adaptive_scale": 0.005}), expected, 1e-6)


def test_an_adaptive_scale_works_on_pixart_where_that_of_diffusers_fails() -> None:
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        theirs("pixart", pag_scale=3.0, pag_adaptive_scale=0.005)
    adaptive = ours("pixart", pag={"adaptive_scale": 0.005})
    assert not torch.allclose(adaptive, ours("pixart"), atol=1e-4)
    close(ours("pixart", pag={"adaptive_scale": 100.0}), run(built("pixart"), CASES["pixart"]), 0.0)


def test_several_layers_are_perturbed_alike() -> None:
    pipe = CASES["sd15"].build()
    expected = run(pag_twin(pipe, ["down_blocks.1", "mid"]), CASES["sd15"], pag_scale=3.0)
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


@pytest.mark.parametrize("rows", ROWS)
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


# -- which tokens are image: a reference by hand for each processor --------------------------------------------
def heads(attention: Any, states: torch.Tensor) -> torch.Tensor:
    """`[batch, tokens, width]` as `[batch, heads, tokens, head_dim]`."""
    return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def normed(attention: Any, name: str, states: torch.Tensor) -> torch.Tensor:
    norm = getattr(attention, name, None)
    return states if norm is None else norm(states)


def flat(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(2)


def joint(attention: Any, given: dict[str, Any], text_first: bool, rotate: Any) -> tuple[torch.Tensor, ...]:
    """A double block: text and image projected apart, joined in one order, and taken apart again."""
    image, text = given["hidden_states"], given["encoder_hidden_states"]
    size = image.shape[1]
    states = []
    for kind in "qkv":
        ours = heads(attention, getattr(attention, f"to_{kind}")(image))
        other = heads(attention, getattr(attention, f"add_{kind}_proj")(text))
        if kind != "v":
            ours, other = normed(attention, f"norm_{kind}", ours), normed(attention, f"norm_added_{kind}", other)
            ours, other = rotate(ours, other, given)
        states.append(torch.cat([other, ours] if text_first else [ours, other], dim=2))
    begin = text.shape[1] if text_first else 0
    result = flat(dense_identity(*states, AttentionTokens(begin, begin + size), None, None))
    seen = attention.to_out[0](result[:, begin : begin + size])
    written = result[:, :begin] if text_first else result[:, size:]
    projection = getattr(attention, "to_add_out", None)
    return seen, written if projection is None else projection(written)


def unrotated(image: torch.Tensor, text: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return image, text


def flux_rotated(image: torch.Tensor, text: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    both = apply_rotary_emb(torch.cat([text, image], dim=2), given["image_rotary_emb"])
    return both[:, :, text.shape[2] :], both[:, :, : text.shape[2]]


def qwen_rotated(image: torch.Tensor, text: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = zip((image, text), given["image_rotary_emb"], strict=True)
    image, text = (
        apply_rotary_emb_qwen(states.transpose(1, 2), frequencies, use_real=False).transpose(1, 2)
        for states, frequencies in parts
    )
    return image, text


def flux_double(attention: Any, given: dict[str, Any], text: int) -> tuple[torch.Tensor, ...]:
    return joint(attention, given, True, flux_rotated)


def qwen_double(attention: Any, given: dict[str, Any], text: int) -> tuple[torch.Tensor, ...]:
    return joint(attention, given, True, qwen_rotated)


def sd3_joint(attention: Any, given: dict[str, Any], text: int) -> tuple[torch.Tensor, ...]:
    return joint(attention, given, False, unrotated)


def flux_single(attention: Any, given: dict[str, Any], text: int) -> tuple[torch.Tensor, ...]:
    """A single block: the text tokens were put before the image tokens further up."""
    both = given["hidden_states"]
    query, key, value = (heads(attention, getattr(attention, f"to_{kind}")(both)) for kind in "qkv")
    query, key = normed(attention, "norm_q", query), normed(attention, "norm_k", key)
    query, key = (apply_rotary_emb(states, given["image_rotary_emb"]) for states in (query, key))
    return (flat(dense_identity(query, key, value, AttentionTokens(text, both.shape[1]), None, None)),)


def image_only(attention: Any, given: dict[str, Any], text: int) -> tuple[torch.Tensor, ...]:
    """No text in the sequence: the output is V."""
    return (attention.to_out[0](attention.to_v(given["hidden_states"])),)


REFERENCES = {
    ("flux", "transformer_blocks.1.attn"): flux_double,
    ("flux", "single_transformer_blocks.1.attn"): flux_single,
    ("flux_kontext", "single_transformer_blocks.0.attn"): flux_single,
    ("qwenimage", "transformer_blocks.1.attn"): qwen_double,
    ("sd3", "transformer_blocks.2.attn"): sd3_joint,
    ("sd35", "transformer_blocks.2.attn"): sd3_joint,
    ("sd35", "transformer_blocks.1.attn2"): image_only,
    ("pixart", "transformer_blocks.1.attn1"): image_only,
    ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn1"): image_only,
    ("wan", "blocks.1.attn1"): image_only,
}


@pytest.mark.parametrize(("name", "layer"), REFERENCES)
def test_the_perturbed_attention_is_the_reference_by_hand(name: str, layer: str) -> None:
    pipe, case = built(name), CASES[name]
    pipe.guidance_rows = "sequential"
    denoiser = getattr(pipe, case.denoiser)
    attention = denoiser.get_submodule(layer)
    calls: list[tuple[dict[str, Any], Any]] = []
    texts: list[int] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "encoder_hidden_states")
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output))

    def count_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        texts.append(states.shape[1])

    hooks = [
        attention.register_forward_hook(record, with_kwargs=True),
        denoiser.register_forward_hook(count_text, with_kwargs=True),
    ]
    try:
        with pipe.guidance("pag", layers=layer):
            run(pipe, case, num_inference_steps=2)
    finally:
        for hook in hooks:
            hook.remove()
    own_calls = case.calls
    given, output = calls[own_calls]  # the call after the pipeline's own is the perturbed one
    with torch.no_grad():
        expected = REFERENCES[name, layer](attention, given, texts[0])
    outputs = output if isinstance(output, tuple) else (output,)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


# -- rows --------------------------------------------------------------------------------------------------------------
PERTURBED = [name for name in CASES if name not in ("anyflow_far", "sana_sprint")]  # attention of another kind


@pytest.mark.parametrize("name", PERTURBED)
def test_the_picture_does_not_depend_on_how_rows_are_computed(name: str) -> None:
    alone = ours(name, "sequential")
    assert not torch.allclose(alone, run(built(name), CASES[name]), atol=1e-4)
    tolerance = 2e-5 if name == "if_" else 1e-5  # its scheduler divides by a quantile, which enlarges the rounding
    close(ours(name, "batched"), alone, tolerance)
    close(ours(name, "auto"), alone, tolerance)


def test_a_perturbation_shared_by_two_guidances_is_computed_once() -> None:
    pipe, case = built("sd15"), CASES["sd15"]
    with pipe.guidance("pag", scale=1.0, layers="mid"), pipe.guidance("pag", name="more", scale=2.0, layers=["mid"]):
        both = run(pipe, case)
        assert pipe.last_guided_run.evaluations == 3 * 3
    close(both, ours("sd15", pag={"scale": 3.0}), 1e-6)
    with pipe.guidance("pag", layers="mid"), pipe.guidance("pag", name="other", layers="down_blocks.1"):
        run(pipe, case)
        assert pipe.last_guided_run.evaluations == 4 * 3
