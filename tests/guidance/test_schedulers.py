"""Every scheduler of Diffusers is either covered or refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
)

from trimtab.guidance.errors import UnsupportedSchedulerError
from trimtab.guidance.noise import noise_algebra
from trimtab.guidance.schedulers import REFUSED, SUPPORTED

from .gaussian import prepared
from .scheduler_cases import CASES


def exported() -> set[str]:
    names = {*dir(diffusers), *dir(diffusers.schedulers), "ScoreSdeVpScheduler"}
    return {name for name in names if name.endswith("Scheduler") and isinstance(scheduler_class(name), type)}


def scheduler_class(name: str) -> Any:
    return getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)


def test_every_exported_scheduler_is_covered_or_refused() -> None:
    assert exported() == SUPPORTED.keys() | REFUSED.keys()
    assert not SUPPORTED.keys() & REFUSED.keys()


def test_every_covered_scheduler_is_tested() -> None:
    assert {case.name for case in CASES} == SUPPORTED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_reason_and_remedy(name: str) -> None:
    owner = scheduler_class(name)
    with pytest.raises(UnsupportedSchedulerError, match=rf"{name} cannot be guided: .*(use|guide|no other scheduler)"):
        noise_algebra(owner.__new__(owner))


def test_an_unknown_scheduler_is_refused_with_what_works_instead() -> None:
    class Homemade(SchedulerMixin):
        pass

    with pytest.raises(UnsupportedSchedulerError, match=r"Homemade cannot be guided.*DDIMScheduler"):
        noise_algebra(Homemade())


def test_a_subclass_of_the_same_name_is_its_diffusers_class() -> None:
    scheduler = prepared(EulerDiscreteScheduler())
    stock = type(scheduler)
    guided = type(stock.__name__, (stock,), {"__module__": stock.__module__})
    renamed = type("Mine", (stock,), {"__module__": "mine"})
    for owner in (guided, renamed):
        scheduler.__class__ = owner
        assert noise_algebra(scheduler).levels() == noise_algebra(prepared(stock())).levels()


@pytest.mark.parametrize(
    ("owner", "config", "message"),
    [
        (
            DDIMScheduler,
            {"prediction_type": "flow_prediction"},
            "allowed: epsilon, original_sample, sample, v_prediction",
        ),
        (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, "with use_flow_sigmas=False"),
        (
            DPMSolverMultistepScheduler,
            {"prediction_type": "v_prediction", "use_flow_sigmas": True},
            "with use_flow_sigmas=True .*allowed: epsilon, flow_prediction, sample",
        ),
        (EDMEulerScheduler, {"prediction_type": "sample"}, "allowed: epsilon, v_prediction"),
        (FlowMatchLCMScheduler, {"invert_sigmas": True}, "invert_sigmas=True"),
        (
            FlowMatchEulerDiscreteScheduler,
            {"invert_sigmas": True, "stochastic_sampling": True},
            "or stochastic_sampling=False",
        ),
    ],
)
def test_a_configuration_without_a_defined_clean_estimate_is_refused(
    owner: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=rf"{owner.__name__}: .*{message}"):
        noise_algebra(owner(**config))
