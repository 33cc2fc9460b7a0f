"""What a plan declares is what a run computes, counted underneath the engine at the denoiser's own `forward`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from recorder import Record, recorded
from zoo import CASES, run
from zoo.unets import kandinsky_combined

import trimtab
from trimtab.conformance.tiny import assemble
from trimtab.guidance.branch import Prompt
from trimtab.guidance.plugins.pag import IdentityAttention

Guidances = dict[str, dict[str, Any]]
CFG: Guidances = {"cfg": {"scale": 3.0}}
PAG: Guidances = {"pag": {"scale": 3.0}}
WINDOWED: Guidances = {"pag": {"scale": 3.0, "start": 0.3, "stop": 0.8}}


def prepared(name: str, guidances: Guidances, **attributes: Any) -> tuple[Any, Record]:
    pipe = CASES[name].build()
    parts = (CASES[name].denoiser, "transformer_2")
    record = recorded(pipe, *(part for part in parts if pipe.components.get(part) is not None))
    trimtab.guide(pipe)
    for plugin, parameters in guidances.items():
        pipe.add_guidance(plugin, **parameters)
    for attribute, value in attributes.items():
        setattr(pipe, attribute, value)
    return pipe, record


def check(name: str, pipe: Any, record: Record, first_apart: int = 0, **override: Any) -> list[int]:
    """Compare plan, run and count; returns the evaluations of each scheduler step.

    Args:
        first_apart: branches of the first step that become calls of their own, as no row's role is known yet.
    """
    call = {**CASES[name].call, **override}
    plan = pipe.explain_guidance(**call)
    run(pipe, CASES[name], **override)
    counted = [sum(forward.rows for forward in step.forwards) for step in record.steps]
    assert counted == [step.evaluations for step in plan.steps]
    assert pipe.last_guided_run.evaluations == plan.evaluations == sum(counted)
    calls = [len(step.forwards) for step in record.steps]
    calls[0] -= first_apart
    assert calls == [step.calls for step in plan.steps]
    assert pipe.last_guided_run.forward_calls == len(record.forwards)
    return counted


ONE_CALL = [
    "sd15", "sdxl", "sd3", "sd35", "pixart", "dit", "sd_inpaint", "controlnet", "sd_img2img", "ltx_image2video",
]  # fmt: skip
TWO_CALLS = ["wan", "wan22", "flux_true_cfg", "qwenimage"]


@pytest.mark.parametrize("rows", ["auto", "sequential"])
@pytest.mark.parametrize("name", [*ONE_CALL, *TWO_CALLS, "flux", "flux_kontext", "ddpm", "lcm"])
def test_pag_costs_one_evaluation_a_step(name: str, rows: str) -> None:
    pipe, record = prepared(name, PAG, guidance_rows=rows)
    counted = check(name, pipe, record)
    case = CASES[name]
    assert set(counted) == {case.rows * case.calls + 1}


@dataclass
class PerturbedPrompt(trimtab.Guidance):
    """Away from another prompt under PAG: a perturbed branch whose parent is no row of the pipeline's call."""

    def setup(self, run: trimtab.Run) -> None:
        run.state.branch = trimtab.Branch(Prompt("a blue fox"), IdentityAttention(run.attention_layers("auto")))

    def branches(self, step: trimtab.Step) -> tuple[trimtab.Branch, ...]:
        return (trimtab.COND, step.state.branch)

    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> torch.Tensor:
        return predictions[trimtab.COND] - predictions[step.state.branch]


def test_a_branch_whose_parent_is_elsewhere_is_a_call_of_its_own_and_the_others_ride_along() -> None:
    pipe, record = prepared("sd15", PAG)
    pipe.add_guidance(PerturbedPrompt())
    assert set(check("sd15", pipe, record)) == {4}
    assert [[forward.rows for forward in step.forwards] for step in record.steps] == [[3, 1]] * 3


