"""One denoiser within one run: its calls, the roles of its rows, and the calls made for extra branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..guidance.branch import Branch, Point
from ..guidance.errors import TrimtabError, UnsupportedPipelineError
from .budget import Budget, is_out_of_memory
from .call import Call, branches_of, with_sample
from .conditions import Conditions
from .contexts import Contexts
from .families import Family
from .layout import Layout, Segment, lay_out
from .observation import TOLERANCE, Observation
from .parallel.branches import BranchParallel
from .perturbation import Perturber
from .prediction import primary, with_sample_at
from .rows import AmbiguousRowsError, check_splittable, index_of, join_rows, take_rows

_OF_PICTURES = ("Flux2KVCache", "GlmImageKVCache")
"""Caches that keep keys and values of given pictures only, which see no prompt, so that any prompt may read them."""


class Denoiser:
    """Follows one candidate module through a run.

    Args:
        budget: the most rows of one call, shared by the denoisers of a run.
    """

    def __init__(
        self, module: nn.Module, conditions: Conditions, stack: ExitStack, budget: Budget | None = None
    ) -> None:
        self.module = module
        self.budget = Budget() if budget is None else budget
        self.family = Family(module)
        self.perturber = Perturber(self.family)
        self.observation: Observation | None = None
        self.observed_roles: dict[tuple[int, int], list[str]] = {}
        self._conditions = conditions
        self.contexts = Contexts(module, self.family.module, stack)
        self._names: dict[Branch, str] = {}
        self._joinable = self._shareable = True

    # -- roles -----------------------------------------------------------------------------------------------------
    def roles(self, ordinal: int, rows: int | None, kwargs: Mapping[str, Any]) -> list[str] | None:
        """The roles of a call's rows before it is made: observed earlier, or told by context name or condition."""
        if rows is None:
            return None
        if (ordinal, rows) in self.observed_roles:
            return self.observed_roles[ordinal, rows]
        words = set((self.contexts.present or "").replace("pred_", "").split("_"))
        if words == {"cond"} or words == {"uncond"}:
            return [words.pop()] * rows
        return self._conditions.roles(self.module, kwargs, rows)

    def roles_of_output(self, ordinal: int, call: Call) -> list[str] | None:
        """The roles of a call's rows once it is made, where only its output tells how many there are."""
        told = self.observed_roles.get((ordinal, len(call.output)))
        return told or self._conditions.roles_in_list([*call.args, *call.kwargs.values()], len(call.output))

    def settle_roles(self, observation: Observation, calls: Sequence[Call]) -> None:
        """Settle each row's role by what was observed, and drop branches that were computed for the wrong rows."""
        batch, group = observation.batch, 0
        seen = observation.roles
        trusted = observation.certain and observation.exact
        for ordinal, call in enumerate(calls):
            groups = call.output.shape[0] // batch
            roles = [role for role in seen[group : group + groups] for _ in range(batch)]
            weights = observation.weights[group : group + groups]
            group += groups
            told = call.roles
            counts = {role: told.count(role) for role in set(told)} if told is not None else {}
            partial = any(count % batch for count in counts.values()) or counts.get("cond", 0) > batch
            contradicted = trusted and told != roles and max(w.abs().max() for w in weights) > TOLERANCE
            if told is None or partial or contradicted:
                call.drop_misplaced(roles)
                call.roles = roles
            if self.observation is not None or trusted:
                self.observed_roles[ordinal, call.output.shape[0]] = call.roles or roles
        if not any(call.where("cond") for call in calls):
            calls[0].roles = ["cond"] * batch + (calls[0].roles or [])[batch:]
        self.observation = observation

    def can_join(self) -> bool:
        """Whether further rows may share the pipeline's own call: not where a step cache would see them."""
        return self._joinable and not self.contexts.has_step_cache

    def call_at(self, call: Call, batch: int, sample: torch.Tensor, x_t: torch.Tensor) -> Call:
        """The same call at another x_t, with the controls that belong to it, not made yet; see `call.with_sample`."""
        call = with_sample(call, batch, sample, x_t)
        args, kwargs = self._conditions.controlled_at(call.args, call.kwargs, batch, sample, x_t)
        return replace(call, args=args, kwargs=kwargs)

    # -- calls -----------------------------------------------------------------------------------------------------
    def call_own(self, call: Call, points: tuple[Point, ...]) -> Any:
        """The pipeline's call as it is, in which points watch attention."""
        rows = call.rows or 1
        layout = Layout(rows, tuple(range(rows)), points=points, branches=branches_of(call.roles))
        output = self._within_budget(call.original, layout, call.args, call.kwargs)
        call.watched = self.perturber.watched
        return output

    def call_joined(
        self, call: Call, branches: Sequence[Branch], share_prefix: bool = True, points: tuple[Point, ...] = (),
        parallel: BranchParallel | None = None,
    ) -> Any:  # fmt: skip
        """The pipeline's call with further rows; returns its own part of the output, the rest goes to `call`.

        With `share_prefix`, perturbed rows are computed only from their first perturbed block on; with `parallel`, each
        process computes a share of the rows, or all where points watch them.

        Raises:
            AmbiguousRowsError: an argument does not split into rows without doubt, or a branch has no parent here.
        """
        args, kwargs, roles = call.args, call.kwargs, call.roles or [""] * (call.rows or 1)
        rows = len(roles)
        check_splittable(args, kwargs, rows)
        layout, sources = lay_out(branches_of(roles), branches, self.family.joins_at if share_prefix else None, points)
        parts = [(tuple(args), dict(kwargs))]
        for branch, source in sources.items():
            part = take_rows(parts[0], rows, index_of(source))
            if branch.condition not in roles:
                part = self._conditions.substitute(branch.condition, self.module, *part)
            parts.append(part)
        all_args, all_kwargs = join_rows(parts, [rows, *map(len, sources.values())])
        try:
            if parallel is None:
                output = self._within_budget(call.original, layout, all_args, all_kwargs)
            else:
                output = self._shared(parallel, call.original, layout, all_args, all_kwargs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, TrimtabError) or is_out_of_memory(error):
                raise
            # Something among the arguments has no rows although it looked so, such as one mask for the whole batch.
            self._joinable = False
            raise AmbiguousRowsError(f"the denoiser takes no {layout.total} rows: {error}") from error
        whole = primary(output)
        if whole.shape[0] != layout.total:
            raise AmbiguousRowsError(f"the denoiser returned {whole.shape[0]} rows for {layout.total}")
        spans = {branch: layout.rows_of(branch) for branch in sources}
        call.extra = {branch: whole[span] for branch, span in spans.items()}
        for (point, layer), kept in self.perturber.watched.items():
            call.watched[point, layer] = kept[:rows]
            if point.parent in spans:
                call.extra_watched[point, layer] = kept[spans[point.parent]]
        return take_rows(output, layout.total, slice(0, rows))

    def _shared(
        self, parallel: BranchParallel, original: Callable[..., Any], layout: Layout, args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """A call that several processes share; where it cannot be, it is not tried again."""
        whole = bool(layout.points) or not self._shareable
        try:
            return parallel.call(self.budget, self.perturber, original, layout, args, kwargs, whole)
        except AmbiguousRowsError:
            self._shareable = False
            raise

    def _within_budget(
        self, original: Callable[..., Any], layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call in as many pieces as it needs; whole where a step cache remembers its rows."""
        if self.contexts.has_step_cache:
            return self.perturber.call(original, layout, args, kwargs)
        return self.budget.call(self.perturber, original, layout, args, kwargs)

    def call_alone(
        self, call: Call, branch: Branch, original: Callable[..., Any], points: tuple[Point, ...] = (),
        moved: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """A branch as a call of its own with the pipeline's arguments; returns its raw rows.

        Args:
            call: one that holds the conditional rows; what points keep of attention goes there.
            original: this denoiser's forward.
            points: those that watch this branch.
            moved: x_t and the other point `[batch, ...]` at which the branch is evaluated.
        """
        with self._conditions.visiting():
            args, kwargs, chosen, count = self._arguments_of(call, branch, moved)
        segments = () if branch.perturbation is None else (Segment(0, count, branch.perturbation, -1),)
        layout = Layout(count, tuple(range(count)), segments, points, (branch,) * count)
        name = self._names.setdefault(branch, f"trimtab_{len(self._names)}")
        try:
            with self.contexts.inner(name):
                output = primary(self._within_budget(original, layout, args, kwargs))
        except (IndexError, ValueError) as error:
            # Of a pipeline that perturbs attention itself; anything else is an error of the plug-in's own.
            if isinstance(error, TrimtabError) or not self._conditions.perturbs_attention:
                raise
            raise UnsupportedPipelineError(
                f"{type(self.family.module).__name__}: it cannot compute {branch} in a call of its own: {error}. If "
                "the pipeline perturbs attention itself, switch that off: pag_scale=0."
            ) from error
        index = torch.tensor(chosen)
        call.extra_watched.update({key: kept[index] for key, kept in self.perturber.watched.items()})
        return output[index] if len(chosen) < output.shape[0] else output

    def _arguments_of(
        self, call: Call, branch: Branch, moved: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[Any, Any, list[int], int]:
        """The arguments of a call for one branch, which of its rows are the branch's, and how many there are."""
        roles = call.roles or []
        args, kwargs, rows = tuple(call.args), dict(call.kwargs), len(roles)
        source = [i for i, role in enumerate(roles) if role == branch.condition]
        own = bool(source)
        source = source or [i for i, role in enumerate(roles) if role == "cond"]
        if moved is not None:
            args, kwargs = self._conditions.controlled_at(args, kwargs, len(moved[0]), *moved)
        chosen, count = source, rows
        if len(source) < rows:
            try:
                check_splittable(args, kwargs, rows)
                args, kwargs = take_rows((args, kwargs), rows, index_of(source))
                chosen, count = list(range(len(source))), len(source)
            except AmbiguousRowsError:
                if not own:
                    raise UnsupportedPipelineError(
                        f"{type(self.family.module).__name__}: its arguments do not split into rows, so a branch with "
                        f"another condition ({branch}) cannot be made."
                    ) from None
        if not own:
            cache = next((name for name, value in kwargs.items() if _keeps_prompt(name, value)), None)
            if cache is not None:
                raise UnsupportedPipelineError(
                    f"{type(self.family.module).__name__}: its {cache} keeps what it made of the prompt for later "
                    f"steps, so another condition ({branch}) would take its place there. Where the pipeline's call can "
                    "do without it (use_kv_cache=False), let it."
                )
            args, kwargs = self._conditions.substitute(branch.condition, self.module, args, kwargs)
        if moved is not None:
            args, kwargs = with_sample_at(args, kwargs, chosen, *moved)
        return args, kwargs, chosen, count


def _keeps_prompt(name: str, value: Any) -> bool:
    """Whether an argument is a cache of what was computed with the prompt, as its name says."""
    is_cache = name.endswith(("cache", "caches")) and not isinstance(value, (bool, type(None)))
    return is_cache and type(value).__name__ not in _OF_PICTURES
