"""What is remembered of the prompts of a run."""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from recorder import recorded
from zoo import CASES, run
from zoo.others import OTHERS

import trimtab
from trimtab.guidance.branch import COND, UNCOND, Branch, Prompt
from trimtab.guidance.errors import UnsupportedPipelineError
from trimtab.pipelines.conditions import Conditions


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_no_embedding_is_kept_that_the_pipeline_has_let_go_of(name: str) -> None:
    """It joins both prompts and keeps the result; the rows of that are remembered, and prompts are made from them."""
    pipe, case = trimtab.guide(CASES[name].build()), CASES[name]
    expected = run(pipe, case, guidance_scale=7.0, negative_prompt="blurry")
    encode, kept = pipe.encode_prompt, []

    @functools.wraps(encode)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        kept.append(weakref.ref(result[0]))
        return result

    def check(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert kept[0]() is None
        return tensors

    pipe.encode_prompt = watched
    pipe.add_guidance("cfg", scale=7.0, negative_prompt="blurry")
    result = run(pipe, case, negative_prompt="sharp", callback_on_step_end=check)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert kept


def test_rows_of_a_call_before_any_prompt_is_encoded_have_no_roles_yet() -> None:
    """As of unCLIP's prior, and where `encode_prompt` returns nothing that is called a prompt (Stable Audio)."""
    pipe: Any = CASES["sd15"].build()
    with ExitStack() as stack:
        conditions = Conditions(pipe, {}, stack)
        assert conditions.roles(pipe.unet, {"encoder_hidden_states": torch.zeros(2, 4, 8)}, 2) is None


@pytest.mark.parametrize(
    "prompts",
    [
        {"prompt": "a red fox", "negative_prompt": "blurry"},
        {"prompt": ["a red fox", "a fox"], "negative_prompt": ["blurry", "sharps"]},
        {"prompt": ["a red fox", "two boats"], "negative_prompt": ["blurry and dull", "dark"]},
    ],
)
def test_a_further_prompt_has_the_masks_that_its_own_length_asks_for(prompts: dict[str, Any]) -> None:
    """Qwen-Image 2.1 lengthens one mask by the image's tokens, and has another only for texts of several lengths."""
    case = OTHERS["QwenImage21Pipeline"]
    own = replace(case, call={**case.call, **prompts, "use_kv_cache": False})
    pipe = trimtab.guide(own.build())
    expected = own.run(pipe)
    with pipe.guidance("cfg", scale=own.call["true_cfg_scale"]):
        guided = replace(own, call={**own.call, "true_cfg_scale": 1.0}).run(pipe)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5)


@dataclass
class Same(trimtab.Guidance):
    """The prediction of a further prompt that is the negative one is the pipeline's own."""

    def branches(self, step: trimtab.Step) -> list[Branch]:
        return [COND, UNCOND, Branch(Prompt("blurry"))]

    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> None:
        assert not torch.allclose(predictions[COND], predictions[UNCOND], atol=1e-4)
        torch.testing.assert_close(predictions[Branch(Prompt("blurry"))], predictions[UNCOND], rtol=0, atol=1e-5)


def test_prompts_of_several_lengths_have_a_mask_and_a_further_one_beside_them_has_none() -> None:
    case, call = CASES["qwenimage"], {"prompt": ["a red fox", "a fox"], "negative_prompt": ["blurry", "blurry"]}
    pipe = trimtab.guide(case.build())
    with pipe.guidance(Same()):
        run(pipe, case, **call)
    assert pipe.last_guided_run.evaluations == 3 * 3


def test_another_text_takes_the_place_of_the_prompt_between_the_marks_of_its_pictures() -> None:
    case = OTHERS["JoyImageEditPlusPipeline"]
    pipe = case.build()
    record = recorded(pipe, "transformer")
    case.run(pipe)
    uncond, cond = record.steps[0].forwards[0].output.split(1)
    trimtab.guide(pipe).add_guidance("cfg", scale=3.0, negative_prompt="blurry")
    record.steps.clear()
    replace(case, call={**case.call, "negative_prompt": None, "guidance_scale": 1.0}).run(pipe)
    for forward, expected in zip(record.steps[0].forwards, (cond, uncond), strict=True):
        torch.testing.assert_close(forward.output, expected, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedPipelineError, match="where the prompt 'e' lies in"):
        replace(case, call={**case.call, "prompt": "e", "guidance_scale": 1.0}).run(pipe)
