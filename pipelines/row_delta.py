"""The delta on the unconditional row, for pipelines that rescale their own combination.

A pipeline that computes `R(u + g (c - u))` with a rescale R gets `u + delta / (1 - g)` in place of u, which makes that
`R(u + g (c - u) + delta)`: all terms are summed first, and the pipeline's own rescale stays last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.branch import COND, UNCOND, Branch
from ..guidance.run import Step
from .call import Call
from .denoiser import Denoiser
from .forwards import Forwards
from .hooks import Hooks
from .observation import TOLERANCE, Observation, View
from .own_cfg import counts_from_cond, flips_sign, may_rescale, rescales
from .prediction import with_primary


class RowDelta:
    """Whether, and with which g, a delta was handed to the pipeline on the unconditional row of the present step.

    Args:
        pipe, arguments: the pipeline, and the arguments of its call.
        hooks: the guidances' hooks in this run.
        forwards: computes the branches that are missing.
        shapes: those of what the pipeline prepared as its samples.
    """

    def __init__(
        self, pipe: Any, arguments: Mapping[str, Any], hooks: Hooks, forwards: Forwards,
        shapes: Callable[[], Sequence[torch.Size]],
    ) -> None:  # fmt: skip
        self._shapes = shapes
        self._pipe, self._arguments, self._hooks, self._forwards = pipe, arguments, hooks, forwards
        self._may_rescale, self._rescales = may_rescale(type(pipe)), rescales(type(pipe), arguments)
        self._scale_at_none = 0.0 if counts_from_cond(type(pipe)) else 1.0
        self._sign = -1.0 if flips_sign(type(pipe)) else 1.0  # until it is observed
        self.handed_with: float | None = None

    def applies(self, denoiser: Denoiser, acting: Mapping[str, Guidance], calls: int) -> bool:
        """Whether the delta must enter before the pipeline's own rescale, and g is known.

        Args:
            calls: denoiser calls of this step so far.
        """
        if any(guidance.exclusive == "cfg" for guidance in acting.values()) or self._scale_of_cfg() in (None, 1.0):
            return False
        if not any(guidance.overrides("delta") for guidance in acting.values()):
            return False
        # A bounded rescale, or one that moves nothing yet, is not seen in the weights although a delta may cause it.
        if self._rescales or (self._arguments.get("guidance_rescale") or 0.0) > 0:
            return True
        if denoiser.observation is not None:
            return denoiser.observation.rescaled
        # How two calls are combined is seen at the first scheduler step only; until then this way is right for both.
        return calls > 1 and self._may_rescale

    def _scale_of_cfg(self) -> float | None:
        names = ("true_cfg_scale", "guidance_scale") if "true_cfg_scale" in self._arguments else ("guidance_scale",)
        # A callback may change the scale in the run, and the pipeline reads its own attribute then.
        values = [getattr(self._pipe, name, self._arguments.get(name)) for name in names]
        scales = (float(value) for value in values if isinstance(value, (int, float)))
        return next((scale + 1.0 - self._scale_at_none for scale in scales), None)

    def hand_over(
        self, call: Call, calls: list[Call], output: Any, acting: Mapping[str, Guidance], step: Step, denoiser: Denoiser
    ) -> Any:
        """The output of a call that holds the unconditional row, with the delta on it.

        Args:
            call: that call; nothing is done in one without such a row.
            calls: all calls of the step so far, among them the one with the conditional row.
            step: with x_t for each row of the call, where it is known.
        """
        if call.roles is None:
            call.roles = denoiser.roles_of_output(len([one for one in calls if one.module is call.module]) - 1, call)
        uncond = call.where("uncond")
        cond_call = next((earlier for earlier in calls if earlier.where("cond")), None)
        g = self._scale_of_cfg()
        if not uncond or cond_call is None or g is None:
            return output
        seen = denoiser.observation
        view, sign = (self._first_view(call), self._sign) if seen is None else (seen.view, seen.gain)

        def convert(rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
            return sign * view.of(rows)

        available = {COND: convert(cond_call.output[cond_call.where("cond")]), UNCOND: convert(call.output[uncond])}
        step = dataclasses.replace(
            step,
            sample=None if step.sample is None else view.of(step.sample[uncond]),
            own=available[UNCOND] + g * (available[COND] - available[UNCOND]),
        )
        step = self._forwards.compute_missing(calls, acting, step, available, convert)
        delta = self._hooks.delta(acting, step, available)
        if delta is None:
            return output
        edited = call.output.clone()
        onto_row = delta.to(edited.dtype) / (sign * (1.0 - g))
        edited[uncond] += view.transpose(onto_row, edited[uncond])
        call.handed_back = edited
        self.handed_with = g
        return with_primary(output, edited)

    def _first_view(self, call: Call) -> View:
        """How rows become samples, before it is observed: whole, with the dimensions of what the pipeline prepared."""
        row = call.output.shape[1:]
        for shape in self._shapes():
            if shape[1:] != row and [size for size in shape[1:] if size > 1] == [size for size in row if size > 1]:
                return View(shape=tuple(shape[1:]))
        return View()

    def corrected(
        self, own: torch.Tensor, observation: Observation, acting: Mapping[str, Guidance], step: Step,
        available: Mapping[Branch, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """`own`, into which a delta was handed; mended where the pipeline's g was another.

        With weights `1 - g'` and `g'` instead of `1 - g` and `g`, the delta arrived times `(1 - g') / (1 - g)`.
        """
        g = self.handed_with
        if observation.rescaled or g is None or len(observation.weights) != 2 or not observation.certain:
            return own
        uncond = observation.weights[1 - observation.roles.index("cond")]
        arrived = uncond * observation.gain / (1.0 - g)
        if bool((arrived - 1.0).abs().max() < 10 * TOLERANCE):
            return own
        delta = self._hooks.delta(acting, step, available)
        return own if delta is None else own + (1.0 - arrived) * delta
