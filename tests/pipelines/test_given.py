"""What a hook is given is for reading: what it must not do with it is an error that names it, not a silent loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from zoo import CASES, run

import trimtab
from trimtab import COND, UNCOND, Branch, Guidance, GuidanceRuntimeError, Predictions, Step

CASE = CASES["sd15"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return trimtab.guide(CASE.build())


@dataclass
class Clamping(Guidance):
    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return x0.clamp_(-0.2, 0.2)


@dataclass
class Subtracting(Guidance):
    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        return predictions[COND].sub_(predictions[UNCOND])


@dataclass
class Scaling(Guidance):
    def project(self, step: Step, prediction: torch.Tensor, predictions: Predictions) -> torch.Tensor:
        return prediction.mul_(0.9)


@dataclass
class Forgetting(Guidance):
    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor:
        return predictions[COND] - predictions[Branch(trimtab.Prompt("another"))]


@pytest.mark.parametrize(("guidance", "hook"), [
    (Clamping(), "guide_x0"), (Subtracting(), "delta"), (Scaling(), "project"),
])  # fmt: skip
def test_a_change_in_place_names_the_hook_and_the_remedy(pipe: Any, guidance: Guidance, hook: str) -> None:
    with (
        pipe.guidance(guidance, name="mine"),
        pytest.raises(
            GuidanceRuntimeError, match=rf"mine: {hook} changed in place .*x\.clamp\(-1, 1\) in place of x\.clamp_"
        ),
    ):
        run(pipe, CASE)


def test_a_prediction_that_was_not_asked_for_names_the_branch(pipe: Any) -> None:
    with (
        pipe.guidance(Forgetting(), name="mine"),
        pytest.raises(GuidanceRuntimeError, match=r"mine: delta reads the prediction of .*another.*branches\(step\)"),
    ):
        run(pipe, CASE)


def test_in_inference_mode_changes_are_not_counted(pipe: Any) -> None:
    with pipe.guidance("cfg", scale=3.0), torch.inference_mode():
        assert run(pipe, CASE).isfinite().all()
