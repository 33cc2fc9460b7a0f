"""Training-free guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..errors import GuidanceRuntimeError, ParameterError
from ..gradient import GradientGuidance, check_each, levels_of_run, share_of_next, signal_share
from ..networks import borrow
from ..parameters import parameter
from ..run import Run, Step

Schedule = Literal["constant", "root", "increase", "decrease", "variance"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dps": {"rho": 1.0, "rho_schedule": "root", "update": "sample"},
    "lgd": {"rho": 1.0, "rho_schedule": "variance", "smoothing": 1.0, "samples": 8, "update": "clean"},
    "mpgd": {"mu": 1.0, "iterations": 1, "update": "sample"},
    "freedom": {"rho": 1.0, "rho_schedule": "root", "recurrence": 2, "update": "sample"},
    "ugd": {"rho": 1.0, "rho_schedule": "variance", "mu": 0.1, "iterations": 4, "recurrence": 2, "update": "clean"},
    "tfg": {"rho": 1.0, "rho_schedule": "increase", "mu": 1.0, "mu_schedule": "increase", "iterations": 4,
            "smoothing": 0.1, "update": "sample"},
}  # fmt: skip
"""What each method sets; all else is 0, one sample, one evaluation, a constant schedule."""
NEUTRAL: Mapping[str, Any] = {
    "rho": 0.0, "rho_schedule": "constant", "mu": 0.0, "mu_schedule": "constant", "iterations": 0, "smoothing": 0.0,
    "samples": 1, "recurrence": 1,
}  # fmt: skip


@dataclass
class TFG(GradientGuidance):
    """Training-free guidance: the space of methods that follow the gradient of an energy E of the clean image.

    With `f = exp(-E)`, smoothed over `\\delta \\sim N(0, I)`, and `\\bar\\alpha` the signal's share of the variance:

    $$ \\tilde f(x) = \\operatorname{mean}_\\delta f(x + \\bar\\gamma\\sqrt{1-\\bar\\alpha_t}\\,\\delta) $$

    $$ \\Delta_t = \\rho_t\\nabla_{x_t}\\log\\tilde f(\\hat x_0(x_t)), \\qquad
       \\Delta_0 \\leftarrow \\Delta_0 + \\mu_t\\nabla_{\\hat x_0}\\log\\tilde f(\\hat x_0 + \\Delta_0) $$

    (`iterations` times). The clean estimate moves by $d = \\Delta_t/\\sqrt{\\bar\\alpha_t} + \\Delta_0$: with
    `update="sample"` the scheduler's outcome moves by `\\alpha_s d` and the noise in it stays; with `update="clean"`
    the noise is derived anew, as in classifier guidance. Each step is evaluated `recurrence` times.

    | preset | method | what it is |
    | --- | --- | --- |
    | `dps` | Chung et al., arXiv:2209.14687 | the outcome moves by rho; E is the norm, or its square, of the residual |
    | `lgd` | Song et al., ICML 2023 | rho as a score, smoothed |
    | `mpgd` | He et al., arXiv:2311.16424 | mu, no gradient through the denoiser |
    | `freedom` | Yu et al., arXiv:2303.09833 | rho and recurrence |
    | `ugd` | Bansal et al., arXiv:2302.07121 | rho as a score, mu, recurrence |
    | `tfg` | Ye et al., arXiv:2409.15761 | all of them |

    Gradients are with respect to the sample at unit variance, so that rho means the same on every scheduler. Where the
    sample is pure noise (alpha 0), rho does nothing.

    Cost: with rho > 0 a backward pass through the denoiser in each evaluation, about two evaluations; `samples` times
    (1 + iterations) times the energy, and its decoding.
    """

    name: ClassVar[str] = "tfg"

    energy: object = parameter(None, "E: takes images `[batch, channels, height, width]` in -1..1, returns `[batch]`.")
    preset: Literal["dps", "lgd", "mpgd", "freedom", "ugd", "tfg"] = parameter(
        "tfg", "Method whose values stand for those that are not given."
    )
    rho: float | None = parameter(None, "Weight of the gradient through the denoiser.", ge=0)
    mu: float | None = parameter(None, "Weight of each gradient at the clean estimate.", ge=0)
    rho_schedule: Schedule | None = parameter(
        None,
        "rho over the run: 'constant'; 'increase' as alpha_t = abar_t / abar_s, 'decrease' as 1 - alpha_t, both with "
        "mean 1; 'root' as sqrt(alpha_t), which moves the outcome by the gradient itself; 'variance' as 1 - abar_t, "
        "which makes it a score.",
    )
    mu_schedule: Schedule | None = parameter(None, "mu over the run, likewise.")
    iterations: int | None = parameter(None, "Gradient steps at the clean estimate.", ge=0)
    smoothing: float | None = parameter(None, "Standard deviation gamma of the smoothing, in units of the noise.", ge=0)
    samples: int | None = parameter(None, "Samples delta.", ge=1)
    recurrence: int | None = parameter(None, "Evaluations of each step.", ge=1)
    update: Literal["sample", "clean"] | None = parameter(None, "What the shift is added to.")
    scale: float = parameter(1.0, "Common factor of rho and mu; 0 switches it off.", ge=0, off=0.0)
    seed: int = parameter(0, "Of the samples delta.", ge=0)

    def validate(self) -> None:
        super().validate()
        if not callable(self.energy):
            raise ParameterError(
                f"tfg: energy={self.energy!r}; needed: a function of images [batch, channels, height, width] in -1..1 "
                "that returns one number an image."
            )

    def setup(self, run: Run) -> None:
        if isinstance(self.energy, nn.Module) and not run.dry:
            borrow(run.exit_stack, self.energy)
        run.state.generator = torch.Generator().manual_seed(self.seed)
        run.state.means = {}
        run.state.shift = None

    def value(self, name: str) -> Any:
        """A parameter, the preset's where none was given."""
        given = getattr(self, name)
        return given if given is not None else {**NEUTRAL, **PRESETS[self.preset]}[name]

    def weight(self, name: str, step: Step) -> float:
        """rho_t or mu_t."""
        schedule = self.value(f"{name}_schedule")
        full = self.scale * self.value(name)
        if full == 0 or schedule == "constant":
            return float(full)
        if schedule == "variance":
            return float(full * (1 - signal_share(step.level)))
        ratio = signal_share(step.level) / share_of_next(step)
        if schedule == "root":
            return float(full * math.sqrt(ratio))
        value = ratio if schedule == "increase" else 1 - ratio
        return float(full * value / self._mean(schedule, step))

    @staticmethod
    def _mean(schedule: str, step: Step) -> float:
        """Mean of a schedule over the run, so that the weights do not depend on the number of steps."""
        if schedule not in step.state.means:
            ratios = [a / b for a, b in pairwise(map(signal_share, levels_of_run(step)))]
            mean = sum(ratios) / len(ratios)
            step.state.means[schedule] = mean if schedule == "increase" else 1 - mean
        return float(step.state.means[schedule])

    def repeats(self, step: Step) -> int:
        return int(self.value("recurrence")) if self.scale > 0 else 1

    def with_respect_to(self, step: Step) -> str:
        return "x_t" if self.scale * self.value("rho") > 0 and step.level.holds_signal else "x0"

    @property
    def shares_backward(self) -> bool:
        return super().shares_backward and self.value("update") == "clean"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor | None:
        step.state.estimate, step.state.shift = x0.detach(), None
        if self.value("smoothing") > 0:
            # The same for every image of the batch, so that no image depends on its neighbours.
            shape = (self.value("samples"), *x0.shape[1:])
            step.state.delta = torch.randn(shape, generator=step.state.generator).to(x0.device)
        if self.with_respect_to(step) == "x0":
            return None
        level = step.level
        per_x0 = self.weight("rho", step) * (level.alpha**2 + level.sigma**2) / level.alpha
        return per_x0 * self.smoothed_energy(step, x0)

    def _energy(self, image: torch.Tensor) -> torch.Tensor:
        assert callable(self.energy)
        return check_each(self.energy(image), image, f"{self.label}: energy")

    def smoothed_energy(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """`-log f~(x0)` `[batch]`."""
        width = self.value("smoothing") * math.sqrt(1 - signal_share(step.level))
        if width == 0:
            return self._energy(step.decode(x0))
        energies = torch.stack([self._energy(step.decode(x0 + width * delta)) for delta in step.state.delta])
        return math.log(len(energies)) - torch.logsumexp(-energies, dim=0)

    def reshape_gradient(self, step: Step, gradient: torch.Tensor) -> torch.Tensor:
        gradient = super().reshape_gradient(step, gradient)
        if self.value("update") == "clean":
            return gradient
        step.state.shift = -gradient
        return torch.zeros_like(gradient)

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        mu = self.weight("mu", step)
        if mu == 0 or self.value("iterations") == 0:
            return x0
        shift = torch.zeros_like(x0)
        for _ in range(self.value("iterations")):
            with torch.enable_grad():
                moved = (step.state.estimate + shift).requires_grad_(True)
                energy = self.smoothed_energy(step, moved).sum()
            shift = shift - mu * torch.autograd.grad(energy, moved)[0]
        shift = super().reshape_gradient(step, shift)
        if not torch.isfinite(shift).all():
            raise GuidanceRuntimeError(
                f"{self.label}: the gradient is not finite at step {step.index} of {step.count}. Lower mu, or let it "
                "start later."
            )
        if self.value("update") == "clean":
            return x0 + shift
        step.state.shift = shift if step.state.shift is None else step.state.shift + shift
        return x0

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        if step.state.shift is None:
            return sample
        return sample + step.next_level.alpha * step.state.shift.to(sample.dtype)
