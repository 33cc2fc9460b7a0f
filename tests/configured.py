"""One check for every configuration of a pipeline that guidance must get along with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fingerprint import of_pipeline
from guided_runs import guided
from zoo import CASES, run

import trimtab

GUIDANCES: dict[str, dict[str, Any]] = {"pag": {"scale": 2.0}, "cfg": {"scale": 4.0}}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal to `tolerance` times the largest number expected; to the bit where that is 0."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def check_configured(
    name: str,
    configure: Callable[[Any], None],
    expected: Callable[[str, Mapping[str, Any]], torch.Tensor] | None = None,
    tolerance: float = 0.0,
    identity: bool = True,
    **call: Any,
) -> None:
    """A configured pipeline is the stock one, is guided as expected, and is left as a stock run leaves it.

    Args:
        name: in the zoo.
        configure: changes the pipeline before it is guidable, as a user would.
        expected: the result with a plug-in and its parameters; those of the plain configuration if not given.
        tolerance: of the guided results; 0 is to the bit.
        identity: whether a stock run leaves the very same objects; some put new hooks in the place of old ones.
    """
    case = CASES[name]
    pipe = case.build()
    configure(pipe)
    stock = run(pipe, case, **call)
    trimtab.guide(pipe)
    objects, frame = of_pipeline(pipe, identity=identity), of_pipeline(pipe, values=False, identity=identity)
    for plugin, parameters in GUIDANCES.items():
        with pipe.guidance(plugin, **parameters):
            plan = pipe.explain_guidance(**{**case.call, **call})
            result = run(pipe, case, **call)
        assert pipe.last_guided_run.evaluations == plan.evaluations
        assert not torch.equal(result, stock)
        close(result, expected(plugin, parameters) if expected else guided(name, plugin, parameters, **call), tolerance)
        assert of_pipeline(pipe, values=False, identity=identity) == frame
    assert torch.equal(run(pipe, case, **call), stock)
    assert of_pipeline(pipe, identity=identity) == objects
