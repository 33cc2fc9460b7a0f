"""One run of a guided pipeline: the hooks called at the right moments, everything undone at the end.

The pipeline computes its own prediction as ever and gets its own rows back unchanged. Extra branches ride along in its
denoiser calls or are calls of their own; what the guidances make of them is added to `model_output` at
`scheduler.step`. Where the pipeline rescales its own combination, the delta enters on the unconditional row instead,
divided by `1 - g`, so that the rescale stays last.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import nn

from ..guidance.base import Guidance, Step
from ..guidance.branch import COND, UNCOND, Branch
from ..guidance.errors import ConflictError, GuidanceRuntimeError, UnsupportedPipelineError
from ..guidance.order import ordered
from ..guidance.planner import extra_of, wanted_branches
from .clock import Clock, algebra_or_none
from .clean import guide_clean_estimate, needs_graph
from .components import denoisers_of, schedulers_of
from .conditions import Conditions
from .denoiser import OWN, Call, Denoiser, input_rows, primary, with_primary
from .interception import tap_call, tap_scheduler
from .observation import TOLERANCE, UNRELATED, Observation, observe, own_channels
from .rows import AmbiguousRowsError


class SetupView:
    """What one guidance sees of a run: see `guidance.base.Run`."""

    def __init__(self, name: str, run: Any, dry: bool) -> None:
        self.state = SimpleNamespace()
        self.exit_stack: ExitStack = run.stack
        self.dry = dry
        self._name = name
        self._families = run.families

    def attention_layers(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        refusal: Exception | None = None
        for family in self._families:
            try:
                return family.resolve(layers, self._name)
            except ValueError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal


class GuidedRun:
    """A context in which one call of a pipeline is guided.

    Args:
        pipe: the pipeline.
        guidances: the attached guidances by name.
        arguments: the arguments of the pipeline's call, defaults included.
        rows: `"auto"` lets branches share the pipeline's call from the block on where they begin to differ, `"batched"`
            from its beginning, and `"sequential"` makes each a call of its own.
        max_rows: most rows in one call; `None` for no limit.
    """

    def __init__(
        self,
        pipe: Any,
        guidances: Mapping[str, Guidance],
        arguments: Mapping[str, Any],
        rows: str = "auto",
        max_rows: int | None = None,
    ) -> None:
        self.pipe, self.arguments, self.rows, self.max_rows = pipe, arguments, rows, max_rows
        self.guidances = {name: guidances[name] for name in ordered(guidances)}
        self.stack = ExitStack()
        self.evaluations = self.forward_calls = 0
        self.clocks: dict[int, Clock] = {}
        self.denoisers: dict[int, Denoiser] = {}
        self._calls: list[Call] = []
        self._inside = False
        self._paired: dict[int, Any] = {}
        self._schedulers = schedulers_of(pipe)
        self._row_delta: float | None = None
        self._views: dict[str, SetupView] = {}

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
            if "gradient" in guidance.needs and torch.is_inference_mode_enabled():
                raise ConflictError(
                    f"{guidance.label} needs gradients, which torch.inference_mode() forbids for good. Call the "
                    "pipeline outside of it; torch.no_grad() is fine."
                )
        needing = [name for name, guidance in self.guidances.items() if needs_level(guidance)]
        self._algebras = {id(s): algebra_or_none(s, needing) for s in self._schedulers}
        self.conditions = Conditions(self.pipe, self.arguments, self.stack)
        for module in denoisers_of(self.pipe):
            self.denoisers[id(module)] = Denoiser(module, self.conditions, self.stack)
        self.families = [denoiser.family for denoiser in self.denoisers.values()]
        for name, guidance in self.guidances.items():
            view = self._views[name] = SetupView(name, self, dry=False)
            self.stack.callback(guidance.teardown, view)
            with annotated(name, "setup"):
                guidance.setup(view)
        for module in denoisers_of(self.pipe):
            tap_call(self.stack, module, self._on_call)
        for scheduler in self._schedulers:
            tap_scheduler(self.stack, scheduler, self._on_step, self._on_scale)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.close()
        self._calls.clear()

    # -- the denoiser's call ---------------------------------------------------------------------------------------
    def _on_call(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self._counted(original)(*args, **kwargs)
        denoiser = self.denoisers[id(module)]
        rows = input_rows(args, kwargs)
        ordinal = len([call for call in self._calls if call.module is module])
        roles = denoiser.roles(ordinal, rows, kwargs)
        step = self._peek(module, args, kwargs)
        acting = self._acting(step) if step is not None else {}
        branches = self._to_join(denoiser, acting, step, roles)
        call = Call(module, self._counted(original), args, kwargs, rows, roles, torch.empty(0), torch.empty(0))
        with self._within():
            output = self._forward(call, denoiser, acting, branches)
        self._calls.append(call)
        call.output = call.handed_back = primary(output)
        if step is not None and self._edits_rows(denoiser, acting):
            return self._with_row_delta(call, output, acting, step)
        return output

    def _forward(self, call: Call, denoiser: Denoiser, acting: Mapping[str, Guidance], branches: Sequence[Branch]) -> Any:
        if any(needs_graph(guidance) for guidance in acting.values()):
            return call_with_graph(call)
        if branches and call.roles is not None:
            try:
                output, call.extra = denoiser.call_joined(
                    call.original, call.args, call.kwargs, call.roles, branches, share_prefix=self.rows == "auto"
                )
                return output
            except AmbiguousRowsError:
                call.extra = {}
        return call.original(*call.args, **call.kwargs)

    def _to_join(
        self, denoiser: Denoiser, acting: Mapping[str, Guidance], step: Step | None, roles: list[str] | None
    ) -> list[Branch]:
        """The extra branches that may ride along in this call."""
        if step is None or roles is None or "cond" not in roles or self.rows == "sequential" or not denoiser.can_join():
            return []
        own = {OWN[role] for role in roles if role in OWN} | ({UNCOND} if self.pipeline_has_cfg else set())
        extra = [branch for branch in self._wanted(acting, step) if branch not in own]
        rows = len(roles) + roles.count("cond") * len(extra)
        return extra if self.max_rows is None or rows <= self.max_rows else []

    @property
    def pipeline_has_cfg(self) -> bool:
        """Whether the pipeline says of itself that it computes an unconditional prediction."""
        return bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def _counted(self, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forward_calls += 1
            return original(*args, **kwargs)

        return forward

    @contextmanager
    def _within(self) -> Iterator[None]:
        outer, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outer

    # -- the delta on the unconditional row --------------------------------------------------------------------------
    def _edits_rows(self, denoiser: Denoiser, acting: Mapping[str, Guidance]) -> bool:
        """Whether the delta must enter before the pipeline's own rescale, and g is known."""
        if any(guidance.exclusive == "cfg" for guidance in acting.values()) or self._scale_of_cfg() in (None, 1.0):
            return False
        if not any(guidance.overrides("delta") for guidance in acting.values()):
            return False
        if (self.arguments.get("guidance_rescale") or 0.0) > 0:
            return True
        if denoiser.observation is not None:
            return denoiser.observation.rescaled
        # Which of two calls is combined how is seen at the first scheduler step only; until then this way is right for both.
        return len(self._calls) > 1

    def _scale_of_cfg(self) -> float | None:
        names = ("true_cfg_scale", "guidance_scale") if "true_cfg_scale" in self.arguments else ("guidance_scale",)
        for name in names:
            value = self.arguments.get(name)
            if isinstance(value, (int, float)):
                return float(value)
        return None

    def _with_row_delta(self, call: Call, output: Any, acting: Mapping[str, Guidance], step: Step) -> Any:
        uncond = call.where("uncond")
        cond_call = next((earlier for earlier in self._calls if earlier.where("cond")), None)
        g = self._scale_of_cfg()
        if not uncond or cond_call is None or g is None:
            return output
        own = {COND: cond_call.output[cond_call.where("cond")], UNCOND: call.output[uncond]}
        available = {**own, **cond_call.extra}
        missing = extra_of(self._wanted(acting, step), tuple(available))
        denoiser = self.denoisers[id(call.module)]
        for branch in missing:
            with self._within():
                available[branch] = denoiser.call_alone(cond_call, branch, cond_call.roles or [])
        step = dataclasses.replace(step, own=own[UNCOND] + g * (own[COND] - own[UNCOND]))
        cond_call.extra = {branch: available[branch] for branch in available if branch not in own}
        delta = self._delta(acting, step, available)
        if delta is None:
            return output
        edited = call.output.clone()
        edited[uncond] += (delta / (1.0 - g)).to(edited.dtype)
        call.handed_back = edited
        self._row_delta = g
        return with_primary(output, edited)

    # -- scheduler ---------------------------------------------------------------------------------------------------
    def _on_scale(self, scheduler: Any, given: Any, returned: Any) -> None:
        clock = self._clock(scheduler)
        size = float(given.float().norm()) if clock is not None else 0.0
        if clock is not None and size > 0:
            clock.input_scale = float(returned.float().norm()) / size

    def _clock(self, scheduler: Any, timestep: float | None = None) -> Clock | None:
        if id(scheduler) not in self.clocks:
            if getattr(scheduler, "timesteps", None) is None or not len(scheduler.timesteps):
                return None
            algebra = self._algebras.get(id(scheduler), next(iter(self._algebras.values())))
            self.clocks[id(scheduler)] = Clock(scheduler, algebra, timestep)
        return self.clocks[id(scheduler)]

    def _peek(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
        """The step that a denoiser call belongs to, if the scheduler that will consume it is known."""
        scheduler = self._paired.get(id(module), self._schedulers[0] if len(self._schedulers) == 1 else None)
        if scheduler is None:
            return None
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        timestep = float(given.flatten()[0]) if isinstance(given, torch.Tensor) and given.numel() else None
        clock = self._clock(scheduler, timestep)
        return clock.step() if clock is not None else None

    def _on_step(self, scheduler: Any, bound: inspect.BoundArguments, original: Any) -> Any:
        if self._inside:
            return original(*bound.args, **bound.kwargs)
        given = bound.arguments
        clock = self._clock(scheduler, float(torch.as_tensor(given["timestep"]).flatten()[0]))
        assert clock is not None
        clock.locate(given["timestep"])
        step = clock.step()
        acting = self._acting(step)
        calls, self._calls = self._calls, []
        if acting and calls:
            given["model_output"] = self._guided(scheduler, clock, step, acting, calls, given)
        elif acting:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__}: scheduler.step was called without a denoiser call before it, so there is no "
                "prediction to guide. Pipelines with a scheduler for each frame are not supported."
            )
        self._count(calls, given["sample"])
        self._row_delta = None
        with self._within():
            result = original(*bound.args, **bound.kwargs)
        clock.calls += 1
        clock.input_scale = None
        return self._after_step(acting, step, given["sample"], result)

    def _guided(
        self, scheduler: Any, clock: Clock, step: Step, acting: Mapping[str, Guidance], calls: list[Call],
        given: Mapping[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """The model output with all that the acting guidances make of it."""
        model_output, sample = given["model_output"], given["sample"]
        observation, calls = self._observe(calls, model_output, sample)
        batch = observation.batch
        sample, own = sample[:batch], own_channels(model_output, sample)[:batch]
        denoiser = self.denoisers[id(calls[0].module)]
        self._paired[id(calls[0].module)] = scheduler
        self._assign_roles(denoiser, observation, calls)

        def convert(rows: torch.Tensor) -> torch.Tensor:
            converted = observation.view.of(rows)
            converted = converted if observation.gain == 1.0 else observation.gain * converted
            return converted if observation.on_sample == 0.0 else converted + observation.on_sample * sample

        available: dict[Branch, torch.Tensor] = {}
        for call in calls:
            for role, branch in OWN.items():
                if call.where(role):
                    available[branch] = convert(call.output[call.where(role)])
            available.update({branch: convert(rows) for branch, rows in call.extra.items()})
        cond_call = next(call for call in calls if call.where("cond"))
        for branch in extra_of(self._wanted(acting, step), tuple(available)):
            with self._within():
                rows = denoiser.call_alone(cond_call, branch, cond_call.roles or [])
            cond_call.extra[branch] = rows
            available[branch] = convert(rows)

        step = dataclasses.replace(step, sample=sample, own=own)
        total = own
        if self._row_delta is None:
            delta = self._delta(acting, step, available)
            total = own if delta is None else (own + delta).to(own.dtype)
        else:
            total = self._corrected(own, observation, acting, step, available)
        for name, guidance in acting.items():
            if guidance.overrides("project"):
                with annotated(name, "project", step):
                    total = guidance.project(self._view_of(name, step), total, available).to(own.dtype)
        total = guide_clean_estimate(self, clock, acting, step, total, observation, calls)
        if model_output.shape[1:] != total.shape[1:]:
            total = torch.cat([total, model_output[:batch, total.shape[1] :]], dim=1)
        return total if observation.copies == 1 else torch.cat([total] * observation.copies)

    def _corrected(
        self, own: torch.Tensor, observation: Observation, acting: Mapping[str, Guidance], step: Step,
        available: Mapping[Branch, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """`own`, into which a delta was handed on the unconditional row; mended where the pipeline's g was another.

        With weights `1 - g'` and `g'` instead of `1 - g` and `g`, the delta arrived times `(1 - g') / (1 - g)`.
        """
        g = self._row_delta
        if observation.rescaled or g is None or len(observation.weights) != 2 or not observation.certain:
            return own
        arrived = min(observation.weights) * observation.gain / (1.0 - g)
        if abs(arrived - 1.0) < 10 * TOLERANCE:
            return own
        delta = self._delta(acting, step, available)
        return own if delta is None else own + (1.0 - arrived) * delta

    def _observe(
        self, calls: list[Call], model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[Observation, list[Call]]:
        """How `model_output` came about, and the calls that took part in it."""
        kind = type(self.pipe).__name__
        for module in dict.fromkeys(call.module for call in reversed(calls)):
            chosen = [call for call in calls if call.module is module]
            found = observe([call.handed_back for call in chosen], model_output, sample)
            if found is not None and found.residual <= UNRELATED:
                return found, chosen
        shapes = ", ".join(str(tuple(call.output.shape)) for call in calls)
        raise UnsupportedPipelineError(
            f"{kind}: the scheduler was given a {tuple(model_output.shape)} that does not follow from the denoiser's "
            f"output ({shapes}) by a combination of rows and a slice, so a guidance term cannot be handed to it."
        )

    def _assign_roles(self, denoiser: Denoiser, observation: Observation, calls: list[Call]) -> None:
        """Settle each row's role by what was observed, and drop branches that were computed for the wrong rows."""
        batch, group = observation.batch, 0
        seen = observation.roles
        trusted = observation.certain and observation.residual <= TOLERANCE
        for ordinal, call in enumerate(calls):
            groups = call.output.shape[0] // batch
            roles = [role for role in seen[group : group + groups] for _ in range(batch)]
            weights = observation.weights[group : group + groups]
            group += groups
            told = call.roles
            partial = told is not None and any(told.count(role) % batch for role in set(told))
            contradicted = trusted and told != roles and max(map(abs, weights)) > TOLERANCE
            if told is None or partial or contradicted:
                call.extra = {}
                call.roles = roles
            if denoiser.observation is not None or trusted:
                denoiser.observed_roles[ordinal, call.output.shape[0]] = call.roles
        if not any(call.where("cond") for call in calls):
            calls[0].roles = ["cond"] * batch + (calls[0].roles or [])[batch:]
        denoiser.observation = observation

    # -- hooks -------------------------------------------------------------------------------------------------------
    def _acting(self, step: Step) -> dict[str, Guidance]:
        return {name: guidance for name, guidance in self.guidances.items() if guidance.acts(step)}

    def _view_of(self, name: str, step: Step) -> Step:
        return dataclasses.replace(step, state=self._views[name].state)

    def _wanted(self, acting: Mapping[str, Guidance], step: Step) -> tuple[Branch, ...]:
        return wanted_branches(acting, {name: self._view_of(name, step) for name in acting})

    def _delta(
        self, acting: Mapping[str, Guidance], step: Step, predictions: Mapping[Branch, torch.Tensor]
    ) -> torch.Tensor | None:
        """The sum of all deltas."""
        total: torch.Tensor | None = None
        for name, guidance in acting.items():
            if guidance.overrides("delta"):
                with annotated(name, "delta", step):
                    delta = guidance.delta(self._view_of(name, step), predictions)
                if delta is not None:
                    total = delta if total is None else total + delta
        return total

    def _after_step(self, acting: Mapping[str, Guidance], step: Step, sample: torch.Tensor, result: Any) -> Any:
        editing = {name: guidance for name, guidance in acting.items() if guidance.overrides("after_step")}
        if not editing:
            return result
        following = primary(result)
        for name, guidance in editing.items():
            with annotated(name, "after_step", step):
                view = dataclasses.replace(self._view_of(name, step), sample=sample)
                following = guidance.after_step(view, following).to(following.dtype)
        return with_primary(result, following)

    def _count(self, calls: Sequence[Call], sample: torch.Tensor) -> None:
        for call in calls:
            batch = self.denoisers[id(call.module)].observation
            rows = call.output.shape[0]
            self.evaluations += rows // (batch.batch if batch is not None else min(rows, sample.shape[0]))
            self.evaluations += len(call.extra)


def needs_level(guidance: Guidance) -> bool:
    """Whether a guidance cannot act without knowing alpha and sigma."""
    windowed = guidance.sigma_min > 0 or guidance.sigma_max != float("inf")
    return windowed or guidance.overrides("guide_x0") or guidance.overrides("loss") or "level" in guidance.needs


def call_with_graph(call: Call) -> Any:
    """The pipeline's call with a gradient graph from its sample to its output, of which the pipeline sees nothing."""
    position = next(i for i, value in enumerate((*call.args, *call.kwargs.values())) if isinstance(value, torch.Tensor))
    args, kwargs = list(call.args), dict(call.kwargs)
    with torch.enable_grad():
        if position < len(args):
            call.leaf = args[position] = args[position].detach().requires_grad_(True)
        else:
            name = list(kwargs)[position - len(args)]
            call.leaf = kwargs[name] = kwargs[name].detach().requires_grad_(True)
        output = call.original(*args, **kwargs)
    call.graph = primary(output)
    return with_primary(output, call.graph.detach())


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
