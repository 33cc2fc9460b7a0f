"""Phase 5: guidance on the clean estimate, by an edit or by the gradient of a loss.

    x_0 <- x_0 - d/dx_0 sum_k L_k(x_0)        with respect to the clean estimate alone
    x_0 <- x_0 - d/dx_t sum_k L_k(x_0(x_t))   through the denoiser
    x_0 <- x_0 - d/dx_t sum_k L_k(x_t)        with respect to the sample as it stands
    x_0 <- guide_x0(x_0)

All losses are taken of one and the same estimate, so that they share one decoding; those of one kind share one backward
pass, except where a guidance reshapes its own gradient. Everything here is computed in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..guidance.base import Guidance
from ..guidance.errors import GuidanceRuntimeError
from ..guidance.run import Step
from .call import Call
from .given import only_read
from .graph import through_denoiser
from .hooks import Hooks, annotated
from .meter import GraphMeter
from .observation import Observation


def needs_graph(guidance: Guidance, step: Step) -> bool:
    """Whether a guidance differentiates through the denoiser in this step."""
    return guidance.overrides("loss") and guidance.with_respect_to(step) == "x_t"


def backward_groups(losing: Mapping[str, Guidance], target: Mapping[str, str]) -> list[list[str]]:
    """The names of guidances whose losses share a backward pass: those of one kind, unless a guidance wants its own.

    Args:
        losing: guidances with a loss.
        target: what each is differentiated with respect to.
    """
    groups = [[name] for name, guidance in losing.items() if not guidance.shares_backward]
    for kind in ("x0", "x_t", "sample"):
        groups.append([name for name, g in losing.items() if g.shares_backward and target[name] == kind])
    return [group for group in groups if group]


def backward_passes(acting: Mapping[str, Guidance], steps: Mapping[str, Step]) -> int:
    """How often one evaluation is differentiated through the denoiser.

    Args:
        acting: the guidances of a step.
        steps: for each the step as it sees it.
    """
    losing = {name: guidance for name, guidance in acting.items() if needs_graph(guidance, steps[name])}
    return len(backward_groups(losing, dict.fromkeys(losing, "x_t")))


def edits_clean_estimate(guidance: Guidance) -> bool:
    """Whether a guidance acts in this phase."""
    return guidance.overrides("guide_x0") or guidance.overrides("loss")


@dataclasses.dataclass
class CleanPhase:
    """Phase 5 of one evaluation of a step.

    Args:
        hooks: the run's.
        step: with x_t.
        prediction: the pipeline's combination with all deltas `[batch, ...]`.
        observation, calls: how it came about, for a gradient through the denoiser.
        meter: weighs what the losses keep.
    """

    hooks: Hooks
    step: Step
    prediction: torch.Tensor
    observation: Observation
    calls: Sequence[Call]
    meter: GraphMeter

    def guided(self, acting: Mapping[str, Guidance]) -> torch.Tensor:
        """The prediction whose clean estimate is what the acting guidances make of it."""
        step, algebra = self.step, self.step.algebra
        assert algebra is not None and step.sample is not None
        with torch.autocast(self.prediction.device.type, enabled=False):
            x0 = algebra.x0(self.prediction, step.sample, step.level).float()
            unguided = x0
            gradient = self._gradient({n: g for n, g in acting.items() if g.overrides("loss")}, x0)
            if gradient is not None and gradient.any():
                x0 = x0 - gradient
            for name, guidance in acting.items():
                if guidance.overrides("guide_x0"):
                    with annotated(name, "guide_x0", step), only_read(name, "guide_x0", (x0,)), self.meter.watching():
                        edited = guidance.guide_x0(self._view(name), x0)
                    _check(name, step, edited, x0)
                    x0 = edited if edited is x0 else edited.to(x0.dtype)
            if x0 is unguided:
                # There and back through the parametrisation would round.
                return self.prediction
            return algebra.from_x0(x0, step.sample, step.level, self.prediction)

    def _view(self, name: str, sample: torch.Tensor | None = None) -> Step:
        sample = self.step.sample if sample is None else sample
        return self.hooks.view(name, dataclasses.replace(self.step, own=self.prediction, sample=sample))

    def _gradient(self, losing: Mapping[str, Guidance], x0: torch.Tensor) -> torch.Tensor | None:
        """What all losses together take off the clean estimate; `None` where there is none."""
        assert self.step.algebra is not None and self.step.sample is not None
        target = {name: guidance.with_respect_to(self._view(name)) for name, guidance in losing.items()}
        with torch.enable_grad():
            p, x_t = (tensor.detach().float().requires_grad_(True) for tensor in (self.prediction, self.step.sample))
            through = "x_t" in target.values()
            estimate = self.step.algebra.x0(p, x_t, self.step.level) if through else x0.detach().requires_grad_(True)
            losses: dict[str, torch.Tensor] = {}
            for name, guidance in losing.items():
                at_sample = target[name] == "sample"
                # A loss of x_t itself must not find another way to it, through the estimate.
                given, sample = (x0.detach(), x_t) if at_sample else (estimate, self.step.sample)
                loss = self._loss(name, guidance, given, sample)
                if loss is not None:
                    losses[name] = loss
        groups = backward_groups({name: losing[name] for name in losses}, target)
        total: torch.Tensor | None = None
        for index, group in enumerate(groups):
            kind, keep = target[group[0]], index < len(groups) - 1
            leaf = x_t if kind == "sample" else estimate
            (gradient,) = torch.autograd.grad([losses[name] for name in group], leaf, retain_graph=True)
            if not torch.isfinite(gradient).all():
                raise self._not_finite(self._culprit(group, losses, leaf), "the loss")
            if kind == "x_t":
                gradient = self._pulled_back(gradient, p, x_t, estimate, keep)
                if not torch.isfinite(gradient).all():
                    raise self._not_finite(group, "the denoiser")
            if not losing[group[0]].shares_backward:
                with annotated(group[0], "reshape_gradient", self.step):
                    reshaped = losing[group[0]].reshape_gradient(self._view(group[0]), gradient)
                _check(group[0], self.step, reshaped, gradient)
                gradient = reshaped
            total = gradient if total is None else total + gradient
        for call in self.calls:
            call.graph = None
        return total

    def _loss(self, name: str, guidance: Guidance, estimate: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
        """The sum over the batch of one guidance's loss."""
        with annotated(name, "loss", self.step), self.meter.watching():
            loss = guidance.loss(self._view(name, sample), estimate)
        if loss is None:
            return None
        if loss.shape != estimate.shape[:1]:
            raise GuidanceRuntimeError(
                f"{name}: loss returned shape {tuple(loss.shape)}; needed: one number an image, ({estimate.shape[0]},)."
            )
        if not loss.requires_grad:
            raise GuidanceRuntimeError(
                f"{name}: the loss does not depend on what it is differentiated with respect to; compute it from the "
                "tensor that it is given, without detach() or no_grad()."
            )
        if not torch.isfinite(loss).all():
            raise self._not_finite([name], "the loss")
        return loss.float().sum()

    def _pulled_back(
        self, gradient: torch.Tensor, p: torch.Tensor, x_t: torch.Tensor, estimate: torch.Tensor, keep: bool
    ) -> torch.Tensor:
        """`dL/dx_t` from `dL/dx_0`."""
        assert self.step.sample is not None
        on_p, on_x = torch.autograd.grad(
            estimate, (p, x_t), gradient, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return on_x + through_denoiser(on_p, self.step.sample, self.observation, self.calls, keep)

    @staticmethod
    def _culprit(group: list[str], losses: Mapping[str, torch.Tensor], leaf: torch.Tensor) -> list[str]:
        """Those whose own gradient is not finite."""
        alone = {n: torch.autograd.grad(losses[n], leaf, retain_graph=True)[0] for n in group}
        return [name for name, gradient in alone.items() if not torch.isfinite(gradient).all()] or group

    def _not_finite(self, names: Sequence[str], where: str) -> GuidanceRuntimeError:
        return GuidanceRuntimeError(
            f"{', '.join(names)}: the gradient is not finite at step {self.step.index} of {self.step.count}; it went "
            f"wrong in {where}. Lower its weight, let it start later, set grad_norm, or compute it in float32."
        )


def _check(name: str, step: Step, returned: torch.Tensor, like: torch.Tensor) -> None:
    if returned.shape != like.shape:
        raise GuidanceRuntimeError(
            f"{name}: returned shape {tuple(returned.shape)} at step {step.index}; needed: {tuple(like.shape)}."
        )
    if not torch.isfinite(returned).all():
        raise GuidanceRuntimeError(
            f"{name}: what it returned is not finite at step {step.index} of {step.count}. Lower its weight, let it "
            "start later, or compute it in float32."
        )
