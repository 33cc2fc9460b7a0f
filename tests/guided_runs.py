"""Runs of tiny pipelines with one plug-in attached, and what each plug-in must show on any of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from recorder import Record, recorded
from zoo import CASES, run

import trimtab


@functools.cache
def built(name: str) -> Any:
    """One guidable pipeline of a kind; nothing is left attached to it between tests."""
    return trimtab.guide(CASES[name].build())


def guided(name: str, plugin: str, parameters: dict[str, Any], rows: str = "auto", **call: Any) -> torch.Tensor:
    """The output with one plug-in attached; afterwards the pipeline is as before."""
    pipe = built(name)
    pipe.guidance_rows = rows
    try:
        with pipe.guidance(plugin, **parameters):
            return run(pipe, CASES[name], **call)
    finally:
        pipe.guidance_rows = "auto"


@functools.cache
def _stock(name: str) -> torch.Tensor:
    return run(built(name), CASES[name])


def stock(name: str, **call: Any) -> torch.Tensor:
    """The output with nothing attached."""
    return run(built(name), CASES[name], **call) if call else _stock(name)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def watched(name: str, plugin: str, parameters: dict[str, Any], **call: Any) -> Record:
    """What reached denoiser and scheduler in a guided run; the plan must have declared it."""
    pipe = CASES[name].build()
    record = recorded(pipe, CASES[name].denoiser)
    trimtab.guide(pipe).add_guidance(plugin, **parameters)
    plan = pipe.explain_guidance(**{**CASES[name].call, **call})
    run(pipe, CASES[name], **call)
    done = pipe.last_guided_run
    assert (done.evaluations, done.forward_calls) == (plan.evaluations, plan.calls)
    return record


def check_everywhere(name: str, plugin: str, parameters: dict[str, Any], off: dict[str, Any]) -> None:
    """It acts, is finite and the same however rows are computed; switched off it costs and does nothing."""
    outputs = [guided(name, plugin, parameters, rows) for rows in ("auto", "batched", "sequential")]
    assert torch.isfinite(outputs[0]).all()
    assert (outputs[0] - stock(name)).abs().max() > 1e-4 * stock(name).abs().max()
    # At its first level DDPM divides by alpha = 0.006, and with it enlarges the rounding.
    for other in outputs[1:]:
        close(other, outputs[0], 1e-4 if name == "ddpm" else 1e-5)
    assert torch.equal(guided(name, plugin, parameters | off), stock(name))
    case = CASES[name]
    assert built(name).last_guided_run.evaluations == 3 * case.rows * case.calls
    assert torch.equal(run(built(name), case), stock(name))
