"""One forward call of a denoiser, what each of its rows predicts, and how a step's calls became `model_output`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..guidance.branch import COND, UNCOND, Branch, Point
from ..guidance.errors import GuidanceRuntimeError, UnsupportedPipelineError
from .observation import UNRELATED, Observation, observe
from .prediction import sample_argument, with_sample_at

OWN = {"cond": COND, "uncond": UNCOND}
"""The branches that the pipeline's own rows are, by role."""


@dataclass
class Call:
    """One forward call that the pipeline made.

    Args:
        rows: rows in it, `None` where the input does not tell.
        roles: the role of each row, `None` while it is not known.
        output: the pipeline's own rows as the denoiser returned them `[rows, ...]`.
        handed_back: the same as the pipeline received them.
        extra: raw predictions of the branches that rode along, or of calls made like this one.
        at: where those were evaluated that were not at x_t.
        beside: what else the denoiser returned, such as the sound of a video.
        watched: what points kept of attention in the pipeline's own rows, by point and layer `[rows, ...]`.
        extra_watched: likewise in the rows of an extra branch, the point's parent.
        graph, leaf: output and input with their gradient graph, where a loss needs one.
        context: name of the `cache_context` in which it was made.
        counted: evaluations in it that the run has counted.
        dropped: extra branches in it that turned out to be of the wrong rows.
    """

    module: nn.Module
    original: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    rows: int | None
    roles: list[str] | None
    output: torch.Tensor
    handed_back: torch.Tensor
    extra: dict[Branch, torch.Tensor] = field(default_factory=dict)
    at: dict[Branch, torch.Tensor] = field(default_factory=dict)
    beside: tuple[torch.Tensor, ...] = ()
    watched: dict[tuple[Point, str], torch.Tensor] = field(default_factory=dict)
    extra_watched: dict[tuple[Point, str], torch.Tensor] = field(default_factory=dict)
    graph: torch.Tensor | None = None
    leaf: torch.Tensor | None = None
    context: str | None = None
    counted: int = 0
    dropped: int = 0

    def drop_misplaced(self, roles: Sequence[str]) -> None:
        """Drop the extra branches that were computed for other rows than `roles` says carry their condition."""
        told = self.roles or []

        def is_placed(branch: Branch) -> bool:
            role = branch.condition if branch.condition in told else "cond"
            return [known == role for known in told] == [known == role for known in roles]

        kept = {branch: rows for branch, rows in self.extra.items() if is_placed(branch)}
        self.dropped, self.extra = self.dropped + len(self.extra) - len(kept), kept

    def where(self, role: str) -> list[int]:
        """Indices of the rows with this role."""
        return [index for index, known in enumerate(self.roles or ()) if known == role]

    @property
    def given(self) -> Any:
        """What stands for the sample among the arguments; `None` if nothing does."""
        key = sample_argument(self.args, self.kwargs)
        return self.args[key] if isinstance(key, int) else self.kwargs[key] if key is not None else None

    def sample_before_step(self, unscaled: torch.Tensor | None) -> torch.Tensor | None:
        """x_t for each row, as far as it can be told before `scheduler.step`: like the output in shape, or `None`.

        Args:
            unscaled: what `scale_model_input` was given in this step, if it was called.
        """
        given = self.given
        if isinstance(given, list) and all(getattr(row, "shape", None) == self.output.shape[1:] for row in given):
            given = torch.stack(given)
        found = (value for value in (unscaled, given) if isinstance(value, torch.Tensor))
        return next((sample for sample in found if sample.shape == self.output.shape), None)


def watched_by(point: Point, calls: Sequence[Call]) -> dict[str, torch.Tensor]:
    """What a point kept of its parent's attention, by layer `[batch, ...]`.

    Raises:
        GuidanceRuntimeError: a layer did not run, as a step cache may cause.
    """
    found: dict[str, torch.Tensor] = {}
    for layer in point.layers:
        for call in calls:
            rows = next((call.where(role) for role, branch in OWN.items() if branch == point.parent), [])
            if rows and (point, layer) in call.watched:
                found[layer] = call.watched[point, layer][rows]
            elif (point, layer) in call.extra_watched:
                found[layer] = call.extra_watched[point, layer]
        if layer not in found:
            raise GuidanceRuntimeError(
                f"{layer} did not run while the {point.parent} prediction was computed, so {type(point).__name__} has "
                "no attention map; switch the step cache off: disable_cache()."
            )
    return found


def observe_calls(
    kind: str, calls: Sequence[Call], model_output: torch.Tensor, sample: torch.Tensor
) -> tuple[Observation, list[Call]]:
    """How `model_output` came about, and the calls that took part in it.

    Raises:
        UnsupportedPipelineError: it does not follow from any of them; `kind` is the pipeline's class for the message.
    """
    modules = dict.fromkeys(call.module for call in reversed(calls))
    chosen_of = [[call for call in calls if call.module is module] for module in modules]
    # Conditional and unconditional predictions may be those of two denoisers.
    nearest: tuple[Observation, list[Call]] | None = None
    for chosen in [*chosen_of, *([list(calls)] if len(modules) > 1 else [])]:
        found = observe([call.handed_back for call in chosen], model_output, sample)
        if found is None or found.residual > UNRELATED:
            continue
        if found.exact:
            return found, chosen
        nearest = nearest or (found, chosen)  # one of two that resemble each other explains much by itself
    if nearest is not None:
        return nearest
    shapes = ", ".join(str(tuple(call.output.shape)) for call in calls)
    beside = [tuple(tensor.shape) for call in calls[-1:] for tensor in call.beside]
    joined = (
        f" The denoiser returns {', '.join(map(str, beside))} beside that; what joins several of its results into one "
        "cannot be guided."
        if beside
        else ""
    )
    raise UnsupportedPipelineError(
        f"{kind}: the scheduler was given a {tuple(model_output.shape)} that does not follow from the denoiser's "
        f"output ({shapes}) by a combination of rows and a slice, so a guidance term cannot be handed to it.{joined}"
    )


def is_beside(calls: Sequence[Call], model_output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether a further scheduler is given what the denoiser returned beside its prediction."""
    columns = list(zip(*(call.beside for call in calls), strict=False))
    seen = [observe(outputs, model_output, sample) for outputs in columns]
    return any(found is not None and found.residual <= UNRELATED for found in seen)


def branches_of(roles: Sequence[str] | None) -> tuple[Branch | None, ...]:
    """What rows with these roles predict; `None` where that is not known."""
    return tuple(OWN.get(role) for role in roles or ())


def with_sample(call: Call, batch: int, sample: torch.Tensor, replacement: torch.Tensor) -> Call:
    """The same call at another x_t, not made yet.

    Args:
        batch: images of the run; the call has a row, or several, for each.
        sample, replacement: the old x_t and the new one `[batch, ...]`.
    """
    groups = len(call.output) // batch
    old, new = (torch.cat([tensor] * groups) for tensor in (sample, replacement))
    args, kwargs = with_sample_at(call.args, call.kwargs, range(len(call.output)), old, new)
    return replace(
        call, args=args, kwargs=kwargs, extra={}, at={}, watched={}, extra_watched={}, graph=None, leaf=None,
        counted=0, dropped=0,
    )  # fmt: skip
