"""A guidable pipeline is the same pipeline, and guidances come and go."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import StableDiffusionPipeline
from zoo import CASES, run

import trimtab
from trimtab import ConflictError, Guidance, ParameterError, Predictions, Step, UnknownGuidanceError, parameter
from trimtab.guidance.errors import PluginError
from trimtab.guidance.plugins.pag import PAG
from trimtab.pipelines.guided import GuidedMixin, stock_class

CASE = CASES["sd15"]


@pytest.fixture
def pipe() -> Any:
    return trimtab.guide(CASE.build())


@dataclass
class Halve(Guidance):
    """Halves the prediction; a later phase than a delta."""

    name: ClassVar[str] = "test.halve"

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        return prediction / 2


@dataclass
class Shift(Guidance):
    """Adds a constant before it is halved."""

    name: ClassVar[str] = "test.shift"
    before: ClassVar[tuple[str, ...]] = ("test.halve",)

    by: float = parameter(1.0, "How much.")

    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        return prediction + self.by


# -- the same pipeline -------------------------------------------------------------------------------------------------
def test_guide_returns_the_same_object_and_may_be_called_twice() -> None:
    stock = CASE.build()
    assert trimtab.guide(stock) is stock and trimtab.guide(stock) is stock
    assert isinstance(stock, StableDiffusionPipeline) and isinstance(stock, GuidedMixin)
    assert stock_class(type(stock)) is StableDiffusionPipeline
    assert type(trimtab.guide(CASE.build())) is type(stock)


def test_name_module_and_signature_are_those_of_the_stock_class(pipe: Any) -> None:
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(pipe), attribute) == getattr(StableDiffusionPipeline, attribute)
    assert inspect.signature(pipe.__call__) == inspect.signature(CASE.build().__call__)
    assert pipe.__call__.__doc__ == StableDiffusionPipeline.__call__.__doc__


@pytest.mark.parametrize("call", [{"prompt": None}, {"prompt": "a fox", "prompt_embeds": torch.zeros(1)}])
def test_a_wrong_argument_is_the_error_that_the_stock_call_gives(pipe: Any, call: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as stock:
        pipe(**call)
    pipe.add_guidance("pag")
    with pytest.raises(ValueError) as guided:
        pipe(**call)
    assert str(guided.value) == str(stock.value)


# -- attaching ---------------------------------------------------------------------------------------------------------
def test_a_guidance_is_attached_by_name_or_instance_and_its_handle_steers_it(pipe: Any) -> None:
    handle = pipe.add_guidance("pag", scale=2.0)
    assert handle is pipe.guidances["pag"] and handle.scale == 2.0
    two = run(pipe, CASE)
    handle.scale = 4
    four = run(pipe, CASE)
    assert not torch.equal(two, four)
    with pytest.raises(ParameterError, match=r"pag: scale=-1 is out of range; allowed: >= 0"):
        handle.scale = -1
    assert torch.equal(run(pipe, CASE), four)
    pipe.remove_guidance("pag")
    assert pipe.add_guidance(PAG(scale=2.0), name="again") is pipe.guidances["again"]
    assert torch.equal(run(pipe, CASE), two)


def test_an_instance_keeps_the_contract_as_a_plug_in_does(pipe: Any) -> None:
    class Later(PAG):
        api_version = "9.0"

    class Misspelt(PAG):
        # The step is missing, which is what is to be noticed.
        def guide_x0(self, x0: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x0

    for cls, message in ((Later, "9.0"), (Misspelt, "guide_x0")):
        with pytest.raises(PluginError, match=message):
            pipe.add_guidance(cls())
    assert not pipe.guidances


def test_scale_zero_and_an_empty_window_are_no_guidance(pipe: Any) -> None:
    stock = run(pipe, CASE)
    handle = pipe.add_guidance("pag", scale=0.0)
    assert torch.equal(run(pipe, CASE), stock)
    handle.scale, handle.start, handle.stop = 3.0, 0.5, 0.5
    assert torch.equal(run(pipe, CASE), stock)
    assert pipe.last_guided_run.evaluations == 6


def test_the_mapping_is_ordered_and_read_only(pipe: Any) -> None:
    pipe.add_guidance(Halve())
    pipe.add_guidance("pag")
    pipe.add_guidance(Shift())
    assert list(pipe.guidances) == ["pag", "test.shift", "test.halve"]
    with pytest.raises(TypeError):
        pipe.guidances["pag"] = Halve()
    with pytest.raises(TypeError):
        del pipe.guidances["pag"]


def test_before_and_after_decide_the_order_in_which_predictions_are_reshaped(pipe: Any) -> None:
    pipe.add_guidance(Halve())
    pipe.add_guidance(Shift())
    declared = run(pipe, CASE)
    pipe.clear_guidance()
    pipe.add_guidance(Shift())
    pipe.add_guidance(Halve())
    assert torch.equal(run(pipe, CASE), declared)


def test_two_guidances_of_one_plug_in_have_names_of_their_own(pipe: Any) -> None:
    pipe.add_guidance("pag", layers="mid", name="middle")
    pipe.add_guidance("pag", layers="up", name="end")
    both = run(pipe, CASE)
    pipe.remove_guidance("end")
    assert not torch.equal(run(pipe, CASE), both)
    with pytest.raises(
        UnknownGuidanceError, match=r"No guidance named 'midle'.* Did you mean 'middle'\? Attached: middle"
    ):
        pipe.remove_guidance("midle")


def test_an_exclusive_slot_is_claimed_once(pipe: Any) -> None:
    pipe.add_guidance("cfg")
    with pytest.raises(ConflictError, match=r"slot 'cfg'.*'cfg' = cfg \(trimtab .*'second' = cfg"):
        pipe.add_guidance("cfg", name="second")
    assert list(pipe.guidances) == ["cfg"]


def test_a_scoped_guidance_ends_with_its_block_and_takes_none_with_it(pipe: Any) -> None:
    shared = PAG(scale=2.0)
    pipe.add_guidance(shared, name="kept")
    with pipe.guidance(shared, name="scoped") as handle:
        assert handle is shared and list(pipe.guidances) == ["kept", "scoped"]
    assert list(pipe.guidances) == ["kept"]
    with pytest.raises(RuntimeError, match="inside"), pipe.guidance("cfg"):
        raise RuntimeError("inside")
    assert list(pipe.guidances) == ["kept"]
    with pipe.guidance("cfg"):
        pipe.clear_guidance()
    assert not pipe.guidances


# -- results -----------------------------------------------------------------------------------------------------------
PAIR = [("pag", "pag", 2.0), ("cfg", "cfg", 3.0)]


@pytest.mark.parametrize(
    ("name", "terms"),
    [*((name, PAIR) for name in ("sd15", "sd3", "dit", "wan")), ("sd15", [*PAIR, ("second", "pag", 0.5)])],
)
def test_deltas_commute(name: str, terms: list[tuple[str, str, float]]) -> None:
    """Two of them bit for bit, as two numbers add in either order; three to rounding."""
    case = CASES[name]
    pipe = trimtab.guide(case.build())
    outputs = []
    for order in (terms, terms[::-1]):
        pipe.clear_guidance()
        for attached, plugin, scale in order:
            pipe.add_guidance(plugin, name=attached, scale=scale)
        outputs.append(run(pipe, case))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0 if len(terms) == 2 else 1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_same_seed_is_the_same_picture(name: str) -> None:
    case = CASES[name]
    pipe = trimtab.guide(case.build())
    pipe.add_guidance("pag", scale=2.0)
    assert torch.equal(run(pipe, case, seed=3), run(pipe, case, seed=3))
    assert not torch.equal(run(pipe, case, seed=3), run(pipe, case, seed=4))
