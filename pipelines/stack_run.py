"""A guidance stack within one run of a modular pipeline: what it will ask for, and what it makes of it.

A guider is told the step, hands out one batch a prediction, sees the denoiser before each call, and combines what came
back. It sees neither x_t nor the scheduler nor a text encoder, so a guidance that needs one of these is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..guidance.base import Guidance
from ..guidance.branch import COND, UNCOND, Branch, Prompt, ScaledAdapters
from ..guidance.errors import UnsupportedPipelineError
from ..guidance.planner import extra_of, wanted_branches
from ..guidance.run import AroundDenoiser, Step
from .budget import Budget
from .call import Call
from .clock import UNKNOWN_LEVEL
from .conditions import Conditions
from .denoiser import Denoiser
from .hooks import Hooks, SetupView, needs_level
from .interception import tap_call
from .observation import observe
from .others import OtherDenoisers
from .prediction import input_rows, primary
from .rows import AmbiguousRowsError

PROBED = 1000
"""Steps of the run in which it is tried what guidances will ask for."""


def step_of(index: int, count: int, timestep: float | None = None) -> Step:
    """A step as a guider knows it, without noise level and x_t; before it is told, timesteps count as even."""
    even = 1000.0 * (1 - index / count)
    return Step(index, count, even if timestep is None else timestep, UNKNOWN_LEVEL)


class Foresight:
    """The branches that guidances will ask for, told before the denoiser and its layers are known.

    Raises:
        UnsupportedPipelineError: a guidance needs what no guider is given; the message says what.
    """

    def __init__(self, guidances: Mapping[str, Guidance]) -> None:
        self.guidances = guidances
        self.views: dict[str, SetupView] = {}
        self.stack = ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        run = SimpleNamespace(stack=self.stack, pipe=None, arguments={}, families=[], own=(COND,))
        for name, guidance in self.guidances.items():
            guidance.validate()
            _check(name, guidance)
            self.views[name] = view = _Unresolved(name, run, dry=True)
            self.stack.callback(guidance.teardown, view)
            guidance.setup(view)
            for branch in guidance.branches(self.view(name, step_of(0, 1))):
                if isinstance(branch.condition, Prompt):
                    raise _refused(name, "a text encoder", "give the pipeline's call a negative_prompt")
                if branch.point is not None:
                    raise _refused(name, "x_t", "use it on an ordinary pipeline: trimtab.guide(pipe)")

    def close(self) -> None:
        """Tear the guidances down."""
        self.stack.close()

    def view(self, name: str, step: Step) -> Step:
        """The step with this guidance's own state."""
        return dataclasses.replace(step, state=self.views[name].state)

    def acting(self, step: Step) -> dict[str, Guidance]:
        """The guidances whose window holds the step."""
        return {name: guidance for name, guidance in self.guidances.items() if guidance.acts(step)}

    def wanted(self, step: Step) -> tuple[Branch, ...]:
        """The branches of a step, each once."""
        acting = self.acting(step)
        return wanted_branches(acting, {name: self.view(name, step) for name in acting})

    def ever_unconditional(self) -> bool:
        """Whether some step of some run needs the unconditional prediction."""
        return any(
            UNCOND in guidance.branches(self.view(name, step_of(index, PROBED)))
            for name, guidance in self.guidances.items()
            for index in range(int(guidance.start * PROBED), PROBED)
        )


