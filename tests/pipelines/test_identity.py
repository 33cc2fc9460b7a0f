"""Without guidance the stock pipeline, bit for bit; afterwards every object as a stock run leaves it, on every path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from failing import Boom, Failing, FailingThroughTheDenoiser, fails
from fingerprint import of_pipeline
from torch import nn
from zoo import CASES, Case, run

import trimtab

NAMES = ["sd15", "sdxl", "sd3", "pixart", "dit", "ddpm", "flux", "wan", "qwenimage", "ltx_image2video"]
HOOKS = ["setup", "branches", "delta", "project", "guide_x0", "loss", "after_step", "teardown"]
SHORT = {"num_inference_steps": 2}


class Known(NamedTuple):
    """A pipeline after a stock run, what that gave, and what every object was like."""

    pipe: Any
    case: Case
    output: torch.Tensor
    objects: dict[str, str]
    frame: dict[str, str]


def known(name: str) -> Known:
    found = _known(name)
    found.pipe.clear_guidance()
    return found


@functools.lru_cache(maxsize=1)
def _known(name: str) -> Known:
    case = CASES[name]
    pipe = case.build()
    output = run(pipe, case, **SHORT)
    trimtab.guide(pipe)
    return Known(pipe, case, output, of_pipeline(pipe), of_pipeline(pipe, values=False))


def check_as_stock(known: Known) -> None:
    """The frame (classes, hooks, functions, attributes) at once; values as well after another stock run."""
    known.pipe.clear_guidance()
    assert of_pipeline(known.pipe, values=False) == known.frame
    assert torch.equal(run(known.pipe, known.case, **SHORT), known.output)
    assert of_pipeline(known.pipe) == known.objects


@pytest.mark.parametrize("name", NAMES)
def test_without_guidance_it_is_the_stock_pipeline(name: str) -> None:
    pipe, case, output, *_ = known(name)
    assert torch.equal(run(pipe, case, **SHORT), output)

    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, case, **SHORT)
    assert not torch.equal(guided, output)
    pipe.remove_guidance("pag")
    assert torch.equal(run(pipe, case, **SHORT), output)

    with pipe.guidance("pag", scale=2.0):
        assert torch.equal(run(pipe, case, **SHORT), guided)
    check_as_stock(known(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_pipeline_is_left_by_a_guided_run_as_by_a_stock_run(name: str) -> None:
    case = CASES[name]
    stock, guided = case.build(), case.build()
    run(stock, case, **SHORT)
    trimtab.guide(guided).add_guidance("pag", scale=2.0)
    run(guided, case, **SHORT)
    assert of_pipeline(guided, values=False, identity=False) == of_pipeline(stock, values=False, identity=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_in_a_hook_or_a_branch_leaves_nothing_behind(name: str) -> None:
    pipe, case, _, _, frame = known(name)
    for where in (*HOOKS, "attention"):
        pipe.add_guidance(Failing(), name="before")
        pipe.add_guidance(Failing(where=where), name="failing")
        pipe.add_guidance(Failing(), name="behind")
        Failing.log.clear()
        with fails():
            run(pipe, case, **SHORT)
        assert Failing.log.count("teardown") == Failing.log.count("setup") == (2 if where == "setup" else 3), where
        pipe.clear_guidance()
        assert of_pipeline(pipe, values=False) == frame, where
    check_as_stock(known(name))


@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("where", ["attention", "loss", "after_step", ""])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_an_exception_leaves_nothing_behind_however_rows_are_computed(name: str, where: str, rows: str) -> None:
    pipe, case, *_ = known(name)
    pipe.guidance_rows = rows
    pipe.add_guidance(FailingThroughTheDenoiser(where=where))
    try:
        if where:
            with fails():
                run(pipe, case, **SHORT)
        else:
            run(pipe, case, **SHORT)
    finally:
        del pipe.guidance_rows
    check_as_stock(known(name))


class Fuse:
    """Lets a component fail at its second call once it is armed; it stays in place for the stock run as well."""

    def __init__(self) -> None:
        self.left: int | None = None

    def burn(self, *_: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise Boom("component")


def fused_scheduler(pipe: Any, case: Case, fuse: Fuse) -> None:
    stock = type(pipe.scheduler)

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        fuse.burn()
        return stock.step(self, *args, **kwargs)

    pipe.scheduler.__class__ = type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})


def fused_denoiser(pipe: Any, case: Case, fuse: Fuse) -> None:
    denoiser: nn.Module = getattr(pipe, case.denoiser)
    inner = list(denoiser.children())[-1]
    inner.register_forward_pre_hook(fuse.burn)


@pytest.mark.parametrize("fit", [fused_scheduler, fused_denoiser])
@pytest.mark.parametrize("name", NAMES)
def test_an_exception_in_a_component_leaves_nothing_behind(name: str, fit: Callable[..., None]) -> None:
    case = CASES[name]
    pipe, fuse = case.build(), Fuse()
    fit(pipe, case, fuse)
    output = run(pipe, case, **SHORT)
    trimtab.guide(pipe)
    before = Known(pipe, case, output, of_pipeline(pipe), of_pipeline(pipe, values=False))
    pipe.add_guidance("pag", scale=2.0)
    guided = run(pipe, case, **SHORT)
    pipe.add_guidance(Failing())
    Failing.log.clear()
    fuse.left = 2
    with fails():
        run(pipe, case, **SHORT)
    assert Failing.log == ["setup", "teardown"]
    pipe.remove_guidance("test.failing")
    assert torch.equal(run(pipe, case, **SHORT), guided)
    check_as_stock(before)


def test_an_interrupt_leaves_nothing_behind() -> None:
    pipe, case, *_ = known("sd15")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    pipe.add_guidance(Failing())
    with pytest.raises(KeyboardInterrupt):
        run(pipe, case, callback_on_step_end=interrupt, **SHORT)
    check_as_stock(known("sd15"))


def test_what_somebody_else_put_in_place_meanwhile_is_not_undone() -> None:
    pipe, case, *_ = known("sd15")
    theirs = lambda *args, **kwargs: None  # noqa: E731

    def replace(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.encode_prompt = theirs
        return tensors

    pipe.add_guidance("pag")
    run(pipe, case, callback_on_step_end=replace, **SHORT)
    assert pipe.__dict__.pop("encode_prompt") is theirs
    check_as_stock(known("sd15"))


def test_the_private_attribute_that_calls_go_through_is_there() -> None:
    """`nn.Module.__call__` looks at `_compiled_call_impl` first; `module.compile()` sets it, on the instance."""
    module = nn.Linear(2, 2)
    assert "_compiled_call_impl" in vars(nn.Module) and nn.Module._compiled_call_impl is None
    module.__dict__["_compiled_call_impl"] = lambda value: "taken"
    assert module(torch.zeros(1, 2)) == "taken"
    del module.__dict__["_compiled_call_impl"]
    assert module(torch.zeros(1, 2)).shape == (1, 2)


@dataclass
class Misshapen(trimtab.Guidance):
    """Returns one number an image where a whole tensor is needed."""

    hook: str = trimtab.parameter("delta", "Which hook does.", choices=("delta", "project", "after_step"))

    def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> torch.Tensor | None:
        return step.own.mean(dim=(1, 2, 3)) if self.hook == "delta" else None

    def project(self, step: trimtab.Step, prediction: torch.Tensor, predictions: trimtab.Predictions) -> torch.Tensor:
        return prediction[:, :1] if self.hook == "project" else prediction

    def after_step(self, step: trimtab.Step, sample: torch.Tensor) -> torch.Tensor:
        return sample[:0] if self.hook == "after_step" else sample


@pytest.mark.parametrize("hook", ["delta", "project", "after_step"])
def test_a_wrong_shape_is_an_error_and_does_not_broadcast(hook: str) -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance(Misshapen(hook=hook), name="misshapen")
    with pytest.raises(
        trimtab.GuidanceRuntimeError, match=r"it returned shape \(.*needed: a tensor of shape"
    ) as caught:
        run(pipe, CASES["sd15"])
    assert caught.value.__notes__ == [f"guidance 'misshapen', hook {hook}, step 0 of 3"]
