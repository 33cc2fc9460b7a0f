"""One run of a guided pipeline: the hooks called at the right moments, everything undone at the end.

The pipeline computes its own prediction as ever and gets its own rows back unchanged. Extra branches ride along in its
denoiser calls or are calls of their own; what the guidances make of them is added to `model_output` at
`scheduler.step`, or before the pipeline's own rescale where it has one (`row_delta.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..guidance.base import AroundDenoiser, Guidance, Step
from ..guidance.branch import Branch, Point
from ..guidance.errors import ConflictError, UnsupportedPipelineError
from ..guidance.order import ordered
from ..guidance.planner import extra_of, own_branches
from .around import surrounded
from .clean import CleanPhase, edits_clean_estimate, needs_graph
from .clock import Clock, algebra_or_none
from .components import check_controlled, denoisers_of, schedulers_of
from .conditions import Conditions
from .converting import check_sample_is_left, is_converted, only_converts
from .denoiser import OWN, Call, Denoiser, observe_calls, watched_by
from .graph import GraphMeter, call_with_graph, checkpoint_blocks, freeze
from .hooks import Hooks, needs_level
from .interception import tap_call, tap_scheduler
from .latents import ImageSpace
from .observation import UNRELATED, Observation, observe, own_channels
from .others import OtherDenoisers
from .own_cfg import has_cfg
from .parallel.branches import BranchParallel
from .prediction import beside_primary, input_rows, is_prediction, primary, with_primary
from .progress import name_guidances
from .recurrence import check_repeatable, noised_back, with_sample
from .renoising import check_renoising, renoise
from .row_delta import RowDelta
from .rows import AmbiguousRowsError

logger = logging.getLogger("trimtab")


class GuidedRun:
    """A context in which one call of a pipeline is guided.

    Args:
        pipe: the pipeline.
        guidances: the attached guidances by name.
        arguments: the arguments of the pipeline's call, defaults included.
        rows: `"auto"` lets branches share the pipeline's call from the block on where they begin to differ, `"batched"`
            from its beginning, and `"sequential"` makes each a call of its own.
        max_rows: most rows in one call; `None` for no limit.
        checkpointing: whether gradient graphs keep only the inputs of blocks.
        parallel: processes that share the branches of each step.
    """

    def __init__(
        self,
        pipe: Any,
        guidances: Mapping[str, Guidance],
        arguments: Mapping[str, Any],
        rows: str = "auto",
        max_rows: int | None = None,
        checkpointing: bool = False,
        parallel: BranchParallel | None = None,
    ) -> None:
        self.pipe, self.arguments, self.rows, self.max_rows = pipe, arguments, rows, max_rows
        self.guidances = {name: guidances[name] for name in ordered(guidances)}
        self.checkpointing, self.parallel = checkpointing, parallel
        self.stack = ExitStack()
        self.meter = GraphMeter()
        self.space = ImageSpace(pipe, arguments, self.meter)
        self.evaluations = self.forward_calls = 0
        self.clocks: dict[int, Clock] = {}
        self.denoisers: dict[int, Denoiser] = {}
        self.around: list[AroundDenoiser] = []
        self.attachments: dict[str, Any] = {}
        self._calls: list[Call] = []
        self._served: dict[int, Any] = {}
        self._inside = False
        self._paired: dict[int, Any] = {}
        self._schedulers = schedulers_of(pipe)
        self.own = own_branches(has_cfg(pipe, arguments))

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
        check_renoising(self._schedulers, self.guidances)
        name_guidances(self.stack, self.pipe, self.guidances)
        needing = [name for name, guidance in self.guidances.items() if needs_level(guidance)]
        self._algebras = {id(s): algebra_or_none(s, needing) for s in self._schedulers}
        self.conditions = Conditions(self.pipe, self.arguments, self.stack)
        for module in denoisers_of(self.pipe):
            self.denoisers[id(module)] = Denoiser(module, self.conditions, self.stack)
        if any(guidance.overrides("loss") for guidance in self.guidances.values()):
            self._prepare_gradients()
        self.families = [denoiser.family for denoiser in self.denoisers.values()]
        self.others = OtherDenoisers(self.pipe, self.conditions, self.stack)
        self.hooks = Hooks(self.guidances, self, self.space)
        if any(denoiser.has_step_cache for denoiser in self.denoisers.values()):
            self.hooks.check_unwatched()
        self._row_delta = RowDelta(self.pipe, self.arguments, self.hooks, self.compute_missing)
        for module in denoisers_of(self.pipe):
            tap_call(self.stack, module, self._on_call)
        for scheduler in self._schedulers:
            tap_scheduler(self.stack, scheduler, self._on_step, self._on_scale)

    def _prepare_gradients(self) -> None:
        autoencoder = [self.space.autoencoder] if self.space.autoencoder is not None else []
        for module in [*denoisers_of(self.pipe), *autoencoder]:
            freeze(self.stack, module)
            if self.checkpointing:
                checkpoint_blocks(self.stack, module, self.meter)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.close()
        self._calls.clear()
        self._served.clear()
        self.space.forget()

    # -- the denoiser's call ---------------------------------------------------------------------------------------
    def _on_call(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self._counted(original)(*args, **kwargs)
        if self._served:
            self._calls, self._served = [], {}
        denoiser = self.denoisers[id(module)]
        rows = input_rows(args, kwargs)
        ordinal = len([call for call in self._calls if call.module is module])
        roles = denoiser.roles(ordinal, rows, kwargs)
        step = self._peek(module, args, kwargs)
        acting = self.hooks.acting(step) if step is not None else {}
        for name, guidance in acting.items():
            assert step is not None
            for branch in extra_of(self.hooks.wanted({name: guidance}, step), self.own):
                check_controlled(self.pipe, self.arguments, branch, name)
        branches = self._to_join(denoiser, acting, step, roles)
        if self.around and step is None:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__}: which of its {len(self._schedulers)} schedulers a denoiser call belongs "
                "to is not known before the call."
            )
        # What guidances call apart is no prediction, so it is not counted.
        original = self._counted(surrounded(denoiser, original, self.around, step, roles))
        call = Call(module, original, args, kwargs, rows, roles, torch.empty(0), torch.empty(0))
        call.context = denoiser.context
        with self._within():
            output = self._forward(call, denoiser, acting, step, branches)
        if not is_prediction(output):
            return output
        self._calls.append(call)
        if step is not None and self._row_delta.applies(denoiser, acting, len(self._calls)):
            step = self._with_sample(step, call)
            return self._row_delta.hand_over(call, self._calls, output, acting, step, denoiser)
        return output

    def _forward(
        self, call: Call, denoiser: Denoiser, acting: Mapping[str, Guidance], step: Step | None,
        branches: Sequence[Branch],
    ) -> Any:  # fmt: skip
        """Make a call; returns what the denoiser returned for the pipeline's own rows, and notes it in `call`."""
        output = self._forward_output(call, denoiser, acting, step, branches)
        if is_prediction(output):
            call.output = call.handed_back = primary(output)
            call.beside = beside_primary(output)
        return output

    def _forward_output(
        self, call: Call, denoiser: Denoiser, acting: Mapping[str, Guidance], step: Step | None,
        branches: Sequence[Branch],
    ) -> Any:  # fmt: skip
        if step is not None and any(needs_graph(g, self.hooks.view(name, step)) for name, g in acting.items()):
            return call_with_graph(call, self.meter)
        points = self.hooks.points(acting, step) if step is not None else ()
        # What is put around a call, and what watches it, sees all rows.
        alone = self.around or points or call.rows is None or not (denoiser.can_join() and denoiser.can_share)
        parallel = None if alone else self.parallel
        if (branches and call.roles is not None) or parallel is not None:
            try:
                return denoiser.call_joined(call, branches, self.rows == "auto", points, parallel)
            except AmbiguousRowsError:
                call.extra, call.watched = {}, {}
            except torch.OutOfMemoryError:
                # In this run no more than the pipeline's own rows fit; each branch is a call of its own from here on.
                call.extra, call.watched, self.max_rows = {}, {}, call.rows
                logger.warning("%d branches more do not fit into memory: each is a call of its own", len(branches))
        return denoiser.call_watched(call, points) if points else call.original(*call.args, **call.kwargs)

    def _to_join(
        self, denoiser: Denoiser, acting: Mapping[str, Guidance], step: Step | None, roles: list[str] | None
    ) -> list[Branch]:
        """The extra branches that may ride along in this call."""
        if step is None or roles is None or "cond" not in roles or self.rows == "sequential" or not denoiser.can_join():
            return []
        own = {OWN[role] for role in roles if role in OWN} | set(self.own)
        asked = [branch for branch in self.hooks.wanted(acting, step) if denoiser.family.is_moved_by(branch)]
        extra = [branch for branch in asked if branch not in own and not branch.apart]
        rows = len(roles) + roles.count("cond") * len(extra)
        return extra if self.max_rows is None or rows <= self.max_rows else []

    def _counted(self, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.forward_calls += 1
            return output

        return forward

    @contextmanager
    def _within(self) -> Iterator[None]:
        outer, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outer

    # -- scheduler ---------------------------------------------------------------------------------------------------
    def _on_scale(self, scheduler: Any, given: Any, returned: Any) -> None:
        clock = self._clock(scheduler)
        size = float(given.float().norm()) if clock is not None else 0.0
        if clock is not None and size > 0:
            clock.input_scale, clock.unscaled = float(returned.float().norm()) / size, given

    def _clock(self, scheduler: Any, timestep: float | None = None) -> Clock | None:
        if id(scheduler) not in self.clocks:
            if getattr(scheduler, "timesteps", None) is None or not len(scheduler.timesteps):
                return None
            algebra = self._algebras.get(id(scheduler), next(iter(self._algebras.values())))
            self.clocks[id(scheduler)] = Clock(scheduler, algebra, timestep)
        return self.clocks[id(scheduler)]

    def _scheduler_of(self, module: nn.Module) -> Any:
        """The scheduler that consumes what this module returns, if that is known."""
        return self._paired.get(id(module), self._schedulers[0] if len(self._schedulers) == 1 else None)

    def _peek(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
        """The step that a denoiser call belongs to, if the scheduler that will consume it is known."""
        scheduler = self._scheduler_of(module)
        if scheduler is None:
            return None
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        timestep = float(given.flatten()[0]) if isinstance(given, torch.Tensor) and given.numel() else None
        clock = self._clock(scheduler, timestep)
        return clock.step() if clock is not None else None

    def _with_sample(self, step: Step, call: Call) -> Step:
        """The step with x_t as far as it can be told before `scheduler.step`: `[rows, ...]` like the call's output."""
        clock = self.clocks[id(self._scheduler_of(call.module))]
        return dataclasses.replace(step, sample=call.sample_before_step(clock.unscaled))

    def _on_step(self, scheduler: Any, bound: inspect.BoundArguments, original: Any) -> Any:
        if self._inside:
            return original(*bound.args, **bound.kwargs)
        given = bound.arguments
        clock = self._clock(scheduler, float(torch.as_tensor(given["timestep"]).flatten()[0]))
        assert clock is not None
        clock.locate(given["timestep"])
        step = clock.step()
        acting = self.hooks.acting(step)
        sample = given["sample"]
        if self._served and self._is_beside(given["model_output"], sample):
            return original(*bound.args, **bound.kwargs)
        if only_converts(self._calls, given["model_output"], sample):
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
            given["model_output"], given["sample"] = self._guided(scheduler, clock, step, acting, self._calls, given)
            if converted:
                given["pred_original_sample"] = given["model_output"]
        else:
            self._count(self._calls, sample)
        self._served[id(scheduler)] = scheduler
        self._row_delta.handed_with = None
        self.space.forget()
        self.meter.start()
        with self._within():
            result = original(*bound.args, **bound.kwargs)
        clock.calls += 1
        clock.input_scale = clock.unscaled = None
        if not any(guidance.overrides("after_step") for guidance in acting.values()):
            return result
        step = dataclasses.replace(step, sample=sample)
        return with_primary(result, self.hooks.after_step(acting, step, primary(result)))

    def _is_beside(self, model_output: torch.Tensor, sample: torch.Tensor) -> bool:
        """Whether a further scheduler is given what the denoiser returned beside its prediction."""
        columns = list(zip(*(call.beside for call in self._calls), strict=False))
        seen = [observe(outputs, model_output, sample) for outputs in columns]
        return any(found is not None and found.residual <= UNRELATED for found in seen)

    def _guided(
        self, scheduler: Any, clock: Clock, step: Step, acting: Mapping[str, Guidance], calls: list[Call],
        given: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The model output with all that the acting guidances make of it, and the x_t where that holds."""
        model_output, whole = given["model_output"], given["sample"]
        observation, made = observe_calls(type(self.pipe).__name__, calls, model_output, whole)
        batch = observation.batch
        self._paired[id(made[0].module)] = scheduler
        self.denoisers[id(made[0].module)].settle_roles(observation, made)
        own = own_channels(model_output, whole)[:batch]
        step = dataclasses.replace(step, sample=whole[:batch])
        total, sample = self._edited(step, acting, observation, made, own)
        together = 1 + sum(guidance.companions(step) for guidance in acting.values())
        self._count(made, whole, together)
        for _ in range(self.hooks.repeats(acting, step) - 1):
            step, made = self._evaluated_again(scheduler, step, acting, observation, made, total)
            assert step.sample is not None
            own = observation.combine([call.output for call in made], step.sample)
            total, sample = self._edited(step, acting, observation, made, own)
            self._count(made, whole, together)
        if model_output.shape[1:] != total.shape[1:]:
            total = torch.cat([total, model_output[:batch, total.shape[1] :]], dim=1)
        if observation.copies == 1:
            return total, sample
        return torch.cat([total] * observation.copies), torch.cat([sample] * observation.copies)

    def _evaluated_again(
        self, scheduler: Any, step: Step, acting: Mapping[str, Guidance], observation: Observation,
        calls: Sequence[Call], prediction: torch.Tensor,
    ) -> tuple[Step, list[Call]]:  # fmt: skip
        """The step at an x_t noised back from where `prediction` leads, and the calls of its own denoiser there."""
        asking = max(acting, key=lambda name: acting[name].repeats(self.hooks.view(name, step)))
        check_repeatable(scheduler, asking)
        if not observation.exact or observation.rescaled or observation.held is not None:
            raise UnsupportedPipelineError(
                f"{asking}: repeats above 1 are not possible where the pipeline rescales its own combination or holds "
                "parts of it; call it without guidance_rescale, or with a guidance scale of 1 and the plug-in 'cfg'."
            )
        assert step.sample is not None
        self.space.forget()
        self.meter.start()
        self._row_delta.handed_with = None
        again = noised_back(
            step,
            prediction,
            lambda onward: self.hooks.after_step(acting, step, onward),
            self.arguments.get("generator"),
        )
        made = []
        for ordinal, call in enumerate(calls):
            denoiser, call = self.denoisers[id(call.module)], with_sample(call, observation.batch, step.sample, again)
            branches = self._to_join(denoiser, acting, step, call.roles)
            with self._within(), denoiser.inner_context(f"trimtab_again_{call.context or ordinal}"):
                self._forward(call, denoiser, acting, step, branches)
            made.append(call)
        return dataclasses.replace(step, sample=again), made

    def _edited(
        self, step: Step, acting: Mapping[str, Guidance], observation: Observation, calls: Sequence[Call],
        own: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Phases 2 to 5 of one evaluation: what the guidances make of the pipeline's own combination, and of x_t."""
        sample = step.sample
        assert sample is not None

        def convert(rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
            converted = observation.view.of(rows)
            converted = converted if observation.gain == 1.0 else observation.gain * converted
            at = sample if at is None else at
            return converted if observation.on_sample == 0.0 else converted + observation.on_sample * at

        available: dict[Branch, torch.Tensor] = {}
        for call in calls:
            for role, branch in OWN.items():
                if call.where(role):
                    available[branch] = convert(call.output[call.where(role)])
        step = dataclasses.replace(step, own=own)
        step = self.compute_missing(calls, acting, step, available, convert)
        if self._row_delta.handed_with is None:
            delta = self.hooks.delta(acting, step, available)
            total = own if delta is None else (own + delta).to(own.dtype)
        else:
            total = self._row_delta.corrected(own, observation, acting, step, available)
        total = self.hooks.project(acting, step, total, available)
        if any(edits_clean_estimate(guidance) for guidance in acting.values()):
            total = self._clean_edited(step, acting, observation, calls, total)
        total = observation.kept(own, total)
        return renoise(self.hooks, acting, step, total, available)

    def _clean_edited(
        self, step: Step, acting: Mapping[str, Guidance], observation: Observation, calls: Sequence[Call],
        total: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if any(needs_graph(g, self.hooks.view(name, step)) for name, g in acting.items()):
            for call in calls:
                # Before the first scheduler step it may not be known which one a denoiser works for.
                if call.graph is None:
                    call_with_graph(call, self.meter)
        return CleanPhase(self.hooks, step, total, observation, calls, self.meter).guided(acting)

    def compute_missing(
        self, calls: Sequence[Call], acting: Mapping[str, Guidance], step: Step,
        available: dict[Branch, torch.Tensor], convert: Callable[..., torch.Tensor],
    ) -> Step:  # fmt: skip
        """Put the wanted branches into `available`; those that no call holds yet are computed, each in its own.

        Returns the step with the points at which they were evaluated.

        Args:
            calls: of this step, one of which holds the conditional rows.
            step: with x_t.
            available: the pipeline's own branches.
            convert: from a denoiser's rows to the scheduler's parametrisation, and the point if it is not x_t.
        """
        for call in calls:
            available.update({branch: convert(rows, call.at.get(branch)) for branch, rows in call.extra.items()})
        cond_call = next(call for call in calls if call.where("cond"))
        points = self.hooks.points(acting, step)
        own = self.denoisers[id(cond_call.module)]

        def compute(branch: Branch) -> torch.Tensor:
            denoiser, original = own, cond_call.original
            if branch.denoiser is not None:
                denoiser, original = self.others.of(branch.denoiser)
                original = self._counted(original)
            moved = None
            if branch in cond_call.at:
                assert step.sample is not None
                moved = step.sample, cond_call.at[branch]
            watching = tuple(point for point in points if point.parent == branch)
            with self._within():
                return denoiser.call_alone(cond_call, branch, original, watching, moved)

        missing = extra_of(self.hooks.wanted(acting, step), tuple(available))
        for branch in missing:
            if not own.family.is_moved_by(branch) and branch.point is None:
                available[branch] = available[Branch(branch.condition)]
        for together in _generations(branch for branch in missing if branch not in available):
            for branch in together:
                if branch.point is not None:
                    parent = available[branch.point.parent]
                    cond_call.at[branch] = branch.point.sample(step, parent, watched_by(branch.point, calls))
            cond_call.extra.update(self._each(own, cond_call, together, compute, points))
            for branch in together:
                available[branch] = convert(cond_call.extra[branch], cond_call.at.get(branch))
        return dataclasses.replace(step, points={branch: x for call in calls for branch, x in call.at.items()})

    def _each(
        self, denoiser: Denoiser, call: Call, branches: Sequence[Branch], compute: Callable[[Branch], torch.Tensor],
        points: Sequence[Point],
    ) -> dict[Branch, torch.Tensor]:  # fmt: skip
        """The raw rows of branches that are calls of their own and do not follow from each other."""
        # A process needs what it watched, and what its step cache remembers, again.
        watched = {point.parent for point in points}
        alone = self.around or denoiser.has_step_cache or not watched.isdisjoint(branches)
        if self.parallel is None or alone:
            return {branch: compute(branch) for branch in branches}
        before = self.forward_calls
        found = self.parallel.each(branches, compute, call.output[call.where("cond")], (call.args, call.kwargs))
        self.forward_calls = before + len(branches)
        return found

    def _count(self, calls: Sequence[Call], sample: torch.Tensor, together: int = 1) -> None:
        for call in calls:
            observed, rows = self.denoisers[id(call.module)].observation, call.output.shape[0]
            # Some pipelines hand the scheduler several copies of the sample.
            images = call.roles.count(call.roles[0]) if call.roles else min(rows, sample.shape[0])
            own = rows // (observed.batch if observed is not None else images)
            evaluations = (own + len(call.extra)) * together
            self.evaluations += max(evaluations - call.counted, 0)
            call.counted = max(evaluations, call.counted)


def _generations(branches: Iterable[Branch]) -> list[tuple[Branch, ...]]:
    """Branches by the number of predictions that each follows from, in order."""
    found: dict[int, list[Branch]] = {}
    for branch in branches:
        found.setdefault(len(branch.lineage), []).append(branch)
    return [tuple(found[number]) for number in sorted(found)]
