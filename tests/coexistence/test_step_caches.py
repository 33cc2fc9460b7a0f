"""Step caches: branches are calls of their own with a memory of their own, and the pipeline's skips are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_pyramid_attention_broadcast
from fingerprint import of_pipeline
from guided_runs import guided
from recorder import recorded
from zoo import CASES, run, videos

import trimtab
from trimtab import COND, Branch, Guidance, Predictions, Prompt, Run, Step
from trimtab.conformance.tiny import assemble
from trimtab.guidance.plugins.pag import IdentityAttention

STEPS = {"num_inference_steps": 6}
NAMES = ["wan", "flux", "flux_true_cfg"]


def first_block(pipe: Any, skip: bool) -> Any:
    return FirstBlockCacheConfig(threshold=0.3 if skip else 0.0)


def taylor_seer(pipe: Any, skip: bool) -> Any:
    """Its lite variant: blocks are left out, the last projection is extrapolated."""
    before = 2 if skip else 100
    return TaylorSeerCacheConfig(3, before, taylor_factors_dtype=torch.float32, use_lite_mode=True)


def taylor_seer_attention(pipe: Any, skip: bool) -> Any:
    before = 2 if skip else 100
    return TaylorSeerCacheConfig(3, before, taylor_factors_dtype=torch.float32, cache_identifiers=[r".*attn1?"])


def faster(pipe: Any, skip: bool) -> Any:
    return FasterCacheConfig(
        current_timestep_callback=lambda: float(pipe._current_timestep),
        spatial_attention_timestep_skip_range=(-1, 900) if skip else (-1, 0),
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
    )


def broadcast(pipe: Any, skip: bool) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900) if skip else (-1, 0),
        current_timestep_callback=lambda: float(pipe._current_timestep),
    )


OF_BLOCKS, OF_ATTENTION = [first_block, taylor_seer], [taylor_seer_attention, faster, broadcast]


def cached(name: str, cache: Callable[[Any, bool], Any], skip: bool = True) -> Any:
    pipe = CASES[name].build()
    pipe.transformer.enable_cache(cache(pipe, skip))
    return trimtab.guide(pipe)


@pytest.mark.parametrize("cache", [*OF_BLOCKS, *OF_ATTENTION])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_with_its_cache(name: str, cache: Callable[[Any, bool], Any]) -> None:
    """With nothing attached, at scale 0, and after a guided run, with the memory of the cache as it was."""
    pipe, case = cached(name, cache), CASES[name]
    stock, frame = run(pipe, case, **STEPS), of_pipeline(pipe, values=False)
    assert not torch.equal(stock, run(case.build(), case, **STEPS)), "the cache does nothing"
    with pipe.guidance("pag", scale=0.0):
        assert torch.equal(run(pipe, case, **STEPS), stock)
    with pipe.guidance("cfg", scale=4.0):
        assert not torch.equal(run(pipe, case, **STEPS), stock)
    assert of_pipeline(pipe, values=False) == frame
    assert torch.equal(run(pipe, case, **STEPS), stock)


@dataclass
class Idle(Guidance):
    """Asks for branches and does nothing with them."""

    perturbed: bool = trimtab.parameter(True, "Whether one has perturbed attention; otherwise it has another prompt.")
    layers: str = trimtab.parameter("auto", "Which attentions are perturbed.")

    def setup(self, run: Run) -> None:
        identity = IdentityAttention(run.attention_layers(self.layers)) if self.perturbed else None
        run.state.branch = Branch("cond", identity) if self.perturbed else Branch(Prompt("a house"))

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, step.state.branch)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        return torch.zeros_like(predictions[step.state.branch])


@pytest.mark.parametrize("perturbed", [True, False])
@pytest.mark.parametrize("cache", [*OF_BLOCKS, *OF_ATTENTION])
@pytest.mark.parametrize("name", NAMES)
def test_branches_leave_the_pipelines_own_skips_alone(name: str, cache: Any, perturbed: bool) -> None:
    """To the bit: had a branch been seen by the pipeline's cache, other blocks would have been left out."""
    pipe, case = cached(name, cache), CASES[name]
    stock = run(pipe, case, **STEPS)
    with pipe.guidance(Idle(perturbed=perturbed), name="idle"):
        assert torch.equal(run(pipe, case, **STEPS), stock)
    own = 6 * case.rows * case.calls
    assert (pipe.last_guided_run.evaluations, pipe.last_guided_run.forward_calls) == (own + 6, 6 * case.calls + 6)


