"""How large a run's images are is known before its first denoiser call, on every kind of pipeline or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from guided_runs import built
from zoo import CASES, run

from trimtab import Guidance, Run, Step, parameter

TOLD = ["sd15", "sd3", "dit", "ddpm", "flux", "qwenimage", "if_", "instruct_pix2pix", "sd_inpaint", "sana_sprint"]
"""By kind of input: latents, pixels, packed tokens, and what more is joined to them."""
UNTOLD = ["wan", "flux_kontext", "lumina"]
"""Videos, tokens of two images, and an autoencoder of another factor than the pipeline says."""


@dataclass
class Sizes(Guidance):
    """Notes what is said before the first call, and what the clean estimate decodes to."""

    told: list = parameter([], "Before.")
    seen: list = parameter([], "Then.")

    def setup(self, run: Run) -> None:
        run.check_image(lambda blank: self.told.append(tuple(blank.shape)))

    def guide_x0(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(step.decode(x0).shape))
        return x0


@pytest.mark.parametrize("name", TOLD + UNTOLD)
def test_what_is_told_before_the_first_call_is_what_the_estimate_decodes_to(name: str) -> None:
    pipe, sizes = built(name), Sizes()
    with pipe.guidance(sizes, name="sizes"):
        run(pipe, CASES[name])
    assert len(sizes.told) == (name in TOLD)
    for rows, *size in sizes.told:
        images, *decoded = sizes.seen[0]
        assert size == decoded
        assert rows % images == 0
