"""The plan: what a call will compute, told before anything is computed, from what the guidances declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from torch import nn
from zoo import CASES, run

import trimtab
from trimtab import ParameterError, Plan

STEPS = 10


@pytest.fixture(scope="module")
def shared() -> Any:
    return trimtab.guide(CASES["sd15"].build())


@pytest.fixture
def pipe(shared: Any) -> Any:
    shared.clear_guidance()
    return shared


def explain(pipe: Any, steps: int = STEPS, **call: Any) -> Plan:
    """The plan, made without a single call of a model."""
    models = [component for component in pipe.components.values() if isinstance(component, nn.Module)]

    def refuse(module: nn.Module, *_: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    handles = [model.register_forward_pre_hook(refuse) for model in models]
    try:
        return pipe.explain_guidance(steps, **call)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("plugins", "without_cfg", "with_cfg"), [((), 1, 2), (("cfg",), 2, 2), (("pag",), 2, 3), (("cfg", "pag"), 3, 3)]
)
def test_evaluations_of_cfg_and_pag(
    pipe: Any, plugins: tuple[str, ...], without_cfg: int, with_cfg: int, guidance_scale: float
) -> None:
    for plugin in plugins:
        pipe.add_guidance(plugin)
    plan = explain(pipe, guidance_scale=guidance_scale)
    each = with_cfg if guidance_scale > 1 else without_cfg
    assert [step.evaluations for step in plan.steps] == [each] * STEPS
    assert plan.evaluations == each * STEPS
    assert plan.own_evaluations == (2 if guidance_scale > 1 else 1) * STEPS
    assert plan.calls == STEPS
    assert [row.name for row in plan.rows] == list(plugins)


def test_sequential_rows_are_calls_of_their_own(pipe: Any) -> None:
    pipe.add_guidance("pag")
    pipe.guidance_rows = "sequential"
    plan = explain(pipe)
    del pipe.guidance_rows
    assert (plan.evaluations, plan.calls) == (3 * STEPS, 2 * STEPS)


def test_equal_branches_of_two_guidances_count_once(pipe: Any) -> None:
    pipe.add_guidance("pag", name="one", layers="mid")
    pipe.add_guidance("pag", name="two", layers="mid", scale=1.0)
    assert explain(pipe).evaluations == 3 * STEPS
    pipe.guidances["two"].layers = "up"
    assert explain(pipe).evaluations == 4 * STEPS


def test_a_window_costs_nothing_outside(pipe: Any) -> None:
    pipe.add_guidance("pag", start=0.2, stop=0.5)
    plan = explain(pipe)
    assert [bool(step.acting) for step in plan.steps] == [2 <= index < 5 for index in range(STEPS)]
    assert [len(step.extra) for step in plan.steps] == [int(2 <= index < 5) for index in range(STEPS)]
    assert (plan.rows[0].steps, plan.rows[0].window) == (3, "0.2 to 0.5")


def test_a_window_in_sigma_is_that_of_the_noise_levels(pipe: Any) -> None:
    pipe.add_guidance("pag", sigma_min=0.5, sigma_max=3.0)
    plan = explain(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    ratios = ((1 - kept) / kept).sqrt()
    expected = ((ratios >= 0.5) & (ratios <= 3.0)).tolist()
    assert [bool(step.acting) for step in plan.steps] == expected
    assert 0 < sum(expected) < STEPS


def test_scale_zero_asks_for_nothing(pipe: Any) -> None:
    pipe.add_guidance("pag", scale=0.0)
    pipe.add_guidance("cfg", scale=1.0)
    plan = explain(pipe)
    assert plan.evaluations == plan.own_evaluations == 2 * STEPS
    assert [row.extra for row in plan.rows] == ["+0", "+0"]


@pytest.mark.parametrize("name", ["sd15", "sd3", "dit", "ddpm", "flux", "wan", "sd_img2img"])
def test_what_is_planned_is_what_is_run(name: str) -> None:
    case = CASES[name]
    pipe = trimtab.guide(case.build())
    pipe.add_guidance("pag", scale=2.0, stop=0.5)
    run(pipe, case)
    plan = pipe.explain_guidance(**{key: value for key, value in case.call.items() if not key.startswith("_")})
    assert (plan.evaluations, plan.calls) == (pipe.last_guided_run.evaluations, pipe.last_guided_run.forward_calls)


SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "timesteps": ("sd15", {"timesteps": [900, 500, 100]}),
    "sigmas": ("flux", {"sigmas": [1.0, 0.5]}),
    "the first part": ("sdxl", {"denoising_end": 0.5, "num_inference_steps": 8}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_the_callers_own_is_planned_as_it_is_run(name: str) -> None:
    case, call = CASES[SCHEDULES[name][0]], SCHEDULES[name][1]
    pipe = trimtab.guide(case.build())
    if "timesteps" in call:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.add_guidance("pag", scale=2.0, stop=0.7)
    run(pipe, case, **call)
    given = {key: value for key, value in case.call.items() if not key.startswith("_")}
    plan = pipe.explain_guidance(**{**given, **call})
    assert (plan.evaluations, plan.calls) == (pipe.last_guided_run.evaluations, pipe.last_guided_run.forward_calls)


def test_the_second_part_of_a_run_is_planned_as_it_is_run() -> None:
    pipe = trimtab.guide(StableDiffusionXLImg2ImgPipeline(**CASES["sdxl"].build().components))
    pipe.add_guidance("pag", scale=2.0)
    call = {**CASES["sdxl"].call, "image": torch.zeros(1, 4, 8, 8), "denoising_start": 0.6, "num_inference_steps": 8}
    call = {key: value for key, value in call.items() if key not in ("height", "width") and not key.startswith("_")}
    pipe(**call)
    assert pipe.explain_guidance(**call).evaluations == pipe.last_guided_run.evaluations < 3 * 8


@pytest.mark.parametrize("plugin", ["cfg", "pag"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_a_prompt_that_is_its_own_negative_costs_what_is_planned(name: str, plugin: str) -> None:
    case = CASES[name]
    pipe = trimtab.guide(case.build())
    pipe.add_guidance(plugin)
    call = {**case.call, "prompt": "", "negative_prompt": ""}
    run(pipe, case, prompt="", negative_prompt="")
    plan = pipe.explain_guidance(**{key: value for key, value in call.items() if not key.startswith("_")})
    assert (plan.evaluations, plan.calls) == (pipe.last_guided_run.evaluations, pipe.last_guided_run.forward_calls)


@pytest.mark.parametrize(("name", "value"), [
    ("guidance_max_rows", 0), ("guidance_max_rows", "4"), ("guidance_max_rows", -1), ("guidance_rows", "one by one"),
])  # fmt: skip
def test_rows_that_cannot_be_are_refused_in_the_plan(pipe: Any, name: str, value: Any) -> None:
    setattr(pipe, name, value)
    try:
        with pytest.raises(ParameterError, match=f"{name}={value!r}; allowed: "):
            pipe.explain_guidance(2)
    finally:
        delattr(pipe, name)


def test_nothing_changes_while_a_plan_is_made(pipe: Any) -> None:
    timesteps = pipe.scheduler.timesteps
    state = torch.get_rng_state()
    pipe.add_guidance("pag", sigma_max=5.0)
    explain(pipe)
    assert pipe.scheduler.timesteps is timesteps
    assert torch.equal(torch.get_rng_state(), state)


TABLE = """\
StableDiffusionPipeline with DDIMScheduler, 10 scheduler steps
  guidance  plug-in  window    acts on      phases                    evaluations
  pag                0.2 to 1  8/10 steps   branches, delta           +1 a step
    scale=3.0, layers='mid', adaptive_scale=0.0
    perturbs mid_block.attentions.0.transformer_blocks.0.attn1
  strong    cfg      all       10/10 steps  branches, delta, project  +0 a step
    scale=9.0, rescale=0.0
  evaluations an image: 2 to 3 a step, 28 in total, of which 20 are the pipeline's own; 10 forward calls of the denoiser
"""


def test_the_table(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.add_guidance("pag", layers="mid", start=0.2)
    pipe.add_guidance("cfg", name="strong", scale=9.0)
    plan = explain(pipe)
    assert capsys.readouterr().out == TABLE
    assert repr(plan) == "<Plan of StableDiffusionPipeline: 10 scheduler steps, 28 evaluations>"


def test_the_table_without_guidance(pipe: Any) -> None:
    assert str(explain(pipe)).splitlines()[1:] == [
        "  no guidance attached",
        "  evaluations an image: 2 a step, 20 in total, of which 20 are the pipeline's own; "
        "10 forward calls of the denoiser",
    ]


@pytest.mark.parametrize("steps", [0, -3, "ten", 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(pipe: Any, steps: Any) -> None:
    with pytest.raises(ParameterError, match=r"num_inference_steps=.*; allowed: a whole number >= 1"):
        explain(pipe, steps)


def test_an_argument_that_the_call_does_not_have_is_refused(pipe: Any) -> None:
    with pytest.raises(ParameterError, match=r"its call takes no guidance_scal\. Did you mean 'guidance_scale'\?"):
        explain(pipe, guidance_scal=3.0)
