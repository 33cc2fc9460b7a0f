"""`seg` blurs the queries of image tokens as the paper does, on grids of any shape and on image tokens only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from guided_runs import built, check_everywhere, close, guided, watched
from scipy.ndimage import gaussian_filter1d
from torch.nn import functional as F
from zoo import CASES, run

import trimtab
from trimtab.guidance.branch import AttentionTokens
from trimtab.guidance.errors import GuidanceRuntimeError
from trimtab.guidance.plugins.seg import SmoothedQueries
from trimtab.pipelines.grids import grid_of, image_grids

ON = {"scale": 3.0}


# -- the blur ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (4, 12), (9, 6)])
def test_it_is_a_gaussian_over_the_grid(grid: tuple[int, int], sigma: float) -> None:
    query = torch.randn(2, 3, math.prod(grid), 5)
    expected = query.unflatten(2, grid).double().numpy()
    for axis, side in ((2, grid[0]), (3, grid[1])):
        size = min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side + 1 - side % 2)
        expected = gaussian_filter1d(expected, sigma, axis=axis, mode="mirror", radius=size // 2)
    blurred = SmoothedQueries((), sigma).smoothed(query, grid)
    close(blurred, torch.from_numpy(expected).float().flatten(2, 3), 1e-5)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 5.0])
def test_on_a_square_it_is_that_of_the_papers_code(sigma: float) -> None:
    query = torch.randn(2, 64, 16)
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    kernel = min(size, 9)  # which Diffusers' version does only where it takes the blur for infinite
    expected = _gaussian_blur_2d(query.clone(), kernel, sigma, sigma_threshold_inf=0.0)
    close(SmoothedQueries((), sigma).smoothed(query[:, None], (8, 8))[:, 0], expected, 1e-5)


def test_an_infinite_blur_is_the_mean_and_needs_no_grid() -> None:
    query = torch.randn(1, 2, 12, 4)
    assert torch.equal(SmoothedQueries(()).smoothed(query, None), query.mean(dim=2, keepdim=True).expand_as(query))
    far = SmoothedQueries((), 1e4).smoothed(query, (3, 4))
    assert far.std(dim=2).max() < query.std(dim=2).min()


def test_a_finite_blur_without_a_grid_is_an_error_that_says_what_works() -> None:
    with pytest.raises(GuidanceRuntimeError, match=r"seg: sigma=2: .* allowed here: sigma=inf"):
        SmoothedQueries((), 2.0).smoothed(torch.randn(1, 2, 12, 4), None)


def test_each_frame_is_blurred_by_itself() -> None:
    query = torch.randn(1, 2, 3 * 16, 4)
    frames = [SmoothedQueries((), 1.0).smoothed(part, (4, 4)) for part in query.split(16, dim=2)]
    close(SmoothedQueries((), 1.0).smoothed(query, (3, 4, 4)), torch.cat(frames, dim=2), 1e-6)


def test_text_tokens_attend_as_ever() -> None:
    query, key, value = torch.randn(3, 1, 2, 22, 4)
    plain = F.scaled_dot_product_attention(query, key, value)
    smooth = SmoothedQueries(()).attention(query, key, value, AttentionTokens(6, 22), None, None)
    assert torch.equal(smooth[..., :6, :], plain[..., :6, :])
    assert torch.equal(smooth[..., 6:, :], smooth[..., 6:7, :].expand(-1, -1, 16, -1))


# -- where the tokens lie ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "call", "grid"),
    [
        ("sd15", {"height": 32, "width": 48}, (4, 6)),
        ("sdxl", {"height": 48, "width": 32}, (6, 4)),
        ("sd3", {"height": 16, "width": 32}, (4, 8)),
        ("pixart", {"height": 32, "width": 16}, (8, 4)),
        ("flux", {"height": 16, "width": 32}, (4, 8)),
        ("qwenimage", {"height": 16, "width": 32}, (4, 8)),
        ("wan", {}, (2, 4, 4)),
        ("ltx", {"num_frames": 9, "height": 64, "width": 32}, (2, 8, 4)),
    ],
)
def test_the_grid_is_the_picture(name: str, call: dict[str, Any], grid: tuple[int, ...]) -> None:
    case = CASES[name]
    pipe = case.build()
    seen: list[AttentionTokens] = []

    class Look(SmoothedQueries):
        def attention(self, query: Any, key: Any, value: Any, tokens: AttentionTokens, *rest: Any) -> Any:
            seen.append(tokens)
            return super().attention(query, key, value, tokens, *rest)

    class Looking(trimtab.Guidance):
        def setup(self, run: trimtab.Run) -> None:
            run.state.branch = trimtab.Branch("cond", Look(run.attention_layers("auto")))

        def branches(self, step: trimtab.Step) -> tuple[trimtab.Branch, ...]:
            return (step.state.branch,)

    trimtab.guide(pipe).add_guidance(Looking())
    run(pipe, case, **{"num_inference_steps": 1, **call})
    assert {tokens.grid for tokens in seen} == {grid}
    assert math.prod(grid) == seen[0].stop - seen[0].start


def test_positions_that_are_no_grid_tell_nothing() -> None:
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert grid_of(3, image_grids(None, (), {"img_ids": ids})) is None
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    assert grid_of(4, image_grids(None, (), {"img_ids": ids})) == (2, 2)


# -- the method --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [float("inf"), 1.0])
def test_on_a_unet_it_is_the_formula_with_the_smoothed_query_projection(sigma: float) -> None:
    record = watched("sd15", "seg", {"scale": 3.0, "sigma": sigma})
    twin = CASES["sd15"].build().unet
    # Diffusers' blur takes the mean where sigma is below its threshold, and blurs where it is above.
    threshold = 1e9 if math.isinf(sigma) else 0.0
    projection = twin.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    projection.register_forward_hook(lambda module, args, output: _gaussian_blur_2d(output, 5, 1.0, threshold))
    for step in record.steps:
        (forward,) = step.forwards
        uncond, cond, smoothed = forward.output.split(1)
        close(step.model_output, uncond + 5.0 * (cond - uncond) + 3.0 * (cond - smoothed), 1e-6)
        with torch.no_grad():
            expected = twin(
                forward.arguments["sample"][1:2], forward.arguments["timestep"],
                encoder_hidden_states=forward.arguments["encoder_hidden_states"][1:2],
            ).sample  # fmt: skip
        close(smoothed, expected, 1e-5)


@pytest.mark.parametrize("name", ["sd15", "ddpm", "dit", "pixart", "sd3", "flux", "wan"])
@pytest.mark.parametrize("sigma", [float("inf"), 1.0])
def test_on_every_kind_of_denoiser_it_acts_and_costs_nothing_at_scale_zero(name: str, sigma: float) -> None:
    check_everywhere(name, "seg", {"scale": 3.0, "sigma": sigma}, {"scale": 0.0})


def test_with_cfg_off_it_acts_on_the_conditional_prediction() -> None:
    record = watched("sd15", "seg", ON, guidance_scale=1.0)
    for step in record.steps:
        cond, smoothed = step.forwards[0].output.split(1)
        close(step.model_output, cond + 3.0 * (cond - smoothed), 1e-6)


def test_it_shares_the_conditional_branch_with_pag() -> None:
    pipe = built("sd15")
    with pipe.guidance("pag", scale=2.0), pipe.guidance("seg", scale=3.0):
        plan = pipe.explain_guidance(**CASES["sd15"].call)
        both = run(pipe, CASES["sd15"])
        assert pipe.last_guided_run.evaluations == plan.evaluations == 3 * 4
        assert pipe.last_guided_run.forward_calls == 3
    with pipe.guidance("seg", scale=3.0), pipe.guidance("pag", scale=2.0):
        assert torch.equal(run(pipe, CASES["sd15"]), both)


def test_outside_its_window_it_costs_nothing() -> None:
    record = watched("sd15", "seg", {"start": 0.4, "stop": 0.8}, num_inference_steps=5)
    assert [step.forwards[0].rows for step in record.steps] == [2, 2, 3, 3, 2]


def test_a_wider_blur_guides_further() -> None:
    none = guided("sd15", "seg", {"scale": 0.0})
    narrow, wide = (guided("sd15", "seg", {"sigma": sigma}) for sigma in (0.3, 30.0))
    assert (narrow - none).norm() < (wide - none).norm()
