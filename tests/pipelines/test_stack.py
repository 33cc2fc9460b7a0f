"""`GuidanceStack` in Diffusers' modular pipelines: what plug-ins do there is what they do in ordinary ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import guiders
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from guided_runs import close
from zoo import CASES, run
from zoo.modular import modular_twin, run_modular

import trimtab
from trimtab.conformance.fingerprint import fingerprint
from trimtab.guidance.base import Guidance
from trimtab.guidance.errors import ConflictError, ParameterError, UnsupportedPipelineError
from trimtab.guidance.run import Step
from trimtab.pipelines.stack import GuidanceStack

MODELS = ["sdxl", "sd3"]


@functools.cache
def stock(name: str) -> Any:
    return CASES[name].build()


def with_guider(name: str, guider: guiders.BaseGuidance, **call: Any) -> torch.Tensor:
    return run_modular(modular_twin(stock(name), guider), CASES[name], **call)


def ordinary(name: str, *guidances: Any, **call: Any) -> torch.Tensor:
    pipe = trimtab.guide(CASES[name].build())
    for guidance in guidances:
        pipe.add_guidance(guidance)
    return run(pipe, CASES[name], **call)


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """Rows of each call of the SDXL denoiser."""
    rows: list[int] = []
    hook = stock("sdxl").unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


# -- a memory budget ---------------------------------------------------------------------------------------------------
def test_no_call_has_more_rows_than_allowed_and_the_result_is_the_same(counted: list[int]) -> None:
    """The unconditional call as well, which has a row for each image."""
    stack, images = GuidanceStack("cfg", "pag"), {"num_images_per_prompt": 2}
    expected = with_guider("sdxl", stack, **images)
    assert set(counted) == {2, 4}
    counted.clear()
    stack.guidance_max_rows = 1
    close(with_guider("sdxl", stack, **images), expected)
    assert set(counted) == {1} and "at most 1 rows a call" in str(stack.explain_guidance())


def test_rows_that_do_not_fit_into_memory_are_computed_in_pieces(counted: list[int]) -> None:
    def full(module: Any, args: Any) -> None:
        if len(args[0]) > 2:
            torch.empty(2**60, dtype=torch.uint8)

    stack, images = GuidanceStack("pag"), {"num_images_per_prompt": 2}
    expected = with_guider("sdxl", stack, **images)
    counted.clear()
    hook = stock("sdxl").unet.register_forward_pre_hook(full)
    close(with_guider("sdxl", stack, **images), expected)
    hook.remove()
    assert counted == [4, *[2, 2] * CASES["sdxl"].call["num_inference_steps"]]


def test_a_budget_that_is_none_is_refused_before_anything_is_computed(counted: list[int]) -> None:
    stack = GuidanceStack("pag")
    stack.guidance_max_rows = 0
    with pytest.raises(ParameterError, match=r"guidance_max_rows=0; allowed: a whole number >= 1"):
        with_guider("sdxl", stack)
    assert not counted


# -- parity ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_without_any_guidance_the_prediction_is_the_conditional_one(name: str) -> None:
    assert torch.equal(with_guider(name, GuidanceStack()), with_guider(name, guiders.ClassifierFreeGuidance(1.0)))


@pytest.mark.parametrize("name", [*MODELS, "wan"])
def test_cfg_is_classifier_free_guidance(name: str) -> None:
    stack = GuidanceStack()
    stack.add_guidance("cfg", scale=4.0)
    close(with_guider(name, stack), with_guider(name, guiders.ClassifierFreeGuidance(4.0)), 1e-6)


@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_cfg_and_pag_are_those_of_the_ordinary_pipeline(name: str, rows: str) -> None:
    stack = GuidanceStack("pag")
    stack.add_guidance("cfg", scale=5.0)
    stack.guidance_rows = rows
    close(with_guider(name, stack), ordinary(name, "pag"))


@pytest.mark.parametrize("plugin", ["pag", "seg"])
def test_a_perturbation_alone_is_not_classifier_free_guidance(plugin: str) -> None:
    expected = ordinary("sdxl", plugin, guidance_scale=1.0)
    assert not torch.allclose(expected, ordinary("sdxl", guidance_scale=1.0), atol=1e-3)
    close(with_guider("sdxl", GuidanceStack(plugin)), expected)


def test_a_smaller_denoiser_guides_the_larger() -> None:
    weaker = CASES["sdxl"].build().unet
    torch.manual_seed(1)
    for parameter in weaker.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    stack = GuidanceStack()
    stack.add_guidance("autoguidance", weak=weaker)
    pipe = trimtab.guide(CASES["sdxl"].build())
    pipe.add_guidance("autoguidance", weak=weaker)
    close(with_guider("sdxl", stack), run(pipe, CASES["sdxl"], guidance_scale=1.0))


def test_a_guider_of_diffusers_within_it_is_that_guider() -> None:
    def apg() -> guiders.BaseGuidance:
        return guiders.AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=-0.5, eta=0.3)

    assert torch.equal(with_guider("sdxl", GuidanceStack(apg())), with_guider("sdxl", apg()))


# -- cost, runs --------------------------------------------------------------------------------------------------------
def test_branches_ride_along_in_the_conditional_call_and_the_plan_says_so(counted: list[int]) -> None:
    stack = GuidanceStack("cfg", "pag")
    plan = stack.explain_guidance(3)
    with_guider("sdxl", stack)
    assert counted == [2, 1] * 3
    assert (plan.evaluations, plan.calls) == (sum(counted), len(counted))


def test_the_plan_of_what_goes_by_the_timestep_is_what_is_run(counted: list[int]) -> None:
    stack = GuidanceStack("cfg")
    stack.add_guidance("pag", scale=3.0, adaptive_scale=0.005)  # down to 0 at t = 400
    plan = stack.explain_guidance(3, scheduler=stock("sdxl").scheduler)  # t = 667, 334, 1
    with_guider("sdxl", stack)
    assert counted == [2, 1] + [1, 1] * 2
    assert (plan.evaluations, plan.calls) == (sum(counted), len(counted))


def test_without_a_scheduler_timesteps_are_planned_as_even_and_the_plan_says_so() -> None:
    stack = GuidanceStack()
    stack.add_guidance("pag", scale=3.0, adaptive_scale=0.005)
    assert [len(step.extra) for step in stack.explain_guidance(4).steps] == [1, 1, 1, 0]  # t = 1000, 750, 500, 250
    assert "GuidanceStack with a scheduler of even timesteps" in str(stack.explain_guidance(4))


def test_what_a_plan_does_not_know_is_refused() -> None:
    with pytest.raises(ParameterError, match="a plan takes no guidance_scale; it takes: scheduler"):
        GuidanceStack("pag").explain_guidance(3, guidance_scale=2.0)


def test_outside_its_window_nothing_is_computed_and_the_next_run_begins_anew(counted: list[int]) -> None:
    stack = GuidanceStack()
    stack.add_guidance("cfg", stop=0.5)
    first = with_guider("sdxl", stack)
    assert counted == [1, 1, 1, 1, 1]
    assert stack.num_conditions == 2, "the next run's encoder must make negative embeddings"
    assert torch.equal(with_guider("sdxl", stack), first)


def test_switched_off_it_does_nothing() -> None:
    # On SD3: the modular SDXL pipeline enables its guider by itself, whatever it was.
    stack = GuidanceStack("cfg", "pag", enabled=False)
    assert torch.equal(with_guider("sd3", stack), with_guider("sd3", GuidanceStack()))


# -- undo --------------------------------------------------------------------------------------------------------------
def test_after_a_run_the_denoiser_is_as_it_was() -> None:
    before = fingerprint(stock("sdxl").unet)
    with_guider("sdxl", GuidanceStack("cfg", "pag", "slg"))
    assert fingerprint(stock("sdxl").unet) == before


def test_an_exception_inside_a_perturbed_pass_leaves_nothing_behind() -> None:
    pipe, stack = stock("sdxl"), GuidanceStack("pag")
    before, modular = fingerprint(pipe.unet), modular_twin(pipe, stack)
    expected = run_modular(modular, CASES["sdxl"])

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    hook = pipe.unet.up_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_modular(modular, CASES["sdxl"])
    hook.remove()
    assert fingerprint(pipe.unet) == before
    assert torch.equal(run_modular(modular, CASES["sdxl"]), expected)


def test_an_exception_elsewhere_is_undone_by_close_or_by_the_next_run() -> None:
    pipe, stack = stock("sdxl"), GuidanceStack("pag")
    before = fingerprint(pipe.unet)
    stack.set_state(0, 3, torch.tensor(999))
    stack.prepare_models(pipe.unet)
    stack.close()
    assert fingerprint(pipe.unet) == before


# -- attaching ---------------------------------------------------------------------------------------------------------
class Edits(Guidance):
    name = "edits"

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        return sample


@pytest.mark.parametrize(
    ("guidance", "parameters", "message"),
    [
        ("cfg", {"negative_prompt": "blurry"}, "cfg needs a text encoder.*negative_prompt"),
        ("seg", {"sigma_max": 5.0}, "seg needs the noise level.*start and stop"),
        ("cfg_pp", {}, "cfg_pp needs the noise level"),
        (Edits(), {}, "edits needs the sample after the scheduler.*trimtab.guide"),
    ],
)
def test_what_a_guider_cannot_do_is_refused_when_attached(guidance: Any, parameters: Any, message: str) -> None:
    stack = GuidanceStack("pag")
    with pytest.raises(UnsupportedPipelineError, match=message):
        stack.add_guidance(guidance, **parameters)
    assert list(stack.guidances) == ["pag"]


def test_attaching_and_removing_is_as_on_a_pipeline() -> None:
    stack = GuidanceStack("cfg")
    with pytest.raises(ConflictError):
        stack.add_guidance(guiders.ClassifierFreeGuidance())
    stack.remove_guidance("cfg")
    assert not stack.guidances and stack.num_conditions == 1


def test_its_configuration_is_the_recipe_of_what_is_attached() -> None:
    stack = GuidanceStack("cfg")
    stack.add_guidance("pag", name="structure", scale=2.0)
    stack.guidances["cfg"].scale = 6.0
    spec = ComponentSpec.from_component("guider", stack)
    for twin in (GuidanceStack.from_config(json.loads(stack.to_json_string())), spec.create()):
        assert dict(twin.guidances) == dict(stack.guidances)


def test_it_is_saved_and_loaded_as_any_guider(tmp_path: Any) -> None:
    GuidanceStack("cfg", "pag").save_pretrained(tmp_path)
    assert list(GuidanceStack.from_pretrained(tmp_path).guidances) == ["cfg", "pag"]
