"""Records what really reaches a denoiser and a scheduler, independently of the engine: from underneath it."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin


@dataclass
class Forward:
    """One call of the denoiser's own `forward`: its arguments and its raw output, in rows."""

    arguments: dict[str, Any]
    output: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.output)


@dataclass
class SchedulerStep:
    """What the stock `step` received, and the denoiser's calls since the step before."""

    model_output: torch.Tensor
    timestep: Any
    sample: torch.Tensor
    scheduler: Any
    forwards: list[Forward] = field(default_factory=list)


@dataclass
class Record:
    """A run, step by step; `pending` are the denoiser's calls since the last step."""

    steps: list[SchedulerStep] = field(default_factory=list)
    pending: list[Forward] = field(default_factory=list)

    @property
    def forwards(self) -> list[Forward]:
        return [forward for step in self.steps for forward in step.forwards]


def rows_of(output: Any) -> torch.Tensor:
    """The prediction in what a denoiser returned; a list of images becomes one tensor."""
    if isinstance(output, torch.Tensor):
        return output
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


class Enough(Exception):
    """Ends a run of which the first steps are all that a test needs."""


def recorded(pipe: DiffusionPipeline, *denoisers: str, steps: int | None = None) -> Record:
    """Have every later run of `pipe` recorded; the stock classes and modules do the work as ever.

    With `steps`, `Enough` is raised once the scheduler has been given that many model outputs.
    """
    record = Record()
    pending = record.pending
    for name in denoisers:
        module = getattr(pipe, name)

        def forward(*args: Any, original: Any = module.forward, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(*args, **kwargs)
            output = original(*args, **kwargs)
            if output is None or (isinstance(output, tuple) and output[0] is None):
                return output  # it only fills a cache
            kept = {key: value.detach().clone() if isinstance(value, torch.Tensor) else value
                    for key, value in bound.arguments.items()}  # fmt: skip
            pending.append(Forward(kept, rows_of(output).detach().clone()))
            return output

        module.forward = functools.wraps(module.forward)(forward)
    for component in {**vars(pipe), **pipe.components}.values():
        if isinstance(component, SchedulerMixin):
            _record_steps(component, record, pending, steps)
    return record


def _record_steps(scheduler: Any, record: Record, pending: list[Forward], steps: int | None) -> None:
    stock = type(scheduler)

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock.step).bind(self, *args, **kwargs).arguments
        record.steps.append(
            SchedulerStep(
                given["model_output"].clone(), given["timestep"], given["sample"].clone(), self, pending.copy()
            )
        )
        pending.clear()
        if len(record.steps) == steps:
            raise Enough
        return stock.step(self, *args, **kwargs)

    scheduler.__class__ = type(stock.__name__, (stock,), {"step": step, "__module__": stock.__module__})
