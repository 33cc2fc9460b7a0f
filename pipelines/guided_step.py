"""One evaluation of a step: phases 2 to 5, from the pipeline's own combination to what its scheduler is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.branch import Branch
from ..guidance.errors import ConflictError, UnsupportedPipelineError
from ..guidance.run import Step
from .call import OWN, Call
from .clean import CleanPhase, edits_clean_estimate, needs_graph
from .forwards import Forwards
from .graph import call_with_graph
from .hooks import Hooks
from .observation import Observation
from .recurrence import check_repeatable, noised_back
from .renoising import renoise
from .row_delta import RowDelta


@dataclasses.dataclass(frozen=True)
class GuidedStep:
    """One evaluation of a step at which guidances act.

    Args:
        hooks, forwards, row_delta: the run's.
        acting: the guidances, by name.
        observation: how the pipeline combines its calls.
        step: with x_t.
        calls: the pipeline's, at this x_t.
        own: what the pipeline made of them `[batch, ...]`.
    """

    hooks: Hooks
    forwards: Forwards
    row_delta: RowDelta
    acting: Mapping[str, Guidance]
    observation: Observation
    step: Step
    calls: Sequence[Call]
    own: torch.Tensor

    def __post_init__(self) -> None:
        # Under autocast a prediction is less precise than the sample, which several schedulers return likewise.
        assert self.step.sample is not None
        dtype = torch.promote_types(self.own.dtype, self.step.sample.dtype)
        object.__setattr__(self, "own", self.own.to(dtype))

    def guided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the guidances make of the pipeline's own combination, and of x_t `[batch, ...]`."""
        available: dict[Branch, torch.Tensor] = {}
        for call in self.calls:
            for role, branch in OWN.items():
                if call.where(role):
                    available[branch] = self._convert(call.output[call.where(role)])
        step = dataclasses.replace(self.step, own=self.own)
        step = self.forwards.compute_missing(self.calls, self.acting, step, available, self._convert)
        total = self._summed(step, available)
        total = self.hooks.project(self.acting, step, total, available)
        if any(edits_clean_estimate(guidance) for guidance in self.acting.values()):
            total = self._clean_edited(step, total)
        total = self.observation.kept(self.own, total)
        return renoise(self.hooks, self.acting, step, total, available)

    def again(self, prediction: torch.Tensor, scheduler: Any, generator: Any) -> GuidedStep:
        """The evaluation at an x_t noised back from where `prediction` leads, its calls made.

        Raises:
            UnsupportedPipelineError, UnsupportedSchedulerError: the pipeline's combination or scheduler forbids it.
            ConflictError: another guidance does.
        """
        acting, observation, step = self.acting, self.observation, self.step
        asking = max(acting, key=lambda name: acting[name].repeats(self.hooks.view(name, step)))
        check_repeatable(scheduler, asking)
        if once := [name for name, guidance in acting.items() if not guidance.repeatable]:
            raise ConflictError(
                f"{asking}: repeats above 1 are not possible beside {once[0]}, which goes a step of its own with each "
                f"step of the pipeline; remove {once[0]}, or let {asking} evaluate each step once."
            )
        if not observation.exact or observation.rescaled or observation.held is not None:
            raise UnsupportedPipelineError(
                f"{asking}: repeats above 1 are not possible where the pipeline rescales its own combination or holds "
                "parts of it; call it without guidance_rescale, or with a guidance scale of 1 and the plug-in 'cfg'."
            )
        assert step.sample is not None
        x_t = noised_back(step, prediction, lambda onward: self.hooks.after_step(acting, step, onward), generator)
        calls = []
        for ordinal, earlier in enumerate(self.calls):
            denoiser = self.forwards.denoiser_of(earlier)
            call = denoiser.call_at(earlier, observation.batch, step.sample, x_t)
            with denoiser.contexts.inner(f"trimtab_again_{call.context or ordinal}"):
                self.forwards.make(call, acting, step)
            calls.append(call)
        own = observation.combine([call.output for call in calls], x_t)
        return dataclasses.replace(self, step=dataclasses.replace(step, sample=x_t), calls=calls, own=own)

    def _convert(self, rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """A denoiser's rows in the scheduler's parametrisation; at x_t, or at another point."""
        seen, at = self.observation, self.step.sample if at is None else at
        assert at is not None
        converted = seen.view.of(rows)
        converted = converted if seen.gain == 1.0 else seen.gain * converted
        return converted if seen.on_sample == 0.0 else converted + seen.on_sample * at

    def _summed(self, step: Step, available: Mapping[Branch, torch.Tensor]) -> torch.Tensor:
        """Phase 3: the pipeline's combination with all deltas."""
        if self.row_delta.handed_with is not None:
            return self.row_delta.corrected(self.own, self.observation, self.acting, step, available)
        delta = self.hooks.delta(self.acting, step, available)
        return self.own if delta is None else (self.own + delta).to(self.own.dtype)

    def _clean_edited(self, step: Step, total: torch.Tensor) -> torch.Tensor:
        """Phase 5, on the clean estimate of `total`."""
        if any(needs_graph(guidance, self.hooks.view(name, step)) for name, guidance in self.acting.items()):
            for call in self.calls:
                # Before the first scheduler step it may not be known which one a denoiser works for.
                if call.graph is None:
                    call_with_graph(call, self.forwards.meter)
        return CleanPhase(self.hooks, step, total, self.observation, self.calls, self.forwards.meter).guided(
            self.acting
        )
