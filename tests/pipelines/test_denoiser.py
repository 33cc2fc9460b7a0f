"""What a denoiser cannot compute is refused by name, and nothing is left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from zoo import CASES, pag_twin, run
from zoo.others import OTHERS

import trimtab
from trimtab.guidance.branch import Branch, Prompt
from trimtab.guidance.errors import GuidanceRuntimeError, UnsupportedPipelineError


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_a_layer_that_takes_rows_apart_itself_is_refused(name: str) -> None:
    """Diffusers' own PAG pipelines do; without their perturbation they are guided like any other."""
    pipe = trimtab.guide(pag_twin(CASES[name].build()))
    pipe.add_guidance("pag", layers="mid" if name == "sd15" else "blocks.1")
    plain = run(CASES[name].build(), CASES[name])
    guided = run(pipe, CASES[name], pag_scale=0.0)
    assert not torch.equal(guided, plain)
    with pytest.raises(UnsupportedPipelineError, match="pag_scale=0"):
        run(pipe, CASES[name], pag_scale=3.0)
    # Diffusers' own processors, which it takes off at the end of a whole run only, are not left behind.
    assert torch.equal(run(pipe, CASES[name], pag_scale=0.0), guided)


def test_attention_that_is_no_dot_product_is_refused() -> None:
    case = CASES["sana_sprint"]
    pipe = trimtab.guide(case.build())
    plain = run(pipe, case)
    with pytest.raises((GuidanceRuntimeError, UnsupportedPipelineError)), pipe.guidance("pag"):
        run(pipe, case)
    assert torch.equal(run(pipe, case), plain)


@dataclass
class Asking(trimtab.Guidance):
    """For the prediction of another prompt."""

    def branches(self, step: trimtab.Step) -> list[Branch]:
        return [Branch(Prompt("a blue cat"))]

    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> None:
        return None


def test_another_prompt_is_kept_out_of_a_cache_of_the_prompt() -> None:
    """Qwen-Image 2.1 keeps keys and values of its prompt from its first step on."""

    case = OTHERS["QwenImage21Pipeline"]
    pipe: Any = case.build()
    output = case.run(pipe)
    trimtab.guide(pipe)
    with pytest.raises(trimtab.TrimtabError, match="its kv_cache keeps"), pipe.guidance(Asking()):
        case.run(pipe)
    assert torch.equal(case.run(pipe), output)


def test_another_prompt_may_read_a_cache_of_given_pictures() -> None:
    """GLM-Image hands its denoiser one in any case, without a picture as well."""
    case = OTHERS["GlmImagePipeline"]
    pipe: Any = case.build()
    output = case.run(pipe)
    trimtab.guide(pipe)
    with pipe.guidance(Asking()):
        assert torch.equal(case.run(pipe), output)
        own = 2 * len(pipe.scheduler.timesteps)
        assert pipe.last_guided_run.evaluations == own + len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("kind", ["function", "slots"])
def test_a_processor_without_attributes_that_is_set_in_mid_run_is_no_error(kind: str) -> None:
    case = CASES["sd15"]
    stock = AttnProcessor2_0()

    def plain(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    class Slots:
        __slots__ = ()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return stock(*args, **kwargs)

    def exchange(pipe: Any, *_: Any) -> dict[str, Any]:
        last = [module for module in pipe.unet.up_blocks.modules() if hasattr(module, "set_processor")][-1]
        last.set_processor(plain if kind == "function" else Slots())
        return {}

    pipe = trimtab.guide(case.build())
    with pipe.guidance("pag", layers="mid"):
        expected = run(pipe, case)
        assert torch.equal(run(pipe, case, callback_on_step_end=exchange), expected)