def test_a_prior_and_its_decoder_are_both_planned() -> None:
    pipe = assemble(kandinsky_combined)
    record = recorded(pipe, "unet", "prior_prior")
    trimtab.guide(pipe).add_guidance("pag", scale=3.0)
    call = {"guidance_scale": 4.0, "height": 32, "width": 32, "num_inference_steps": 2, "prior_num_inference_steps": 3}
    plan = pipe.explain_guidance(**call)
    pipe("a red fox", **call, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert [step.evaluations for step in plan.steps] == [2] * 3 + [3] * 2  # the prior has no map to perturb
    assert pipe.last_guided_run.evaluations == plan.evaluations == sum(forward.rows for forward in record.forwards)


@pytest.mark.parametrize(
    ("name", "off"),
    [("sd15", {"guidance_scale": 1.0}), ("sd3", {"guidance_scale": 1.0}), ("wan", {"guidance_scale": 1.0}),
     ("flux_true_cfg", {"true_cfg_scale": 1.0}), ("flux", {})],
)  # fmt: skip
@pytest.mark.parametrize("rows", ["batched", "sequential"])
def test_cfg_costs_one_where_the_pipeline_has_none(name: str, off: dict[str, Any], rows: str) -> None:
    pipe, record = prepared(name, CFG, guidance_rows=rows)
    assert set(check(name, pipe, record, **off)) == {2}


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan", "flux_true_cfg", "dit"])
def test_cfg_costs_nothing_where_the_pipeline_has_its_own(name: str) -> None:
    pipe, record = prepared(name, CFG)
    assert set(check(name, pipe, record)) == {2}


@pytest.mark.parametrize(("name", "off"), [("sd15", {"guidance_scale": 1.0}), ("flux", {}), ("pixart", {})])
def test_both_cost_the_sum(name: str, off: dict[str, Any]) -> None:
    pipe, record = prepared(name, CFG | PAG)
    assert set(check(name, pipe, record, **off)) == {3}


ALWAYS = {"start": 0.0, "stop": 1.0}
EVERY: dict[str, tuple[dict[str, Any], int, int]] = {
    # plug-in: parameters, evaluations beside the pipeline's two, calls that they are where rows cannot be shared
    "seg": ({}, 1, 0),
    "slg": (ALWAYS, 1, 0),
    "sag": ({}, 1, 1),
    "perp_neg": ({"negative_prompt": "two blue boats"}, 2, 0),
    "cfg_pp": ({}, 0, 0),
    "interval": ({"scale": 3.0}, 0, 0),
    "rescale": ({}, 0, 0),
    "dynamic_threshold": ({}, 0, 0),
}


@pytest.mark.parametrize("plugin", EVERY)
@pytest.mark.parametrize("rows", ["auto", "sequential"])
def test_every_guidance_costs_what_it_declares(plugin: str, rows: str) -> None:
    parameters, evaluations, apart = EVERY[plugin]
    for name in ("sd15", "pixart"):
        pipe, record = prepared(name, {plugin: parameters}, guidance_rows=rows)
        assert set(check(name, pipe, record)) == {2 + evaluations}
        calls = {len(step.forwards) for step in record.steps}
        assert calls == {1 + (evaluations if rows == "sequential" else apart)}


def test_equal_branches_of_several_are_computed_once() -> None:
    several = {"pag": {"scale": 3.0}, "seg": {"scale": 3.0}, "slg": {"scale": 2.8, **ALWAYS}, "sag": {}, "rescale": {}}
    pipe, record = prepared("sd15", several)
    assert set(check("sd15", pipe, record)) == {6}
    assert {len(step.forwards) for step in record.steps} == {2}


def test_a_weaker_denoiser_costs_a_call_of_its_own() -> None:
    pipe, record = prepared("sd15", {"autoguidance": {"weak": CASES["sd15"].build().unet}, "pag": {}})
    plan = pipe.explain_guidance(**CASES["sd15"].call)
    run(pipe, CASES["sd15"])
    assert {sum(forward.rows for forward in step.forwards) for step in record.steps} == {3}  # by the pipeline's own
    assert pipe.last_guided_run.evaluations == plan.evaluations == 3 * 4
    assert pipe.last_guided_run.forward_calls == plan.calls == 3 * 2


def test_outside_its_window_a_guidance_costs_nothing() -> None:
    pipe, record = prepared("sd15", WINDOWED)
    assert check("sd15", pipe, record, num_inference_steps=5) == [2, 2, 3, 3, 2]
    pipe, record = prepared("wan", WINDOWED)
    assert check("wan", pipe, record, num_inference_steps=5) == [2, 2, 3, 3, 2]


def test_a_window_in_noise_levels_is_planned_as_it_is_run() -> None:
    pipe, record = prepared("sdxl", {"pag": {"scale": 3.0, "sigma_max": 5.0, "sigma_min": 0.5}})
    counted = check("sdxl", pipe, record, num_inference_steps=6)
    assert set(counted) == {2, 3}


def test_a_scale_that_has_fallen_to_zero_costs_nothing() -> None:
    pipe, record = prepared("sd15", {"pag": {"scale": 3.0, "adaptive_scale": 0.006}})
    assert check("sd15", pipe, record, num_inference_steps=4) == [3, 3, 2, 2]


@pytest.mark.parametrize("guidances", [PAG, WINDOWED])
def test_a_heun_pair_is_one_level_with_two_evaluations(guidances: Guidances) -> None:
    pipe, _ = prepared("sdxl", guidances)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    watched = recorded(pipe)
    plan = pipe.explain_guidance(**{**CASES["sdxl"].call, "num_inference_steps": 4})
    run(pipe, CASES["sdxl"], num_inference_steps=4)
    assert len(watched.steps) == len(plan.steps) == 7
    assert pipe.last_guided_run.evaluations == plan.evaluations
    assert pipe.last_guided_run.forward_calls == plan.calls
    inside = [step.evaluations == 3 for step in plan.steps]
    assert inside == ([True] * 7 if guidances is PAG else [False] * 4 + [True] * 3)


def test_flow_heun_as_well() -> None:
    pipe, _ = prepared("sd3", PAG)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plan = pipe.explain_guidance(**CASES["sd3"].call)
    run(pipe, CASES["sd3"])
    assert pipe.last_guided_run.evaluations == plan.evaluations == 3 * 5


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "flops.py"
    spec = importlib.util.spec_from_file_location("flops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("architecture", "most"), [("SD1.5", 2.72), ("SDXL", 2.72), ("SD3 medium", 2.50)])
def test_the_shared_prefix_is_not_computed_twice(flops: ModuleType, architecture: str, most: float) -> None:
    guided = flops.forwards(architecture, 2)
    assert 2.0 < guided <= most
