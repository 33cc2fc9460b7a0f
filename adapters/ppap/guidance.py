"""PPAP: guidance at the noisy sample by experts for each range of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F

from ...guidance.errors import ParameterError
from ...guidance.images import for_rows
from ...guidance.networks import borrow
from ...guidance.parameters import parameter
from ...guidance.pins import commit, sha256
from ...guidance.plugins.classifier import Classifier
from ...guidance.run import Run, Step
from ..weights import load_weights
from .experts import Experts, load_experts
from .noise import check_level, check_timesteps


@dataclass
class PPAP(Classifier):
    """Classifier guidance at x_t by a network of clean images, to which experts for each range of noise were added.

    $$ \\hat x_0 \\leftarrow \\hat x_0 + s\\,\\frac{\\sigma_t^2}{\\alpha_t}\\,\\nabla_{x_t}\\log p_{n(t)}(y \\mid x_t),
       \\qquad n(t) = \\lfloor N t / T \\rfloor $$

    Expert n is a LoRA that was trained on timesteps of its own, half-open range. Go et al., "Towards Practical
    Plug-and-Play Diffusion Models", CVPR 2023, arXiv:2212.05973; made by `trimtab train ppap`. A depth or segmentation
    network is followed to the map `wanted`: by the mean squared difference, or the mean cross-entropy.

    Cost: no evaluation of the denoiser; the network's forward and backward pass once a step.
    """

    name: ClassVar[str] = "ppap"

    scale: float = parameter(7.5, "Strength s; 0 switches it off.", ge=0, off=0.0)
    estimate: Literal["x_t"] = parameter("x_t", "What the network sees: the noisy sample.")
    weights: str | None = parameter(None, "File, folder or Hub repository with the experts.")
    weight_name: str | None = parameter(None, "File in the folder or repository, where there are several.")
    weights_revision: str | None = parameter(None, "Branch, tag or commit of that repository.")
    sha256: str | None = parameter(None, "What the file must hash to.")
    kind: Literal["classification", "depth", "segmentation"] = parameter("classification", "What the network does.")
    wanted: torch.Tensor | None = parameter(
        None, "For 'depth' `[batch or 1, h, w]`, for 'segmentation' likewise of class indices."
    )

    def validate(self) -> None:
        super().validate()
        if self.weights is None:
            raise ParameterError("ppap: weights is missing; give the experts' file, made by trimtab train ppap.")
        if (self.kind == "classification") == (self.wanted is not None):
            needs = "a target, not wanted" if self.kind == "classification" else "wanted, a map"
            raise ParameterError(f"ppap: kind={self.kind!r} needs {needs}.")

    def pinned(self) -> Self:
        found = self.sha256 or sha256(self.weights, self.weight_name)
        return replace(super().pinned(), weights_revision=commit(self.weights, self.weights_revision), sha256=found)

    @property
    def does(self) -> str:
        return self.kind

    def resolve_targets(self, run: Run) -> None:
        if self.kind == "classification":
            super().resolve_targets(run)

    def _use(self, run: Run, network: nn.Module, processor: Any) -> None:
        super()._use(run, network, processor)
        scheduler = getattr(run.pipeline, "scheduler", None)
        if run.dry:
            if scheduler is not None:
                check_timesteps(scheduler)
            return
        assert self.weights is not None
        loaded = load_weights(
            self.weights, weight_name=self.weight_name, sha256=self.sha256, revision=self.weights_revision
        )
        experts: Experts = load_experts(network, loaded)
        if scheduler is not None:
            check_timesteps(scheduler, experts.timesteps)
        borrow(run.exit_stack, experts)
        run.state.network, run.state.scheduler = experts, scheduler

    def check(self, step: Step) -> None:
        if step.state.scheduler is not None:
            check_level(step.state.scheduler, step.timestep, step.level)
        super().check(step)

    def log_probability(self, step: Step, image: torch.Tensor) -> torch.Tensor:
        if self.kind == "classification":
            return super().log_probability(step, image)
        found = self.logits(step, image)
        assert self.wanted is not None
        wanted = self.wanted.to(found.device)
        rows, (height, width) = len(found), found.shape[-2:]
        if wanted.ndim != 3 or rows % len(wanted) or wanted.shape[1:] != (height, width):
            raise ParameterError(
                f"ppap: wanted is {list(wanted.shape)}, but the network's map is {height} high and {width} wide for "
                f"each of {rows} rows; allowed: [1, {height}, {width}], or as many maps as images."
            )
        if self.kind == "depth":
            return -(found - for_rows(wanted.float(), rows)).square().flatten(1).mean(1)
        # As it was given, not on the network's device, which would have to be waited for in every step.
        lowest, highest = self.wanted.min().item(), self.wanted.max().item()
        if not 0 <= lowest <= highest < found.shape[1]:
            raise ParameterError(
                f"ppap: wanted holds classes from {lowest:g} to {highest:g}; allowed: 0 to {found.shape[1] - 1}."
            )
        return -F.cross_entropy(found, for_rows(wanted.long(), rows), reduction="none").flatten(1).mean(1)
