"""Tracing: a run that writes down what each guidance changed, and how long it took.

A trace holds on to the guidances' hooks as a run holds on to a pipeline: until the run ends, and only where it was
asked for. An untraced run knows nothing of it.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.planner import extra_of
from ..guidance.run import Step
from ..guidance.trace import Change, Contribution, Trace, TracedStep, finite
from .interception import tap_method
from .observation import own_channels
from .run import GuidedRun

VARIABLE = "TRIMTAB_TRACE"
"""Environment variable: `1` writes a trace of each guided run into the folder `trimtab-trace`, a path into that one."""

AGAINST: dict[str, Callable[[Step, tuple[Any, ...]], torch.Tensor | None]] = {
    "delta": lambda step, given: step.own,
    "project": lambda step, given: step.own,
    "guide_x0": lambda step, given: given[0],
    "renoise": lambda step, given: given[0],
    "after_step": lambda step, given: given[0],
}
"""By hook, what the size and the direction of its change are measured against."""

logger = logging.getLogger("trimtab")
_numbers = itertools.count(1)


def is_traced(pipe: Any) -> bool:
    """Whether the next run of this pipeline is to be traced."""
    return "_trimtab_traces" in pipe.__dict__ or os.environ.get(VARIABLE, "") not in ("", "0")


class TracedRun(GuidedRun):
    """A guided run that leaves a `Trace`, also where it is broken off."""

    def _open(self) -> None:
        self.trace = Trace(type(self.pipe).__name__, type(self.schedulers[-1]).__name__)
        self._contributions: dict[str, dict[str, Contribution]] = {}
        self._since: float | None = None
        for name, guidance in self.guidances.items():
            self._hold(name, guidance)
        super()._open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if (traces := self.pipe.__dict__.get("_trimtab_traces")) is not None:
            traces.append(self.trace)
        if (folder := os.environ.get(VARIABLE, "")) not in ("", "0"):
            _write(self.trace, Path("trimtab-trace" if folder == "1" else folder))

    # -- hooks -----------------------------------------------------------------------------------------------------
    def _hold(self, name: str, guidance: Guidance) -> None:
        """Measure this guidance's hooks until the run ends."""

        def setup(original: Callable[..., Any], run: Any) -> None:
            begun = time.perf_counter()
            original(run)
            self.trace.setup[name] = time.perf_counter() - begun

        def loss(original: Callable[..., Any], step: Step, x0: torch.Tensor, *rest: Any) -> Any:
            begun = time.perf_counter()
            value = original(step, x0, *rest)
            seconds = _seconds_since(begun, value)
            mean = None if value is None else finite(float(value.detach().float().mean()))
            self._note(name, "loss", Contribution(None, mean, seconds))
            return value

        def changing(hook: str) -> Callable[..., Any]:
            def around(original: Callable[..., Any], step: Step, *given: Any) -> Any:
                begun = time.perf_counter()
                result = original(step, *given)
                seconds = _seconds_since(begun, result)
                if given and result is given[0]:
                    return result  # switched off
                against = AGAINST[hook](step, given)
                change = None
                if result is not None and against is not None and result.shape == against.shape:
                    change = Change.of(result if hook == "delta" else result - given[0], against)
                self._note(name, hook, Contribution(change, None, seconds))
                return result

            return around

        wrappers: dict[str, Callable[..., Any]] = {
            "setup": setup,
            "loss": loss,
            **{hook: changing(hook) for hook in AGAINST},
        }
        for hook, around in wrappers.items():
            if guidance.overrides(hook):
                tap_method(self.stack, guidance, hook, around)

    def _note(self, name: str, hook: str, contribution: Contribution) -> None:
        self._contributions.setdefault(name, {})[hook] = contribution

    # -- steps -----------------------------------------------------------------------------------------------------
    def _on_call(self, module: Any, original: Any, args: Any, kwargs: Any) -> Any:
        if self._since is None:
            self._since = time.perf_counter()
        return super()._on_call(module, original, args, kwargs)

    def _on_step(self, scheduler: Any, bound: inspect.BoundArguments, original: Any) -> Any:
        if self.forwards.inside:
            return super()._on_step(scheduler, bound, original)
        step = self.clocks.at_step(scheduler, bound.arguments["timestep"]).step()
        own, before = bound.arguments["model_output"], self.forwards.evaluations
        total: list[Change] = []

        def stepped(*args: Any, **kwargs: Any) -> Any:
            given, sample = bound.arguments["model_output"], bound.arguments["sample"]
            total.append(Change.between(own_channels(own, sample), own_channels(given, sample)))
            return original(*args, **kwargs)

        result = super()._on_step(scheduler, bound, stepped)
        acting, now = self.hooks.acting(step), time.perf_counter()
        asked = {name: len(extra_of(self.hooks.wanted({name: one}, step), self.own)) for name, one in acting.items()}
        contributions, self._contributions = self._contributions, {}
        self.trace.steps.append(TracedStep(
            step.index, step.timestep, finite(step.level.ratio), self.forwards.evaluations - before, asked,
            now - (self._since or now), total[0] if total else None, contributions,
        ))  # fmt: skip
        self._since = now
        return result


def _seconds_since(begun: float, result: Any) -> float:
    """Also of what a GPU has yet to do."""
    if isinstance(result, torch.Tensor) and result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - begun


def _write(trace: Trace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_numbers)}.json"
    trace.save(file)
    logger.warning("A trace is in %s; look at it with: trimtab trace %s", file, file)
