"""What a user does between two steps of a guided run: change the latents, break off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fingerprint import of_pipeline
from zoo import CASES, run

import trimtab

NAMES = ["sd15", "flux", "wan"]


def halve(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * (0.5 if index == 0 else 1.0)}


def break_off(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = index == 0
    return tensors


@pytest.mark.parametrize("callback", [halve, break_off])
@pytest.mark.parametrize("name", NAMES)
def test_a_callback_acts_as_on_the_stock_pipeline(name: str, callback: Any) -> None:
    pipe, case = CASES[name].build(), CASES[name]
    plain = run(pipe, case)
    stock = run(pipe, case, callback_on_step_end=callback)
    trimtab.guide(pipe)
    frame = of_pipeline(pipe, values=False)
    assert not torch.equal(stock, plain)
    for scale in (0.0, 2.0):
        with pipe.guidance("pag", scale=scale):
            changed = run(pipe, case, callback_on_step_end=callback)
        assert torch.isfinite(changed).all()
        assert torch.equal(changed, stock) == (scale == 0)
    assert of_pipeline(pipe, values=False) == frame
    assert torch.equal(run(pipe, case, callback_on_step_end=callback), stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_interrupted_has_the_steps_before_it(name: str) -> None:
    """`_interrupt` leaves the remaining steps out, and the next run is a whole one."""
    pipe, case, seen = trimtab.guide(CASES[name].build()), CASES[name], []

    def watch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return tensors

    with pipe.guidance("pag", scale=2.0):
        run(pipe, case, callback_on_step_end=watch)
        whole = pipe.last_guided_run.evaluations
        assert torch.equal(run(pipe, case, callback_on_step_end=break_off), seen[0])
        assert pipe.last_guided_run.evaluations == whole // 3
        again = run(pipe, case)
        assert torch.equal(again, run(pipe, case)) and pipe.last_guided_run.evaluations == whole
