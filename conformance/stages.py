"""The tiny pipelines on which a plug-in is checked: noise, velocity and flow prediction, UNets and a transformer."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from .tiny import assemble, class_conditional, sd3, sd15

TEXT: dict[str, Any] = {"prompt": "a red fox", "num_inference_steps": 2, "output_type": "latent"}


@dataclass(frozen=True)
class Stage:
    """One tiny stock pipeline and one call of it.

    Args:
        name: in test ids and messages.
        build: makes the pipeline, always with the same weights.
        call: arguments of a run of two or three steps; its result must be a tensor, by default the latents.
        without_cfg: those that switch off its own classifier-free guidance.
    """

    name: str
    build: Callable[[], Any]
    call: Mapping[str, Any]
    without_cfg: Mapping[str, Any] = field(default_factory=dict)


STAGES = (
    Stage("noise-unet", partial(assemble, sd15), {**TEXT, "guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    Stage(
        "velocity-unet",
        partial(class_conditional, ["Cat", "Dog"], prediction_type="v_prediction"),
        {"class_labels": [0], "num_inference_steps": 2, "output_type": "pt"},
    ),
    Stage(
        "flow-transformer",
        partial(assemble, sd3),
        {**TEXT, "height": 16, "width": 16, "max_sequence_length": 24, "guidance_scale": 4.0},
        {"guidance_scale": 1.0},
    ),
)


def run(pipe: Any, stage: Stage, seeds: Sequence[int] = (0,), ambient: int = 0, **override: Any) -> torch.Tensor:
    """The images `[batch, ...]` of one call, one for each seed.

    Args:
        ambient: seed of the global generators, on which nothing may depend.
        **override: arguments that replace those of the stage's call.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with seeded(ambient):
        output = pipe(
            **{"output_type": "latent", **stage.call, **override},
            generator=generators,
            num_images_per_prompt=len(seeds),
            return_dict=False,
        )
    return torch.as_tensor(output[0])


def moves_generators(pipe: Any, stage: Stage) -> bool:
    """Whether a call draws from the global generators, or seeds them."""
    with seeded(1):
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        pipe(**{"output_type": "latent", **stage.call}, generator=torch.Generator().manual_seed(0))
        after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    return not torch.equal(before[0], after[0]) or before[1:] != after[1:]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators at a seed within a `with` block; afterwards as before."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def living_tensors() -> int:
    """How many tensors there are that something still refers to."""
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
