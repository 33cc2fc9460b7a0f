"""What a case of the other classes is, and how it is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from known_delta import known
from recorder import SchedulerStep
from torch import Tensor

from trimtab.conformance.tiny import assemble
from trimtab.guidance.noise import split_variance


def as_itself(step: SchedulerStep, delta: Tensor) -> Tensor:
    return split_variance(step.model_output, step.sample)[0] + delta


def on_the_video(step: SchedulerStep, delta: Tensor) -> Tensor:
    """The scheduler is given the frames of one video as images."""
    video = step.model_output.transpose(0, 1)[None]
    return (video + known(video))[0].transpose(0, 1)


@dataclass(frozen=True)
class Case:
    """One tiny stock pipeline, one call of it, and what guidance makes of it.

    Attributes:
        make: makes the pipeline.
        call: keyword arguments of a run of two steps.
        denoisers: names of the components whose predictions reach a scheduler.
        first: the first call of `scheduler.step` that is guided.
        arrives: what the scheduler should be given at that step, of the stock run's step and a delta.
        unmapped: why `pag` is refused; empty where it acts.
        tried: denoiser calls of the pipeline's own before that.
        steps: what the plan is told of the number of steps, where the call does not say it.
        refused: why every guidance is refused; empty where the pipeline is guidable.
        undeclared: evaluations that no plan knows of, as it says.
        unwanted: rows that are computed because a branch is a whole call of the pipeline's, and not counted.
        renewed: whether each stock run leaves other objects than the one before.
    """

    make: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    denoisers: tuple[str, ...] = ("unet",)
    first: int = 0
    arrives: Callable[[SchedulerStep, Tensor], Tensor] = as_itself
    unmapped: str = ""
    tried: int = 0
    steps: int | None = None
    refused: str = ""
    undeclared: int = 0
    unwanted: int = 0
    renewed: bool = False

    def build(self) -> DiffusionPipeline:
        return assemble(self.make)

    def run(self, pipe: DiffusionPipeline) -> Tensor:
        """One run with fixed seeds, and its output as one tensor."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)
            takes_generator = "generator" in inspect.signature(pipe.__call__).parameters
            generator = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
            output = pipe(**generator, **self.call, return_dict=False)
        return as_tensor(output[0] if isinstance(output, tuple) else output)


def as_tensor(output: Any) -> Tensor:
    """Images, videos and sounds, in whatever lists a pipeline returns them."""
    if isinstance(output, (list, tuple)):
        return torch.stack([as_tensor(part) for part in output])
    return output if isinstance(output, Tensor) else torch.as_tensor(np.array(output))
