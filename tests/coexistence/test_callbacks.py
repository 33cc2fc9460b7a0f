"""What a user does between two steps of a guided run: change latents, break off, copy the pipeline, call another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from fingerprint import of_pipeline
from zoo import CASES, run

import trimtab
from trimtab.pipelines.guided import stock_class

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


def sibling(pipe: Any) -> Any:
    """A stock pipeline over the same components, but for the scheduler, whose place in the schedule a run needs."""
    other = stock_class(type(pipe)).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("attached", [None, "seg"])
@pytest.mark.parametrize("name", NAMES)
def test_another_pipeline_over_the_same_denoiser_runs_as_ever_and_the_run_goes_on(name: str, attached: Any) -> None:
    """Stock, or guided by something else; what it computes is not counted."""
    pipe, case = trimtab.guide(CASES[name].build()), CASES[name]
    other: Any = sibling(pipe)
    if attached is not None:
        trimtab.guide(other).add_guidance(attached)
    expected, within = run(other, case), []

    def visit(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        within.append(run(other, case))
        return {}

    pipe.add_guidance("pag", scale=2.0)
    guided, alone = run(pipe, case), pipe.last_guided_run
    assert torch.equal(run(pipe, case, callback_on_step_end=visit), guided)
    assert pipe.last_guided_run == alone
    assert len(within) == 3 and all(torch.equal(one, expected) for one in within)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_made_within_a_run_has_nothing_of_the_run_in_it(name: str, copied: str) -> None:
    pipe, case, twins = trimtab.guide(CASES[name].build()), CASES[name], []
    stock = run(pipe, case)
    clean = of_pipeline(COPIES[copied](pipe), values=False, identity=False)

    def take(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            twins.append(COPIES[copied](pipe))
        return {}

    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, case)
    with pipe.trace_guidance():
        assert torch.equal(run(pipe, case, callback_on_step_end=take), guided)
    assert of_pipeline(twins[0], values=False, identity=False).keys() == clean.keys()
    for one in (twins[0], pipe, twins[0]):
        assert torch.equal(run(one, case), guided)
        with one.trace_guidance() as traces:
            run(one, case)
        assert len(traces) == 1
    twins[0].clear_guidance()
    assert torch.equal(run(twins[0], case), stock)


class Halving(PipelineCallback):
    """A callback that is an object, and says itself which tensors it wants."""

    tensor_inputs = ["latents"]  # noqa: RUF012  Diffusers reads a list here, from the class

    def callback_fn(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return halve(pipe, index, timestep, tensors)


def test_a_callback_may_be_an_object_of_diffusers() -> None:
    pipe, case = trimtab.guide(CASES["sd15"].build()), CASES["sd15"]
    pipe.add_guidance("pag", scale=2.0)
    expected = run(pipe, case, callback_on_step_end=halve)
    assert torch.equal(run(pipe, case, callback_on_step_end=Halving()), expected)