class StackRun:
    """One run, on one denoiser; closed at its end, at the next run's beginning, and when the denoiser raises."""

    def __init__(self, guidances: Mapping[str, Guidance], module: nn.Module, rows: str, budget: Budget) -> None:
        self.module, self.rows = module, rows
        self.stack = ExitStack()
        self._tap = ExitStack()
        self._call: Call | None = None
        self.pipe = SimpleNamespace(components={"denoiser": module}, _execution_device=getattr(module, "device", "cpu"))
        self.arguments: Mapping[str, Any] = {}
        self.own = (COND,)
        self.around: list[AroundDenoiser] = []
        self.attachments: dict[str, Any] = {}
        try:
            self._conditions = Conditions(self.pipe, {}, self.stack)
            self._denoiser = Denoiser(module, self._conditions, self.stack, budget)
            self.families = [self._denoiser.family]
            self.others = OtherDenoisers(self.pipe, self._conditions, self.stack, budget)
            self.hooks = Hooks(guidances, self)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Undo everything that this run has put on the denoiser."""
        self._tap.close()
        self.stack.close()

    def tap(self, step: Step, role: str) -> None:
        """Keep the next call of the denoiser within the budget; the conditional one computes the branches as well.

        Args:
            role: of its rows, `"cond"` or `"uncond"`.
        """
        self._tap.close()
        acting = self.hooks.acting(step)
        extra = extra_of(self.hooks.wanted(acting, step), (COND, UNCOND))

        def on_call(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            self._tap.close()
            rows = input_rows(args, kwargs)
            none = torch.empty(0)
            call = Call(module, original, args, kwargs, rows, [role] * (rows or 1), none, none)
            try:
                return self._with_branches(call, extra) if role == "cond" else self._denoiser.call_own(call, ())
            except BaseException:
                self.close()
                raise

        tap_call(self._tap, self.module, on_call)

    def _with_branches(self, call: Call, branches: Sequence[Branch]) -> Any:
        """The pipeline's own conditional call, whose output is unchanged; the branches' raw rows go to the call."""
        joining = [branch for branch in branches if not branch.apart] if self._may_join(call) else []
        try:
            output = (
                self._denoiser.call_joined(call, joining, self.rows == "auto")
                if joining
                else self._denoiser.call_own(call, ())
            )
        except AmbiguousRowsError:
            call.extra = {}
            output = self._denoiser.call_own(call, ())
        call.output = primary(output)
        for branch in extra_of(branches, tuple(call.extra)):
            denoiser, original = self._denoiser, call.original
            if branch.denoiser is not None:
                denoiser, original = self.others.of(branch.denoiser)
            call.extra[branch] = denoiser.call_alone(call, branch, original)
        self._call = call
        return output

    def _may_join(self, call: Call) -> bool:
        return call.rows is not None and self.rows != "sequential" and self._denoiser.can_join()

    def combine(self, step: Step, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """What the guidances make of the step's predictions, as the pipeline has converted them."""
        acting = self.hooks.acting(step)
        step = dataclasses.replace(step, own=cond)
        available = {COND: cond} if uncond is None else {COND: cond, UNCOND: uncond}
        available |= self._converted(cond)
        delta = self.hooks.delta(acting, step, available)
        total = cond if delta is None else (cond + delta).to(cond.dtype)
        return self.hooks.project(acting, step, total, available)

    def _converted(self, cond: torch.Tensor) -> dict[Branch, torch.Tensor]:
        """The branches in the pipeline's own form, which is that of its conditional prediction."""
        call, self._call = self._call, None
        if call is None or not call.extra:
            return {}
        seen = observe([call.output], cond, cond)
        if seen is None or not seen.exact or seen.on_sample:
            raise UnsupportedPipelineError(
                f"The pipeline hands its guider a {tuple(cond.shape)} that is no slice or multiple of what its "
                f"denoiser returned, {tuple(call.output.shape)}, so a branch cannot be brought into that form."
            )
        return {branch: seen.gain * seen.view.of(rows) for branch, rows in call.extra.items()}


class _Unresolved(SetupView):
    """A run whose denoiser is not known yet: names of layers stay as they were asked for."""

    def attention_layers(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        return (layers,) if isinstance(layers, str) else tuple(layers)

    skippable_blocks = attention_layers

    def adapters(self, names: str | Sequence[str]) -> ScaledAdapters:
        return ScaledAdapters((), (names,) if isinstance(names, str) else tuple(names))

    def prepare_denoiser(self, source: str | nn.Module) -> None:
        pass

    def around_denoiser(self, around: Any) -> None:
        raise _refused(self._name, "every call of the denoiser", "use it on an ordinary pipeline: trimtab.guide(pipe)")

    def attachment(self, kind: str) -> Any:
        raise _refused(self._name, f"the pipeline ({kind})", "use it on an ordinary pipeline: trimtab.guide(pipe)")


def _check(name: str, guidance: Guidance) -> None:
    ordinary = "use it on an ordinary pipeline: trimtab.guide(pipe)"
    if needs_level(guidance):
        raise _refused(name, "the noise level and x_t", f"let its window be start and stop, or {ordinary}")
    if guidance.overrides("after_step"):
        raise _refused(name, "the sample after the scheduler", ordinary)


def _refused(name: str, needed: str, remedy: str) -> UnsupportedPipelineError:
    return UnsupportedPipelineError(f"{name} needs {needed}, which no guider is given; {remedy}.")
