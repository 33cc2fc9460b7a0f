"""What is remembered of the prompts of a run."""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from zoo import CASES, run

import trimtab
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
