"""The forward calls of one run: which branches ride along in the pipeline's calls, and which are calls of their own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.branch import Branch, Point
from ..guidance.planner import extra_of
from ..guidance.run import AroundDenoiser, Step
from .budget import Budget, is_out_of_memory
from .call import OWN, Call, branches_of, watched_by
from .clean import needs_graph
from .denoiser import Denoiser
from .graph import call_with_graph
from .hooks import Hooks
from .layout import may_join
from .meter import GraphMeter
from .others import OtherDenoisers
from .parallel.branches import BranchParallel
from .prediction import beside_primary, is_prediction, primary
from .rows import AmbiguousRowsError

logger = logging.getLogger("trimtab")


class Forwards:
    """Makes the forward calls of one run, and counts them.

    Args:
        hooks: of the run's guidances.
        denoisers: the pipeline's candidates, by the id of the module.
        others: further denoisers that branches name.
        own: the branches that the pipeline computes by itself.
        around: what guidances put around each call.
        rows, parallel: see `GuidedRun`.
        budget: the most rows of one call.

    Attributes:
        meter: weighs the gradient graphs of calls.
        made: forward calls so far.
        evaluations: predictions of one image so far.
        inside: whether a call is being made, of the denoiser or the scheduler, in which neither is followed.
    """

    def __init__(
        self, hooks: Hooks, denoisers: Mapping[int, Denoiser], others: OtherDenoisers, own: Sequence[Branch],
        around: Sequence[AroundDenoiser], meter: GraphMeter, rows: str, budget: Budget,
        parallel: BranchParallel | None,
    ) -> None:  # fmt: skip
        self._hooks, self._denoisers, self._others, self._own = hooks, denoisers, others, own
        self._around, self._parallel = around, parallel
        self._rows, self._budget = rows, budget
        # What is put around a call sees all its rows.
        budget.splits = not around
        self.meter = meter
        self.made = self.evaluations = 0
        self.inside = False

    def denoiser_of(self, call: Call) -> Denoiser:
        """The denoiser that a call is of."""
        return self._denoisers[id(call.module)]

    @contextmanager
    def within(self) -> Iterator[None]:
        """The time of a call."""
        outer, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = outer

    def counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A denoiser's forward, each call of which is counted."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.made += 1
            return output

        return forward

    def count(self, calls: Sequence[Call], sample: torch.Tensor, acting: Mapping[str, Guidance], step: Step) -> None:
        """Count what the calls of a step predicted, each prediction once, the companions' included.

        Args:
            sample: x_t as the scheduler was given it.
        """
        together = 1 + sum(guidance.companions(step) for guidance in acting.values())
        if apart := sum(guidance.companions_apart(step) for guidance in acting.values()):
            self.evaluations += apart * len(self._own)
            self.made += 1
        for call in calls:
            observed, rows = self.denoiser_of(call).observation, call.output.shape[0]
            # Some pipelines hand the scheduler several copies of the sample.
            images = call.roles.count(call.roles[0]) if call.roles else min(rows, sample.shape[0])
            own = rows // (observed.batch if observed is not None else images)
            solitary = sum(branch.solitary for branch in call.extra)
            evaluations = (own + len(call.extra) + call.dropped - solitary) * together + solitary
            self.evaluations += max(evaluations - call.counted, 0)
            call.counted = max(evaluations, call.counted)

    # -- the pipeline's calls --------------------------------------------------------------------------------------
    def make(self, call: Call, acting: Mapping[str, Guidance], step: Step | None, earlier: Sequence[Call] = ()) -> Any:
        """Make a call of the pipeline, with the branches that may ride along in it.

        Args:
            earlier: calls of the same step; what rode along in one of the same sample is not computed again.

        Returns:
            What the denoiser returned for the pipeline's own rows; predictions are noted in the call.
        """
        with self.within():
            output = self._output(call, acting, step, earlier)
        if is_prediction(output):
            call.output = call.handed_back = primary(output)
            call.beside = beside_primary(output)
        return output

    def _output(self, call: Call, acting: Mapping[str, Guidance], step: Step | None, earlier: Sequence[Call]) -> Any:
        alike = [other for other in earlier if other.module is call.module and other.given is call.given]
        computed = {branch for other in alike for branch in other.extra}
        branches = [branch for branch in self._joining(call, acting, step) if branch not in computed]
        if step is not None and any(needs_graph(g, self._hooks.view(name, step)) for name, g in acting.items()):
            return call_with_graph(call, self.meter)
        denoiser = self.denoiser_of(call)
        points = self._hooks.points(acting, step) if step is not None else ()
        # What is put around a call, and a step cache, is in every process by itself.
        alone = self._around or call.rows is None or not denoiser.can_join()
        parallel = None if alone else self._parallel
        if (branches and call.roles is not None) or parallel is not None:
            try:
                return denoiser.call_joined(call, branches, self._rows == "auto", points, parallel)
            except AmbiguousRowsError:
                call.extra, call.watched = {}, {}
            except RuntimeError as error:
                if not (branches and is_out_of_memory(error)):
                    raise
                # A call that cannot be made in pieces; each branch is a call of its own from here on.
                call.extra, call.watched, self._rows = {}, {}, "sequential"
                logger.warning("%d branches more do not fit into memory: each is a call of its own", len(branches))
        return denoiser.call_own(call, points)

    def _joining(self, call: Call, acting: Mapping[str, Guidance], step: Step | None) -> list[Branch]:
        """The branches that may ride along in a call."""
        denoiser, roles = self.denoiser_of(call), call.roles
        if step is None or roles is None or "cond" not in roles or self._rows == "sequential":
            return []
        if not denoiser.can_join():
            return []
        own = {OWN[role] for role in roles if role in OWN} | set(self._own)
        asked = [branch for branch in self._hooks.wanted(acting, step) if denoiser.family.is_moved_by(branch)]
        here = branches_of(roles)
        extra = [branch for branch in asked if branch not in own and may_join(branch, here)]
        rows = len(roles) + roles.count("cond") * len(extra)
        whole = not self._budget.splits and self._budget.rows is not None and rows > self._budget.rows
        return [] if whole else extra

    # -- further branches ------------------------------------------------------------------------------------------
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
        own = self._denoisers[id(cond_call.module)]
        points = self._hooks.points(acting, step)
        missing = extra_of(self._hooks.wanted(acting, step), tuple(available))
        for branch in missing:
            if not own.family.is_moved_by(branch) and branch.point is None:
                available[branch] = available[Branch(branch.condition)]
        for together in _generations(branch for branch in missing if branch not in available):
            for branch in together:
                if branch.point is not None:
                    parent = available[branch.point.parent]
                    cond_call.at[branch] = branch.point.sample(step, parent, watched_by(branch.point, calls))
            cond_call.extra.update(self._each(cond_call, together, step, points))
            for branch in together:
                available[branch] = convert(cond_call.extra[branch], cond_call.at.get(branch))
        return dataclasses.replace(step, points={branch: x for call in calls for branch, x in call.at.items()})

    def _each(
        self, call: Call, branches: Sequence[Branch], step: Step, points: Sequence[Point]
    ) -> dict[Branch, torch.Tensor]:
        """The raw rows of branches that are calls of their own and do not follow from each other."""

        def compute(branch: Branch) -> torch.Tensor:
            return self._alone(call, branch, step, points)

        # A process needs what it watched, and what its step cache remembers, again.
        watched = {point.parent for point in points}
        alone = self._around or self.denoiser_of(call).contexts.has_step_cache or not watched.isdisjoint(branches)
        if self._parallel is None or alone:
            return {branch: compute(branch) for branch in branches}
        before = self.made
        like, given = call.output[call.where("cond")], (call.args, call.kwargs)
        found = self._parallel.each(branches, compute, like, given, self._budget)
        self.made = before + len(branches)
        return found

    def _alone(self, call: Call, branch: Branch, step: Step, points: Sequence[Point]) -> torch.Tensor:
        """The raw rows of a branch as a call of its own, with the arguments of one that holds the conditional rows."""
        denoiser, original = self.denoiser_of(call), call.original
        if branch.denoiser is not None:
            denoiser, original = self._others.of(branch.denoiser)
            original = self.counted(original)
        moved = None
        if branch in call.at:
            assert step.sample is not None
            moved = step.sample, call.at[branch]
        watching = tuple(point for point in points if point.parent == branch)
        with self.within():
            return denoiser.call_alone(call, branch, original, watching, moved)


def _generations(branches: Iterable[Branch]) -> list[tuple[Branch, ...]]:
    """Branches by the number of predictions that each follows from, in order."""
    found: dict[int, list[Branch]] = {}
    for branch in branches:
        found.setdefault(len(branch.lineage), []).append(branch)
    return [tuple(found[number]) for number in sorted(found)]
