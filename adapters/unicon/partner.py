"""The partner of one guidance in one run: its latents, its own scheduler, and the masks on both sides."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ...guidance.branch import COND, UNCOND, Branch
from ...guidance.plugins.joint import Separate
from ...guidance.run import Step
from .checkpoint import Block


class Settings(Protocol):
    """The parameters of the guidance, see `guidance/plugins/joint.py`."""

    weights: str | None
    model: str | None
    revision: str | None
    allow_pth: bool
    image: Any
    mask: Any
    own_image: Any
    own_mask: Any
    mode: Any
    prompt: str | None
    negative_prompt: str | None
    joint_scale: float
    signal_scale: float

    @property
    def word(self) -> str: ...
    @property
    def moves(self) -> bool: ...
    @property
    def enters_at(self) -> float: ...
    def joins(self, step: Step) -> bool: ...
    def keep(self, partner: Any) -> None: ...


@dataclass
class Kept:
    """The part of a side that stays what an image is: after each step it is put back, with the level's noise on it.

    Args:
        image, noise: latents.
        mask: 1 where the side is made.
        scheduler: a fresh copy; one that has stepped would take its own position for the timestep.
    """

    image: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    scheduler: Any

    def put_back(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The side after the step at this index of the schedule."""
        timesteps = self.scheduler.timesteps
        image = self.image
        if index + 1 < len(timesteps):
            image = self.scheduler.add_noise(image, self.noise, timesteps[index + 1].reshape(1))
        return ((1 - self.mask) * image + self.mask * latents).to(latents.dtype)


@dataclass
class Partner:
    """One partner.

    Attributes:
        settings: the guidance.
        blocks: what its model adds to the UNet, by block.
        texts: the arguments of its rows that stand for its prompt, by branch: `[images, ...]` each.
        latents: `[images, ...]`.
        predictions: of the present step, by branch.
        iteration: steps of the run so far.
    """

    settings: Settings
    blocks: Mapping[str, Block]
    run: Any
    texts: Mapping[Branch, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    predictions: dict[Branch, torch.Tensor] = field(default_factory=dict)
    kept: Kept | None = None
    own_kept: Kept | None = None
    iteration: int = 0

    def enter(self, scheduler: Any, image: torch.Tensor, noise: torch.Tensor) -> None:
        """Begin the partner's own run.

        Args:
            scheduler: a fresh copy of the pipeline's.
            image, noise: latents.
        """
        # Of PNDM's steps two are at one level.
        self.scheduler, self.count, self.image = scheduler, len(scheduler.timesteps), image
        self.last = len(scheduler.timesteps) - 1
        self.first = int(self.settings.enters_at * self.last)
        if self.first == 0 and self.settings.enters_at < 1:  # of a run of one step the first level is the last one
            self.latents = noise * scheduler.init_noise_sigma
            return
        self.latents = copy.deepcopy(scheduler).add_noise(image, noise, scheduler.timesteps[self.first].reshape(1))
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = self.first

    def index(self, iteration: int) -> int:
        """Where in its schedule the partner is; it repeats a level where it has fewer of them than the run."""
        return self.first + (self.last - self.first + 1) * iteration // self.count

    @property
    def timestep(self) -> torch.Tensor:
        return self.scheduler.timesteps[self.index(self.iteration)]

    def model_input(self) -> torch.Tensor:
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    def after_step(self, step: Step, sample: torch.Tensor) -> torch.Tensor:
        """Step the partner if its level ends, put back what is kept on both sides; returns the own side's sample."""
        index, following = self.index(self.iteration), self.index(self.iteration + 1)
        if self.own_kept is not None and self.iteration == 0:
            assert step.sample is not None
            self.own_kept.noise = step.sample / self.own_kept.scheduler.init_noise_sigma
        if self.predictions and following != index:
            known = inspect.signature(self.scheduler.step).parameters
            options = {k: self.run.arguments.get(k) for k in ("generator", "eta") if k in known}
            options = {name: value for name, value in options.items() if value is not None}
            stepped = self.scheduler.step(self._prediction(), self.timestep, self.latents, return_dict=False, **options)
            self.latents = stepped[0]
        elif self.first == self.last and self.iteration + 1 == self.count:
            self.latents = self.image  # held, and not denoised from its last level by anything
        if self.kept is not None:
            self.latents = self.kept.put_back(self.latents, index)
        if self.own_kept is not None:
            sample = self.own_kept.put_back(sample, self.iteration)
        self.predictions = {}
        self.iteration += 1
        if self.iteration == self.count:
            self.settings.keep(self._decoded())
        return sample

    @torch.no_grad()
    def leave_unfinished(self) -> None:
        """Keep the partner as of the last step, as the pipeline returns its own side, where the run ended early."""
        if not 0 < self.iteration < self.count:
            return
        if self.first == self.last:
            self.latents = self.image
        self.settings.keep(self._decoded())
        self.run.pipeline.maybe_free_model_hooks()  # the pipeline has done so, before the autoencoder was needed again

    def _decoded(self) -> Any:
        """The partner in the pipeline's `output_type`."""
        pipe, kind = self.run.pipeline, self.run.arguments.get("output_type", "pil")
        if kind == "latent":
            return self.latents
        vae = pipe.vae
        with in_full_precision(vae):
            pixels = vae.decode(self.latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pipe.image_processor.postprocess(pixels, output_type=kind)

    def _prediction(self) -> torch.Tensor:
        """The pipeline's own combination, and the signal guidance."""
        cond, uncond = self.predictions[COND], self.predictions.get(UNCOND)
        total = cond
        if uncond is not None:
            total = uncond + float(self.run.arguments["guidance_scale"]) * (cond - uncond)
        separate = [states for branch, states in self.predictions.items() if is_separate(branch)]
        if separate:
            total = total + self.settings.signal_scale * (cond - separate[0])
        rescale = float(self.run.arguments.get("guidance_rescale") or 0.0)
        return total if uncond is None or rescale == 0 else rescale_noise_cfg(total, cond, rescale)


@contextmanager
def in_full_precision(vae: Any) -> Iterator[None]:
    """An autoencoder that overflows in half precision, as that of SDXL, in float32 within the block."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def is_separate(branch: Branch | None) -> bool:
    """Whether a branch is the one without joint attention."""
    return branch is not None and isinstance(branch.perturbation, Separate)
