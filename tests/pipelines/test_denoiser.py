"""What a denoiser cannot compute is refused by name, and nothing is left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
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


def test_another_prompt_is_kept_out_of_a_cache_of_the_prompt() -> None:
    """Qwen-Image 2.1 keeps keys and values of its prompt from its first step on."""

    @dataclass
    class Asking(trimtab.Guidance):
        def branches(self, step: trimtab.Step) -> list[Branch]:
            return [Branch(Prompt("a blue cat"))]

        def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> None:
            return None

    case = OTHERS["QwenImage21Pipeline"]
    pipe: Any = case.build()
    output = case.run(pipe)
    trimtab.guide(pipe)
    with pytest.raises(trimtab.TrimtabError, match="its kv_cache keeps"), pipe.guidance(Asking()):
        case.run(pipe)
    assert torch.equal(case.run(pipe), output)
