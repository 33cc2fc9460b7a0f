"""The attached guidances within one run: their state, which of them act, and what each phase makes of a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..guidance.base import Guidance, Step
from ..guidance.branch import Branch, Predictions
from ..guidance.errors import GuidanceRuntimeError
from ..guidance.planner import wanted_branches
from .families import Family


class SetupView:
    """What one guidance sees of a run: see `guidance.base.Run`."""

    def __init__(self, name: str, run: Any, dry: bool) -> None:
        self.state = SimpleNamespace()
        self.exit_stack: ExitStack = run.stack
        self.dry = dry
        self._name = name
        self._families: Sequence[Family] = run.families

    def attention_layers(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        refusal: Exception | None = None
        for family in self._families:
            try:
                return family.resolve(layers, self._name)
            except ValueError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal


class Hooks:
    """The guidances of one run by name, in the order in which they act.

    Args:
        guidances: in that order.
        run: has `stack`, where each teardown is put, and `families`.
    """

    def __init__(self, guidances: Mapping[str, Guidance], run: Any) -> None:
        self.guidances = guidances
        self._views: dict[str, SetupView] = {}
        for name, guidance in guidances.items():
            view = self._views[name] = SetupView(name, run, dry=False)
            run.stack.callback(guidance.teardown, view)
            with annotated(name, "setup"):
                guidance.setup(view)

    def acting(self, step: Step) -> dict[str, Guidance]:
        """The guidances whose window holds the step."""
        return {name: guidance for name, guidance in self.guidances.items() if guidance.acts(step)}

    def view(self, name: str, step: Step) -> Step:
        """The step with this guidance's own state."""
        return dataclasses.replace(step, state=self._views[name].state)

    def wanted(self, acting: Mapping[str, Guidance], step: Step) -> tuple[Branch, ...]:
        """Phase 2: the branches that they ask for, each once."""
        return wanted_branches(acting, {name: self.view(name, step) for name in acting})

    def delta(self, acting: Mapping[str, Guidance], step: Step, predictions: Predictions) -> torch.Tensor | None:
        """Phase 3: the sum of all deltas."""
        total: torch.Tensor | None = None
        for name, guidance in acting.items():
            if guidance.overrides("delta"):
                with annotated(name, "delta", step):
                    delta = guidance.delta(self.view(name, step), predictions)
                    if delta is not None and step.own is not None:
                        _check_shape(delta, step.own)
                if delta is not None:
                    total = delta if total is None else total + delta
        return total

    def project(
        self, acting: Mapping[str, Guidance], step: Step, prediction: torch.Tensor, predictions: Predictions
    ) -> torch.Tensor:
        """Phase 4: the prediction, reshaped by each in turn."""
        for name, guidance in acting.items():
            if guidance.overrides("project"):
                with annotated(name, "project", step):
                    projected = guidance.project(self.view(name, step), prediction, predictions)
                    _check_shape(projected, prediction)
                prediction = projected.to(prediction.dtype)
        return prediction

    def after_step(self, acting: Mapping[str, Guidance], step: Step, following: torch.Tensor) -> torch.Tensor:
        """Phase 6: the next sample, edited by each in turn."""
        for name, guidance in acting.items():
            if guidance.overrides("after_step"):
                with annotated(name, "after_step", step):
                    edited = guidance.after_step(self.view(name, step), following)
                    _check_shape(edited, following)
                following = edited.to(following.dtype)
        return following


def _check_shape(returned: Any, like: torch.Tensor) -> None:
    """Refuse what would otherwise broadcast, or fail far from here."""
    if not isinstance(returned, torch.Tensor) or returned.shape != like.shape:
        what = (
            f"shape {tuple(returned.shape)}" if isinstance(returned, torch.Tensor) else f"a {type(returned).__name__}"
        )
        raise GuidanceRuntimeError(f"it returned {what}; needed: a tensor of shape {tuple(like.shape)}.")


def needs_level(guidance: Guidance) -> bool:
    """Whether a guidance cannot act without knowing alpha and sigma."""
    windowed = guidance.sigma_min > 0 or guidance.sigma_max != float("inf")
    return windowed or guidance.overrides("guide_x0") or guidance.overrides("loss") or "level" in guidance.needs


@contextmanager
def annotated(name: str, hook: str, step: Step | None = None) -> Iterator[None]:
    """Say in an exception which guidance, hook and step it came from."""
    try:
        yield
    except Exception as error:
        where = f"guidance {name!r}, hook {hook}" + (f", step {step.index} of {step.count}" if step is not None else "")
        if hasattr(error, "add_note"):
            error.add_note(where)
            raise
        raise GuidanceRuntimeError(f"{where}: {error}") from error
