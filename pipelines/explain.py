"""`explain_guidance`: the plan of a run, from the same declarations that the run will follow."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

from ..guidance.base import Guidance
from ..guidance.branch import Branch
from ..guidance.errors import ParameterError, did_you_mean
from ..guidance.order import ordered
from ..guidance.parameters import fields_of
from ..guidance.planner import HOOKS, Plan, PlannedStep, Row, extra_of, repeats_of, wanted_branches
from .budget import ROWS, Budget, pieces
from .clean import backward_passes
from .components import check_condition, denoisers_of, schedulers_of
from .controls import check_controlled
from .families import Family
from .hooks import SetupView, needs_level
from .interception import cache_hooks
from .layout import Layout, lay_out, may_join
from .own_cfg import own_rows
from .own_rows import steps_scheduler
from .parallel import cost
from .recurrence import check_repeats
from .renoising import check_renoising
from .stages import stages


def make_plan(
    pipe: Any, guidances: Mapping[str, Guidance], num_inference_steps: int | None, call: Mapping[str, Any]
) -> Plan:
    """The plan of `pipe(num_inference_steps=..., **call)` under these guidances; nothing is computed.

    Raises:
        ParameterError: an argument that the pipeline's call does not have, layers that match nothing, and whatever
            else can be refused before a run.
    """
    signature = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in call if name not in signature]
    if unknown:
        takes = ", ".join(name for name in signature if name != "self")
        hint = did_you_mean(unknown[0], signature)
        raise ParameterError(f"{type(pipe).__name__}: its call takes no {', '.join(unknown)}.{hint} It takes: {takes}.")
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    arguments = {**defaults, **call}
    steps = num_inference_steps if num_inference_steps is not None else defaults.get("num_inference_steps") or 50
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ParameterError(f"num_inference_steps={steps!r}; allowed: a whole number >= 1.")
    guidances = {name: guidances[name] for name in ordered(guidances)}
    check_renoising(schedulers_of(pipe), guidances)
    needing = [name for name, guidance in guidances.items() if needs_level(guidance)]
    *earlier, last = stages(pipe, {**arguments, "num_inference_steps": steps}, needing)
    sequential, prefix = (getattr(pipe, "guidance_rows", "auto") == choice for choice in ("sequential", "auto"))
    most, images = Budget(getattr(pipe, "guidance_max_rows", None)).rows, _images_of(arguments)
    if (rows := getattr(pipe, "guidance_rows", "auto")) not in ROWS:
        raise ParameterError(f"guidance_rows={rows!r}; allowed: {', '.join(map(repr, ROWS))}.")
    with ExitStack() as stack:
        families = [Family(module) for module in denoisers_of(pipe)]
        run = SimpleNamespace(
            stack=stack,
            pipe=pipe,
            arguments=arguments,
            families=families,
            own=last.own,
            around=[],
            attachments={},
        )
        views = {name: SetupView(name, run, dry=True) for name in guidances}
        for name, guidance in guidances.items():
            guidance.validate()
            stack.callback(guidance.teardown, views[name])
            guidance.setup(views[name])
        planned, costs, largest = [], [], [0]
        parallel = getattr(pipe, "branch_parallel", None)
        lone = bool(run.around) or any(cache_hooks(family.module) for family in families)
        piece = None if lone else most
        per_guidance: dict[str, list[int]] = {name: [] for name in guidances}
        for stage, step in ((here, step) for here in (*earlier, last) for step in here.steps()):
            own, ends = stage.own, [*accumulate(stage.own_calls)]
            acting = {name: guidance for name, guidance in guidances.items() if guidance.acts(step)}
            seen = {name: dataclasses.replace(step, state=views[name].state) for name in acting}
            extra = stage.moved(extra_of(wanted_branches(acting, seen), own))
            for name, guidance in acting.items():
                asked = stage.moved(extra_of(wanted_branches({name: guidance}, seen), own))
                for branch in asked:
                    check_condition(pipe, branch, own, name)
                    check_controlled(pipe, arguments, branch, own, name)
                per_guidance[name].append(len(asked))
            # What the pipeline predicts in each of its calls; further branches ride along in the first.
            hosts = [own[begin:end] for begin, end in pairwise([0, *ends])]
            joining = [branch for branch in extra if may_join(branch, hosts[0])]
            together = images * (len(hosts[0]) + len(joining))
            gradient = backward_passes(acting, seen)
            apart = joining if sequential or gradient or (lone and most is not None and together > most) else []
            joined = [branch for branch in joining if branch not in apart]
            separate = [branch for branch in extra if branch not in joined]
            hosted = [[branch for branch in host for _ in range(images)] for host in hosts]
            joins_at = stage.joins_at if prefix else None
            each = [lay_out(hosted[0], joined, joins_at)[0], *(lay_out(other, ())[0] for other in hosted[1:])]
            calls = sum(len(_pieces(layout, None if gradient else piece)) for layout in each)
            calls += len(separate) * len(_pieces(Layout(images, tuple(range(images))), piece))
            if not gradient:
                largest = max(largest, _pieces(each[0], piece), key=sum)
            check_repeats(acting, seen, stage.scheduler)
            repeats = repeats_of(acting, seen)
            companions = sum(guidance.companions(seen[name]) for name, guidance in acting.items())
            alone = sum(guidance.companions_apart(seen[name]) for name, guidance in acting.items())
            calls += alone > 0
            names = tuple(acting)
            planned.append(PlannedStep(step.index, names, own, extra, calls, repeats, gradient, companions, alone))
            if parallel is not None:
                whole = gradient > 0 or any(branch.point is not None and branch.point.layers for branch in extra)
                processes = 1 if lone else parallel.size
                blocks = len(stage.families[-1].blocks)
                costs.append(cost.step_cost(blocks, processes, each, separate, images, repeats, whole))
        rows = tuple(row_of(name, guidances[name], views[name], per_guidance[name]) for name in guidances)
    measured = getattr(pipe.__dict__.get("last_guided_run"), "graph_bytes", None)
    notes: tuple[str, ...] = ()
    if parallel is not None:
        notes = cost.notes(parallel.size, parallel.measured, costs, sum(step.gradient > 0 for step in planned))
    if not own_rows(pipe, arguments).says_how_often_it_steps(lambda name: steps_scheduler(type(pipe), name)):
        notes = (*notes, "at least so many: how often its call goes through noise levels again, only a run shows")
    if len(largest) > 1:
        split = f"at most {most} rows a call: {sum(largest)} rows of a step in pieces of {', '.join(map(str, largest))}"
        notes = (*notes, split)
    return Plan(type(pipe).__name__, type(last.scheduler).__name__, tuple(planned), rows, measured, notes)


def _pieces(layout: Layout, most: int | None) -> list[int]:
    """Rows of the forward calls in which one call is made."""
    return [layout.total] if most is None else [len(piece) for piece in pieces(layout.parents, most)]


def _images_of(arguments: Mapping[str, Any]) -> int:
    """Images of one call."""
    given = next((arguments[name] for name in ("prompt", "class_labels") if arguments.get(name) is not None), None)
    each = next((arguments[n] for n in ("num_images_per_prompt", "num_videos_per_prompt") if arguments.get(n)), 1)
    return int(each) * (len(given) if isinstance(given, (list, tuple)) else 1)


def row_of(name: str, guidance: Guidance, view: SetupView, extras: list[int]) -> Row:
    """One guidance in the plan's table; `extras` are the predictions that it asks for on each step of its window."""
    phases = tuple(hook for hook in HOOKS if guidance.overrides(hook))
    low, high = guidance.start, guidance.stop
    windows = [] if (low, high) == (0.0, 1.0) else [f"{low:g} to {high:g}"]
    if guidance.sigma_min > 0 or guidance.sigma_max != float("inf"):
        windows.append(f"sigma {guidance.sigma_min:g} to {guidance.sigma_max:g}")
    branches = [value for value in vars(view.state).values() if isinstance(value, Branch)]
    layers = tuple(layer for branch in branches for layer in getattr(branch.perturbation, "layers", ()))
    watched = tuple(layer for branch in branches for layer in getattr(branch.point, "layers", ()))
    counts = sorted(set(extras)) or [0]
    extra = f"+{counts[0]}" if len(counts) == 1 else f"+{counts[0]} to +{counts[-1]}"
    own = {key: value for key, value in guidance.parameters.items() if key not in fields_of(Guidance)}
    return Row(name, guidance.label, phases, ", ".join(windows) or "all", len(extras), extra, layers, watched, own)
