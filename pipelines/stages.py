"""The stages of a call in turn: of which denoiser, over which noise levels, and what the pipeline itself computes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin

from ..guidance.branch import Branch, Perturbation
from ..guidance.planner import own_branches
from ..guidance.run import Step
from .clock import Clock, algebra_or_none, planned_clock
from .components import denoisers_of, parts_of, schedulers_of
from .families import Family
from .own_cfg import Seen, copies_of_latents, has_cfg, other_predictions, own_rows


@dataclass(frozen=True)
class Stage:
    """What one scheduler is stepped through.

    Args:
        scheduler: its copy, with its timesteps set.
        clock: over these.
        families: of the denoisers whose predictions it may be given.
        own: branches that the pipeline computes by itself.
        own_calls: how many of these each of its forward calls computes, a step.
        end: the timestep below which the call leaves the rest to another pipeline (`denoising_end`).
    """

    scheduler: Any
    clock: Clock
    families: tuple[Family, ...]
    own: tuple[Branch, ...]
    own_calls: tuple[int, ...]
    end: float = -math.inf

    def steps(self) -> list[Step]:
        """One for each `scheduler.step` call."""
        steps = [step for step in self.clock.steps() if step.timestep >= self.end]
        if not hasattr(self.scheduler, "undo_step"):
            return steps
        # Where the schedule climbs again, noise is added without a prediction (RePaint).
        return steps[:1] + [step for before, step in pairwise(steps) if step.timestep < before.timestep]

    def joins_at(self, perturbation: Perturbation) -> int:
        """The outer block in which a perturbation begins, in the first of these denoisers that it changes."""
        return next(one.joins_at(perturbation) for one in self.families if one.own(perturbation.layers))

    def moved(self, branches: Sequence[Branch]) -> tuple[Branch, ...]:
        """Those that differ from their condition's prediction on one of these denoisers."""
        return tuple(branch for branch in branches if any(family.is_moved_by(branch) for family in self.families))


def stages(pipe: Any, arguments: Mapping[str, Any], needing: Sequence[str]) -> Iterator[Stage]:
    """The stages of `pipe(**arguments)` in their order.

    A combined pipeline hands its arguments to the pipelines that it is made of, some under a name of its own:
    `prior_guidance_scale` is the `guidance_scale` of its `prior_pipe`. A single one may have a prior as well, whose
    components begin alike: `prior_scheduler` with `prior_num_inference_steps`.

    Args:
        needing: guidances that need noise levels.

    Raises:
        ParameterError: a number of steps that the scheduler refuses.
        UnsupportedSchedulerError: a scheduler without noise algebra, where a guidance needs one.
    """
    inner = {name: part for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)}
    for name, part in inner.items():
        prefix = name.removesuffix("pipe")
        renamed = {key.removeprefix(prefix): value for key, value in arguments.items() if key.startswith(prefix)}
        takes = inspect.signature(type(part).__call__).parameters
        defaults = {key: p.default for key, p in takes.items() if p.default is not inspect.Parameter.empty}
        given = {key: value for key, value in {**arguments, **renamed}.items() if key in takes}
        yield from stages(part, {**defaults, **given}, needing)
    if inner:
        return
    schedulers = (name for name, part in parts_of(pipe).items() if isinstance(part, SchedulerMixin))
    prefixes = [name.removesuffix("scheduler") for name in schedulers if name.endswith("_scheduler")]
    prefixes = [prefix for prefix in prefixes if isinstance(arguments.get(f"{prefix}num_inference_steps"), int)]
    # unCLIP's schedulers all have a name of their own.
    for prefix in (*prefixes, *([""] if not prefixes or hasattr(pipe, "scheduler") else [])):
        stock = getattr(pipe, f"{prefix}scheduler", None) if prefixes else schedulers_of(pipe)[-1]
        scheduler, count = copy.deepcopy(stock), arguments.get(f"{prefix}num_inference_steps") or 50
        algebra = algebra_or_none(scheduler, needing)
        lists = {name: arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None}
        schedule = (
            lists if lists and not prefix else {"num_inference_steps": count, **_of_schedule(scheduler, arguments)}
        )
        clock = planned_clock(scheduler, algebra, **schedule)
        if not prefix and (first := _first_timestep(pipe, scheduler, count, arguments)) is not None:
            clock = Clock(scheduler, algebra, first)
        scale = {"guidance_scale": arguments.get(f"{prefix}guidance_scale")} if prefix else {}
        scaled = {**arguments, **scale}
        own = own_branches(has_cfg(pipe, scaled), other_predictions(pipe, scaled))
        families = _families_of(pipe, prefix, prefixes)
        yield Stage(scheduler, clock, families, own, _calls_of(pipe, scaled, own), _end(scheduler, arguments))


def _families_of(pipe: Any, prefix: str, others: Sequence[str]) -> tuple[Family, ...]:
    """The denoisers of one stage, which are named as its scheduler is; those of the last stage have no prefix."""
    found = {id(module): Family(module) for module in denoisers_of(pipe)}
    return tuple(
        found[id(component)]
        for name, component in parts_of(pipe).items()
        if id(component) in found and (_belongs(name, prefix) if prefix else not any(_belongs(name, o) for o in others))
    )


def _belongs(component: str, prefix: str) -> bool:
    """Whether a component is named as its scheduler is: `prior`, `super_res_first`."""
    return f"{component}_".startswith(prefix)


def _of_schedule(scheduler: Any, arguments: Mapping[str, Any]) -> dict[str, int]:
    """What a call is given for its schedule alone, beside the number of steps: RePaint's jumps."""
    takes = inspect.signature(scheduler.set_timesteps).parameters
    return {name: value for name in takes if name.startswith("jump") and isinstance(value := arguments.get(name), int)}


def _calls_of(pipe: Any, arguments: Mapping[str, Any], own: Sequence[Branch]) -> tuple[int, ...]:
    """How many of the pipeline's own branches each of its forward calls of one step computes."""
    written = own_rows(pipe, arguments).each_call()
    if written is not None and sum(written) == len(own):
        return tuple(written)
    apart = any(hasattr(module, "cache_context") for module in denoisers_of(pipe))
    return (1,) * len(own) if apart and not copies_of_latents(type(pipe)) else (len(own),)


def _end(scheduler: Any, arguments: Mapping[str, Any]) -> float:
    """The lowest timestep of a call that ends early, as Stable Diffusion XL's does before its refiner."""
    end = arguments.get("denoising_end")
    if not isinstance(end, float) or not 0 < end < 1:
        return -math.inf
    return float(round(scheduler.config.num_train_timesteps * (1 - end)))


def _first_timestep(pipe: Any, scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> float | None:
    """Where a call that begins at a noised image (`strength`, `denoising_start`) enters the schedule, if it does."""
    strength, method = arguments.get("strength"), getattr(type(pipe), "get_timesteps", None)
    start = arguments.get("denoising_start")
    if method is None or not any(isinstance(value, (int, float)) and 0 < value < 1 for value in (strength, start)):
        return None
    if "get_timesteps" not in inspect.unwrap(type(pipe).__call__).__code__.co_names:
        return None  # inherited or left over; the call never asks it
    takes = inspect.signature(method).parameters
    known = {"num_inference_steps": steps, "timesteps": scheduler.timesteps, "strength": strength, "device": "cpu"}
    known["denoising_start"] = start
    found = method(Seen(pipe, scheduler=scheduler), **{name: value for name, value in known.items() if name in takes})
    timesteps = found[0] if isinstance(found, tuple) else found
    return float(timesteps[0]) if len(timesteps) else None
