"""`GuidanceStack`: the same plug-ins in Diffusers' modular pipelines, as the guider that those ask for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import nn

from ..guidance import recipe
from ..guidance.base import Guidance
from ..guidance.branch import COND, UNCOND
from ..guidance.errors import ParameterError, RecipeError
from ..guidance.order import ordered
from ..guidance.planner import Plan, PlannedStep, extra_of
from ..guidance.run import Step
from .attaching import Guidable
from .budget import Budget
from .clock import planned_clock
from .explain import row_of
from .stack_run import Foresight, StackRun, step_of

logger = logging.getLogger("trimtab")


class GuidanceStack(Guidable, BaseGuidance):
    """A guider for modular pipelines, made of any number of guidances.

    pipe.update_components(guider=trimtab.GuidanceStack("cfg", "pag"))

    Without any guidance the prediction is the conditional one. The unconditional prediction is asked of the pipeline
    where a guidance needs it; all other branches ride along in the conditional call. Phases 1 to 4 work; a guidance
    that needs x_t, the noise level, the scheduler or a text encoder is refused when it is attached, since a guider is
    given none of them.

    Args:
        guidances: names of plug-ins, guidances, or guiders of Diffusers.
        recipe: guidances from a recipe, as `config` keeps them.
        enabled: whether it guides at all; modular pipelines switch it off for distilled models.

    Raises:
        UnsupportedPipelineError, ParameterError, ConflictError: as `add_guidance`.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012

    guidance_rows: str = "auto"
    """As `guidance_rows` of a guided pipeline; the unconditional prediction is always a call of its own."""

    guidance_max_rows: int | None = None
    """As `guidance_max_rows` of a guided pipeline: the most rows of one denoiser call."""

    def __init__(
        self, *guidances: str | Guidance | BaseGuidance, recipe: Mapping[str, Any] | None = None, enabled: bool = True
    ) -> None:
        super().__init__(enabled=enabled)
        self._run: StackRun | None = None
        self._foresight: Foresight | None = None
        if recipe is not None:
            self._load(recipe)
        for guidance in guidances:
            self.add_guidance(guidance)

    def _load(self, data: Mapping[str, Any]) -> None:
        for name, guidance in recipe.load({**data}).items():
            self.add_guidance(guidance, name=name)

    # -- what is attached ------------------------------------------------------------------------------------------
    def _plan(
        self, guidances: Mapping[str, Guidance], num_inference_steps: int | None, call: Mapping[str, Any]
    ) -> Plan:
        if unknown := call.keys() - {"scheduler"}:
            raise ParameterError(f"GuidanceStack: a plan takes no {', '.join(sorted(unknown))}; it takes: scheduler.")
        count, scheduler = num_inference_steps or 50, call.get("scheduler")
        steps, kind = [step_of(index, count) for index in range(count)], "a scheduler of even timesteps"
        if scheduler is not None:
            times = planned_clock(copy.deepcopy(scheduler), None, num_inference_steps=count).timesteps
            steps = [step_of(index, max(count, index + 1), t) for index, t in enumerate(times)]
            kind = type(scheduler).__name__
        with closing(Foresight({name: guidances[name] for name in ordered(guidances)})) as ahead:
            return self._plan_of(ahead, steps, kind)

    def _plan_of(self, ahead: Foresight, steps: Sequence[Step], scheduler: str) -> Plan:
        planned = []
        asked: dict[str, list[int]] = {name: [] for name in ahead.guidances}
        for step in steps:
            wanted, acting = ahead.wanted(step), ahead.acting(step)
            own = (COND, UNCOND) if UNCOND in wanted else (COND,)
            extra = extra_of(wanted, own)
            for name, guidance in acting.items():
                asked[name].append(len(extra_of(guidance.branches(ahead.view(name, step)), (COND,))))
            apart = [branch for branch in extra if branch.apart or self.guidance_rows == "sequential"]
            planned.append(PlannedStep(step.index, tuple(acting), own, extra, len(own) + len(apart)))
        rows = tuple(row_of(name, one, ahead.views[name], asked[name]) for name, one in ahead.guidances.items())
        most = self.guidance_max_rows
        bound = f"at most {most} rows a call: how many pieces that makes depends on the number of images"
        notes = () if most is None else (bound,)
        return Plan(type(self).__name__, scheduler, tuple(planned), rows, notes=notes)

    def explain_guidance(self, num_inference_steps: int | None = None, **call: Any) -> Plan:
        """Print what a call would do, and return the plan. Nothing is computed.

        Args:
            num_inference_steps: as in the call; 50 if not given.
            **call: `scheduler`, the pipeline's, whose timesteps no guider is told before a run. Without it they count
                as even, which matters to a guidance that goes by them, such as `pag` with an `adaptive_scale`.
        """
        return super().explain_guidance(num_inference_steps, **call)

    @property
    def _internal_dict(self) -> FrozenDict:
        """The configuration that Diffusers saves: the recipe of what is attached now."""
        try:
            return FrozenDict(recipe=recipe.dump(self.guidances), enabled=self._enabled)
        except RecipeError as error:
            logger.warning("This GuidanceStack cannot be saved: %s", error)
            return FrozenDict(recipe=None, enabled=self._enabled)

    def register_to_config(self, **kwargs: Any) -> None:
        """Nothing to do: the configuration is what is attached."""

    def __repr__(self) -> str:
        return f"GuidanceStack({', '.join(f'{name}={guidance!r}' for name, guidance in self.guidances.items())})"

    # -- what a modular pipeline calls -----------------------------------------------------------------------------
    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begin a step; one that is not later than the last begins a run."""
        if self._foresight is None or self._step is None or step <= self._step:
            self.close()
            self._foresight = Foresight(dict(self.guidances))
        super().set_state(step, num_inference_steps, timestep)

    def close(self) -> None:
        """End a run that an exception left unfinished; otherwise its last step ends it, or the next run's first."""
        for part in (self._run, self._foresight):
            if part is not None:
                part.close()
        self._run = self._foresight = None

    @property
    def _now(self) -> Any:
        given = self._timestep
        timestep = float(torch.as_tensor(given).flatten()[0]) if given is not None else None
        return step_of(self._step, max(self._num_inference_steps or 1, self._step + 1), timestep)

    @property
    def num_conditions(self) -> int:
        """Predictions asked of the pipeline at this step; between runs, the most that a step may ask for."""
        if not self._enabled:
            return 1
        if self._foresight is None:
            with closing(Foresight(dict(self.guidances))) as ahead:
                return 1 + ahead.ever_unconditional()
        return 1 + (UNCOND in self._foresight.wanted(self._now))

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    def prepare_inputs(self, data: Any) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in enumerate(names)
        ]

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if not self._enabled:
            return
        if self._run is None or self._run.module is not denoiser:
            if self._run is not None:
                self._run.close()
            self._run = StackRun(self.guidances, denoiser, self.guidance_rows, Budget(self.guidance_max_rows))
        self._run.tap(self._now, "cond" if self.is_conditional else "uncond")

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        pred = pred_cond
        if self._enabled and self._run is not None:
            pred = self._run.combine(self._now, pred_cond, pred_uncond)
            if self._step + 1 >= (self._num_inference_steps or 0):
                self.close()
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()
