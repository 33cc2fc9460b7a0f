"""What a case of the zoo is, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

Kind = Literal[
    "batched",
    "one_row",
    "two_calls",
    "three_rows",
    "by_frame",
    "by_channel",
    "learned_variance",
    "variance_passed_on",
    "joined",
    "sign_flipped",
    "conversion",
    "norm_rescaled",
    "unpacked",
    "frame_schedulers",
    "sound_beside",
    "rows_converted",
]


@dataclass(frozen=True)
class Case:
    """One tiny stock pipeline and one call of it.

    Attributes:
        name: key in `CASES`.
        build: makes the pipeline with weights that depend on nothing but the code.
        call: keyword arguments of a run of two or three steps.
        kind: how the pipeline combines what its denoiser returns:
            `batched` (one call, two rows a sample), `one_row`, `two_calls` (one row each), `three_rows`,
            `by_frame` (weights that vary by frame), `by_channel` (CFG on some channels only),
            `learned_variance` (dropped before the step),
            `variance_passed_on`, `joined` (more tokens or frames than the sample), `sign_flipped`,
            `conversion` (depends on x_t), `norm_rescaled`, `unpacked` (tokens become frames, some cut off),
            `frame_schedulers` (each frame is stepped by a scheduler copy of its own), `sound_beside` (a second
            output, stepped by a copy of the scheduler) or `rows_converted` (the scheduler makes clean estimates of the
            rows; given frames replace theirs, and then they are combined).
        denoiser: name of the component whose output reaches `scheduler.step` first.
        rows: rows of one denoiser call of this run.
        calls: denoiser calls of one step of this run.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    kind: Kind
    denoiser: str = "unet"
    rows: int = 2
    calls: int = 1


def run(pipe: DiffusionPipeline, case: Case, seed: int = 0, **override: Any) -> torch.Tensor:
    """Call `pipe` with the arguments of `case`, then `override`, and a fresh generator; return the output tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(**{"generator": generator, **case.call, **override}, return_dict=False)
    image = output if isinstance(output, torch.Tensor) else output[0]  # some video pipelines return it bare
    return torch.as_tensor(image)