@pytest.mark.parametrize("cache", [*OF_BLOCKS, *OF_ATTENTION])
@pytest.mark.parametrize("plugin", ["pag", "cfg"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_skips_nothing_changes_nothing(name: str, plugin: str, cache: Any) -> None:
    pipe = cached(name, cache, skip=False)
    with pipe.guidance(plugin, scale=2.5):
        result = run(pipe, CASES[name], **STEPS)
    assert torch.equal(result, guided(name, plugin, {"scale": 2.5}, rows="sequential", **STEPS))


@pytest.mark.parametrize("cache", [first_block, taylor_seer_attention, broadcast])
def test_each_branch_remembers_by_itself(cache: Any) -> None:
    """Two of one kind that differ in their layers do not see each other's steps."""
    pipe, case = cached("wan", cache), CASES["wan"]
    with pipe.guidance("pag", scale=2.0, layers="blocks.0"):
        alone = run(pipe, case, **STEPS)
        with pipe.guidance(Idle(layers="blocks.2"), name="idle"):
            assert torch.equal(run(pipe, case, **STEPS), alone)


def check_alike(change: torch.Tensor, expected: torch.Tensor) -> None:
    """In direction and length, to what a cache of these tiny models changes by itself."""
    assert torch.nn.functional.cosine_similarity(change, expected, dim=0) > 0.8
    assert 0.7 < change.norm() / expected.norm() < 1.5


@pytest.mark.parametrize("cache", [*OF_BLOCKS, *OF_ATTENTION])
@pytest.mark.parametrize("name", NAMES)
def test_guidance_does_under_a_cache_what_it_does_without(name: str, cache: Any) -> None:
    """To the error of the cache, at the steps that it leaves out as well: a branch remembers its own attention."""
    pipe, plain, case = cached(name, cache), cached(name, cache, skip=False), CASES[name]
    changes = []
    for each in (pipe, plain):
        with each.guidance("pag", scale=2.0):
            result = run(each, case, **STEPS)
        changes.append((result - run(each, case, **STEPS)).flatten())
    check_alike(*changes)


@pytest.mark.parametrize("cache", [*OF_BLOCKS, *OF_ATTENTION])
def test_a_branch_that_begins_late_begins_by_computing(cache: Any) -> None:
    pipe, case = cached("flux", cache), CASES["flux"]
    stock = run(pipe, case, **STEPS)
    with pipe.guidance("pag", scale=2.0, start=0.5):
        result = run(pipe, case, **STEPS)
    assert torch.isfinite(result).all() and not torch.equal(result, stock)


def cogvideox(skip: bool) -> Any:
    """One call with both rows, of which FasterCache leaves out the unconditional one."""
    pipe = assemble(videos.cogvideox)
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            current_timestep_callback=lambda: float(pipe._current_timestep),
            spatial_attention_timestep_skip_range=(-1, 950) if skip else (-1, 0),
            unconditional_batch_timestep_skip_range=(-1, 950) if skip else (-1, 0),
            unconditional_batch_skip_range=2,
            attention_weight_callback=lambda module: 0.5,
            tensor_format="BFCHW",
        )
    )
    return pipe


VIDEO = {"prompt": "a red fox", "height": 64, "width": 64, "num_frames": 1, "max_sequence_length": 16}
CALL = {**VIDEO, **STEPS, "guidance_scale": 4.0, "output_type": "latent"}


def test_faster_cache_leaves_out_the_unconditional_half_of_the_pipelines_call_only() -> None:
    case = replace(CASES["wan"], call=CALL)
    stock, plain = run(cogvideox(skip=True), case), run(cogvideox(skip=False), case)
    assert not torch.equal(stock, plain), "the cache does nothing"
    pipe = trimtab.guide(cogvideox(skip=True))
    run(pipe, case)
    frame = of_pipeline(pipe, values=False)
    for images in (1, 2):  # two rows of one branch are no halves either
        call = {"num_videos_per_prompt": images}
        expected = run(cogvideox(skip=True), case, **call)
        with pipe.guidance(Idle(), name="idle"):
            assert torch.equal(run(pipe, case, **call), expected)
    assert of_pipeline(pipe, values=False) == frame
    changes = []
    for each, own in ((pipe, stock), (trimtab.guide(cogvideox(skip=False)), plain)):
        with each.guidance("pag", scale=2.0):
            changes.append((run(each, case) - own).flatten())
    check_alike(*changes)


def test_maps_that_a_cache_leaves_out_cannot_be_read() -> None:
    pipe = CASES["sd3"].build()
    apply_pyramid_attention_broadcast(pipe.transformer, broadcast(pipe, skip=True))
    record = recorded(pipe, "transformer")
    with pytest.raises(trimtab.UnsupportedPipelineError, match=r"sag reads the attention maps .* disable_cache\(\)"):
        trimtab.guide(pipe).add_guidance("sag", scale=0.5)
        run(pipe, CASES["sd3"])
    assert not record.forwards
