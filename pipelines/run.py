"""One run of a guided pipeline: its calls and its scheduler's steps are followed, and everything is undone at the end.

The pipeline computes its own prediction as ever and gets its own rows back unchanged. Extra branches ride along in its
denoiser calls or are calls of their own; what the guidances make of them is added to `model_output` at
`scheduler.step` (`guided_step.py`), or before the pipeline's own rescale where it has one (`row_delta.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..guidance.base import Guidance
from ..guidance.errors import ConflictError, UnsupportedPipelineError
from ..guidance.order import ordered
from ..guidance.planner import extra_of, own_branches
from ..guidance.run import AroundDenoiser, Step
from .around import surrounded
from .budget import Budget
from .call import Call, is_beside, observe_calls
from .clock import Clocks
from .components import denoisers_of, schedulers_of
from .conditions import Conditions
from .controls import check_controlled
from .converting import check_sample_is_left, is_converted, only_converts
from .denoiser import Denoiser
from .forwards import Forwards
from .frames import with_videos
from .graph import prepare
from .guided_step import GuidedStep
from .hooks import Hooks, needs_level
from .interception import tap_call, tap_scheduler
from .latents import ImageSpace
from .meter import GraphMeter
from .observation import own_channels
from .others import OtherDenoisers
from .own_cfg import has_cfg
from .parallel.branches import BranchParallel
from .prediction import input_rows, is_prediction, primary, with_primary
from .processors import ProcessorsBefore
from .progress import name_guidances
from .recurrence import check_repeats
from .renoising import check_renoising
from .row_delta import RowDelta
from .taps import Taps


class GuidedRun:
    """A context in which one call of a pipeline is guided.

    Args:
        pipe: the pipeline.
        guidances: the attached guidances by name.
        arguments: the arguments of the pipeline's call, defaults included.
        rows: `"auto"` lets branches share the pipeline's call from the block on where they begin to differ, `"batched"`
            from its beginning, and `"sequential"` makes each a call of its own.
        budget: the most rows of one call; without one there is no limit until memory sets it.
        checkpointing: whether gradient graphs keep only the inputs of blocks.
        parallel: processes that share the branches of each step.
    """

    def __init__(
        self,
        pipe: Any,
        guidances: Mapping[str, Guidance],
        arguments: Mapping[str, Any],
        rows: str = "auto",
        budget: Budget | None = None,
        checkpointing: bool = False,
        parallel: BranchParallel | None = None,
    ) -> None:
        self.pipe, self.arguments = pipe, arguments
        self.guidances = {name: guidances[name] for name in ordered(guidances)}
        self.own = own_branches(has_cfg(pipe, arguments))
        self.schedulers = schedulers_of(pipe)
        self.stack = Taps()
        self.meter = GraphMeter()
        self.space = ImageSpace(pipe, arguments, self.meter)
        self.around: list[AroundDenoiser] = []
        self.attachments: dict[str, Any] = {}
        self._budget = Budget() if budget is None else budget
        self._rows, self._checkpointing, self._parallel = rows, checkpointing, parallel
        self._calls: list[Call] = []
        self._served: dict[int, Any] = {}

    def __enter__(self) -> GuidedRun:
        try:
            self._open()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _open(self) -> None:
        for guidance in self.guidances.values():
            guidance.validate()
            gradient = "gradient" in guidance.needs or guidance.overrides("loss")
            if gradient and torch.is_inference_mode_enabled():
                raise ConflictError(
                    f"{guidance.label} needs gradients, which torch.inference_mode() forbids for good. Call the "
                    "pipeline outside of it; torch.no_grad() is fine."
                )
        check_renoising(self.schedulers, self.guidances)
        name_guidances(self.stack, self.pipe, self.guidances)
        needing = [name for name, guidance in self.guidances.items() if needs_level(guidance)]
        self.clocks = Clocks(self.schedulers, needing)
        conditions = Conditions(self.pipe, self.arguments, self.stack)
        self.denoisers = {
            id(module): Denoiser(module, conditions, self.stack, self._budget) for module in denoisers_of(self.pipe)
        }
        if any(guidance.overrides("loss") for guidance in self.guidances.values()):
            autoencoder = [self.space.autoencoder] if self.space.autoencoder is not None else []
            for module in [*denoisers_of(self.pipe), *autoencoder]:
                prepare(self.stack, module, self.meter, self._checkpointing)
        self.families = [denoiser.family for denoiser in self.denoisers.values()]
        self.others = OtherDenoisers(self.pipe, conditions, self.stack, self._budget)
        self.space.follow(self.stack)
        self.hooks = Hooks(self.guidances, self, self.space)
        if any(denoiser.contexts.has_step_cache for denoiser in self.denoisers.values()):
            self.hooks.check_unwatched()
        self.forwards = Forwards(
            self.hooks, self.denoisers, self.others, self.own, self.around, self.meter, self._rows, self._budget,
            self._parallel,
        )  # fmt: skip
        self._processors = {id(module): ProcessorsBefore(self.stack, module) for module in denoisers_of(self.pipe)}
        self._row_delta = RowDelta(self.pipe, self.arguments, self.hooks, self.forwards, lambda: self.space.shapes)
        for module in denoisers_of(self.pipe):
            tap_call(self.stack, module, self._on_call)
        for scheduler in self.schedulers:
            on_step = with_videos(self._on_step, lambda: self._calls)
            tap_scheduler(self.stack, scheduler, on_step, self.clocks.note_scaled)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, traceback)  # what is pushed on it may ask whether the run failed
        self._calls.clear()
        self._served.clear()
        self.space.forget()

    # -- the denoiser's call ---------------------------------------------------------------------------------------
    def _on_call(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self.forwards.inside:
            return self.forwards.counted(original)(*args, **kwargs)
        if self._served:
            self._calls, self._served = [], {}
        denoiser = self.denoisers[id(module)]
        rows = input_rows(args, kwargs)
        ordinal = len([call for call in self._calls if call.module is module])
        roles = denoiser.roles(ordinal, rows, kwargs)
        step = self.clocks.at_call(module, args, kwargs)
        self.hooks.check(step, args, kwargs)
        acting = self.hooks.acting(step) if step is not None else {}
        if step is not None and (scheduler := self.clocks.consumer(module)) is not None:
            check_repeats(acting, {name: self.hooks.view(name, step) for name in acting}, scheduler)
        if not self._row_delta.applies(denoiser, acting, 1 if {"cond", "uncond"} <= {*(roles or ())} else 2):
            self.clocks.forget_unscaled(module)
        for name, guidance in acting.items():
            assert step is not None
            for branch in extra_of(self.hooks.wanted({name: guidance}, step), self.own):
                check_controlled(self.pipe, self.arguments, branch, self.own, name)
                self._processors[id(module)].check_unread(type(self.pipe).__name__, name)
        if self.around and step is None:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__}: which of its {len(self.schedulers)} schedulers a denoiser call belongs "
                "to is not known before the call."
            )
        # What guidances call apart is no prediction, so it is not counted.
        original = self.forwards.counted(surrounded(denoiser, original, self.around, step, roles))
        call = Call(module, original, args, kwargs, rows, roles, torch.empty(0), torch.empty(0))
        call.context = denoiser.contexts.present
        output = self.forwards.make(call, acting, step, self._calls)
        if not is_prediction(output):
            return output
        self._calls.append(call)
        if step is not None and self._row_delta.applies(denoiser, acting, len(self._calls)):
            # x_t as far as it can be told before `scheduler.step`.
            step = dataclasses.replace(step, sample=call.sample_before_step(self.clocks.unscaled(module)))
            return self._row_delta.hand_over(call, self._calls, output, acting, step, denoiser)
        return output

    # -- the scheduler's step --------------------------------------------------------------------------------------
    def _on_step(self, scheduler: Any, bound: inspect.BoundArguments, original: Any) -> Any:
        if self.forwards.inside:
            return original(*bound.args, **bound.kwargs)
        given = bound.arguments
        clock = self.clocks.at_step(scheduler, given["timestep"])
        step = clock.step()
        acting = self.hooks.acting(step)
        sample = given["sample"]
        beside = bool(self._served) and is_beside(self._calls, given["model_output"], sample)
        if beside or only_converts(self._calls, given["model_output"], sample):
            return original(*bound.args, **bound.kwargs)
        converted = is_converted(given)
        if converted and id(scheduler) in self._served:
            check_sample_is_left(type(self.pipe).__name__, acting)
            return original(*bound.args, **bound.kwargs)
        if converted and step.algebra is not None:
            step = dataclasses.replace(step, algebra=step.algebra.of_clean_estimates())
        if acting and (not self._calls or id(scheduler) in self._served):
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__}: scheduler.step was called without a denoiser call before it, so there is "
                "no prediction to guide."
            )
        if acting:
            given["model_output"], given["sample"], batch = self._guided(scheduler, step, acting, given)
            if converted:
                given["pred_original_sample"] = given["model_output"]
        else:
            self.forwards.count(self._calls, sample, acting, step)
        self._served[id(scheduler)] = scheduler
        self._evaluated()
        with self.forwards.within():
            result = original(*bound.args, **bound.kwargs)
        clock.calls += 1
        clock.input_scale = clock.unscaled = None
        if not any(guidance.overrides("after_step") for guidance in acting.values()):
            return result
        # A pipeline that steps its batch twice over (DiT) has one image in two rows.
        whole, step = primary(result), dataclasses.replace(step, sample=sample[:batch])
        with self.meter.watching():
            edited = self.hooks.after_step(acting, step, whole[:batch])
        return with_primary(result, torch.cat([edited] * (len(whole) // batch)) if len(whole) > batch else edited)

    def _guided(
        self, scheduler: Any, step: Step, acting: Mapping[str, Guidance], given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The model output with all that the acting guidances make of it, the x_t where that holds, and the batch."""
        model_output, whole = given["model_output"], given["sample"]
        observation, calls = observe_calls(type(self.pipe).__name__, self._calls, model_output, whole)
        batch, denoiser = observation.batch, self.forwards.denoiser_of(calls[0])
        self.clocks.pair(denoiser.module, scheduler)
        denoiser.settle_roles(observation, calls)
        own = own_channels(model_output, whole)[:batch]
        step = dataclasses.replace(step, sample=whole[:batch])
        evaluated = GuidedStep(self.hooks, self.forwards, self._row_delta, acting, observation, step, calls, own)
        total, sample = evaluated.guided()
        self.forwards.count(evaluated.calls, whole, acting, step)
        for _ in range(self.hooks.repeats(acting, step) - 1):
            self._evaluated()
            evaluated = evaluated.again(total, scheduler, self.arguments.get("generator"))
            total, sample = evaluated.guided()
            self.forwards.count(evaluated.calls, whole, acting, step)
        if model_output.shape[1:] != total.shape[1:]:
            total = torch.cat([total, model_output[:batch, total.shape[1] :]], dim=1)
        if observation.copies == 1:
            return total, sample, batch
        return torch.cat([total] * observation.copies), torch.cat([sample] * observation.copies), batch

    def _evaluated(self) -> None:
        """Let go of what belongs to one evaluation of a step only."""
        self._row_delta.handed_with = None
        self.space.forget()
        self.meter.start()
