"""The base class: parameters are guarded, a window decides when a guidance acts, hooks do nothing by default."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.guidance.base import Guidance
from trimtab.guidance.branch import COND, UNCOND, Branch, Predictions
from trimtab.guidance.errors import ParameterError
from trimtab.guidance.noise import Level
from trimtab.guidance.parameters import parameter
from trimtab.guidance.run import Step


@dataclass
class Tilt(Guidance):
    name: ClassVar[str] = "tilt"
    scale: float = parameter(1.0, "Strength.", ge=0)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND)

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return self.scale * (predictions[COND] - predictions[UNCOND])


def at(index: int, count: int = 10, alpha: float = 1.0, sigma: float = 1.0) -> Step:
    return Step(index=index, count=count, timestep=0.0, level=Level(alpha, sigma))


def test_parameters_are_its_own_and_the_window() -> None:
    assert Tilt(scale=2).parameters == {
        "start": 0.0, "stop": 1.0, "sigma_max": math.inf, "sigma_min": 0.0, "scale": 2.0
    }  # fmt: skip


def test_the_first_positional_argument_is_the_first_parameter_of_the_subclass() -> None:
    assert Tilt(0.5).scale == 0.5
    assert Tilt(0.5).start == 0.0


def test_a_value_is_checked_when_built_and_when_set() -> None:
    with pytest.raises(ParameterError, match=r"tilt: scale=-1 is out of range; allowed: >= 0"):
        Tilt(scale=-1)
    tilt = Tilt()
    with pytest.raises(ParameterError, match=r"scale='much' is a str, not float"):
        tilt.scale = "much"
    assert tilt.scale == 1.0


def test_a_misspelt_parameter_is_not_silently_created() -> None:
    with pytest.raises(ParameterError, match=r"tilt: no parameter 'scal'\. Did you mean 'scale'\? It takes: scale, "):
        Tilt().scal = 2.0


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"start=0\.8 lies after stop=0\.2; allowed: start <= stop"):
        Tilt(start=0.8, stop=0.2)
    with pytest.raises(ParameterError, match=r"sigma_min=2 lies after sigma_max=1"):
        Tilt(sigma_min=2, sigma_max=1)
    tilt = Tilt(stop=0.5)
    tilt.start = 0.9  # a value at a time must be settable; the pair is checked before a run
    with pytest.raises(ParameterError, match="start"):
        tilt.validate()


@pytest.mark.parametrize(
    ("start", "stop", "indices"),
    [(0.0, 1.0, range(10)), (0.0, 0.3, range(3)), (0.3, 0.6, range(3, 6)), (0.95, 1.0, ()), (0.5, 0.5, ())],
)
def test_windows_in_fractions_of_the_run_are_half_open(start: float, stop: float, indices: Sequence[int]) -> None:
    tilt = Tilt(start=start, stop=stop)
    assert [index for index in range(10) if tilt.acts(at(index))] == list(indices)


def test_adjacent_windows_share_no_step_and_leave_none_out() -> None:
    for count in range(1, 60):
        first, second = Tilt(stop=0.35), Tilt(start=0.35)
        assert all(first.acts(at(i, count)) != second.acts(at(i, count)) for i in range(count))


def test_windows_in_sigma_are_closed_and_measured_per_signal() -> None:
    tilt = Tilt(sigma_min=1.0, sigma_max=2.0)
    inside = {sigma: tilt.acts(at(0, alpha=0.5, sigma=sigma)) for sigma in (0.49, 0.5, 1.0, 1.01)}
    assert inside == {0.49: False, 0.5: True, 1.0: True, 1.01: False}


def test_by_default_a_window_holds_even_pure_noise() -> None:
    assert Tilt().acts(at(0, alpha=0.0, sigma=1.0))


def test_by_default_a_window_holds_a_level_that_nobody_knows() -> None:
    unknown = Step(0, 10, 0.0, Level(math.nan, math.nan))
    assert Guidance().acts(unknown) and not Guidance(sigma_min=0.1).acts(unknown)


def test_hooks_do_nothing_by_default() -> None:
    guidance, step, x = Guidance(), at(0), torch.randn(1, 3)
    assert guidance.branches(step) == ()
    assert guidance.delta(step, {}) is None
    assert guidance.loss(step, x) is None
    assert guidance.project(step, x, {}) is x
    assert guidance.guide_x0(step, x) is x
    assert guidance.after_step(step, x) is x


def test_overrides_tells_which_hooks_a_class_has() -> None:
    assert Tilt.overrides("delta")
    assert not Tilt.overrides("loss")
    assert not Guidance.overrides("delta")


def test_a_guidance_without_a_name_is_called_by_its_class() -> None:
    assert Guidance().label == "Guidance"
    assert Tilt().label == "tilt"


def test_copies_are_equal_and_independent() -> None:
    tilt = Tilt(scale=2.0, sigma_min=0.1)
    for twin in (copy.deepcopy(tilt), pickle.loads(pickle.dumps(tilt)), replace(tilt)):
        assert twin == tilt
        twin.scale = 3.0
        assert tilt.scale == 2.0
    with pytest.raises(ParameterError):
        replace(tilt, scale=-1.0)


def test_printed_it_is_one_line_whatever_it_holds() -> None:
    @dataclass
    class Holder(Guidance):
        """Holds anything."""

        held: Any = parameter(None, "Anything.")

    held = (torch.zeros(3, 64, 64), [Image.new("L", (8, 9))], {"net": torch.nn.ReLU()}, np.zeros((9, 8)), "a")
    assert repr(Holder(held=held, start=0.1)).endswith(
        "Holder(start=0.1, stop=1.0, sigma_max=inf, sigma_min=0.0, "
        "held=(<float32 tensor [3, 64, 64]>, [<L image 8x9>], {'net': <ReLU>}, <float64 array [9, 8]>, 'a'))"
    )
