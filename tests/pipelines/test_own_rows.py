"""What a pipeline computes by itself follows from its source and its call; where it does not, the plan says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import TextToVideoZeroPipeline, UnCLIPPipeline
from recorder import recorded
from zoo import CASES
from zoo.others import OTHERS

import trimtab
from trimtab.pipelines.own_rows import OwnRows, steps_scheduler
from trimtab.pipelines.written import UNKNOWN, WrittenCall

AT_LEAST = "at least so many"


@pytest.mark.parametrize(
    ("name", "call", "own"),
    [
        ("StableDiffusionPipelineSafe", {"sld_guidance_scale": 1.0}, 2),
        ("StableDiffusionPipelineSafe", {"guidance_scale": 1.0}, 1),
        ("CycleDiffusionPipeline", {"guidance_scale": 1.0}, 2),
        ("LEditsPPPipelineStableDiffusionXL", {"editing_prompt": "snow"}, 2),
        ("LEditsPPPipelineStableDiffusionXL", {"editing_prompt": None}, 1),
        ("StableDiffusionGLIGENTextImagePipeline", {"guidance_scale": 1.0}, 2),
        ("StableDiffusionPanoramaPipeline", {"guidance_scale": 1.0}, 1),
    ],
)
def test_rows_that_the_arguments_of_a_call_ask_for_are_declared(name: str, call: dict[str, Any], own: int) -> None:
    case = replace(OTHERS[name], call={**OTHERS[name].call, **call})
    pipe = case.build()
    record = recorded(pipe, *case.denoisers)
    trimtab.guide(pipe).add_guidance("pag", scale=3.0)
    plan = pipe.explain_guidance(**{"num_inference_steps": case.steps, **case.call})
    case.run(pipe)
    assert [len(step.own) for step in plan.steps] == [own] * len(record.steps)
    assert pipe.last_guided_run.evaluations == plan.evaluations == sum(forward.rows for forward in record.forwards)


@pytest.mark.parametrize(("length", "samples"), [(1, 3), (2, 2), (10, 10)])
def test_a_schedule_that_climbs_is_planned_with_its_jumps(length: int, samples: int) -> None:
    case = OTHERS["RePaintPipeline"]
    pipe = case.build()
    record = recorded(pipe, "unet")
    case = replace(case, call={**case.call, "jump_length": length, "jump_n_sample": samples})
    plan = trimtab.guide(pipe).explain_guidance(**case.call)
    case.run(pipe)
    assert [step.evaluations for step in plan.steps] == [1] * len(record.steps)


def test_where_each_view_is_a_step_the_plan_says_that_it_does_not_know_how_many() -> None:
    case = OTHERS["StableDiffusionPanoramaPipeline"]
    plan = trimtab.guide(case.build()).explain_guidance(**case.call)
    assert "at least so many: how often its call goes through noise levels again, only a run shows" in str(plan)


@pytest.mark.parametrize("name", ["sd15", "wan", "flux_true_cfg", "qwenimage", "animatediff", "ddpm", "cascade_prior"])
def test_a_call_that_steps_once_a_level_is_known_to(name: str) -> None:
    pipe = trimtab.guide(CASES[name].build())
    assert AT_LEAST not in str(pipe.explain_guidance(**CASES[name].call))


def test_the_stretches_of_a_video_are_counted_where_the_call_tells_them() -> None:
    case = CASES["skyreels_forcing"]
    pipe = trimtab.guide(case.build())
    assert AT_LEAST not in str(pipe.explain_guidance(**case.call))
    longer = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
    assert AT_LEAST in str(pipe.explain_guidance(**{**case.call, **longer}))


def test_a_prior_and_a_decoder_that_are_stepped_one_after_another_are_no_repetition() -> None:
    call = WrittenCall(UnCLIPPipeline, {}, lambda name: UNKNOWN)
    assert OwnRows(call, ["prior", "decoder"]).says_how_often_it_steps(lambda name: False)
    assert steps_scheduler(TextToVideoZeroPipeline, "backward_loop")
    assert not steps_scheduler(TextToVideoZeroPipeline, "encode_prompt")


class Switched:
    """A call whose parts depend on an argument."""

    def __call__(self, image: Any = None) -> Any:
        if image:
            self.done = 1
        else:
            self.undone = 2


@pytest.mark.parametrize(
    ("image", "reached"), [(None, [False, True]), ("a.png", [True, False]), (torch.ones(2), [None, None])]
)
def test_what_depends_on_the_truth_of_a_tensor_is_unknown(image: Any, reached: list[bool | None]) -> None:
    call = WrittenCall(Switched, {"image": image}, lambda name: UNKNOWN)
    places = [*call.assigned["self.done"], *call.assigned["self.undone"]]
    assert [call.reached(place) for place, _ in places] == reached
