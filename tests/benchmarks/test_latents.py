"""The measurement of projections in latent space: passes are counted, errors are those of what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided_runs import built
from zoo import CASES, mask, picture, run

from trimtab.benchmarks.latents import TASKS, Passes, compared


@pytest.mark.parametrize(
    ("parameters", "passes"),
    [({"latent": "encode"}, (1, 0, 2)), ({"latent": "gradient", "latent_steps": 3}, (4, 3, 0))],
    ids=["encode", "gradient"],
)
def test_each_way_costs_the_passes_that_it_says(parameters: dict[str, Any], passes: tuple[int, int, int]) -> None:
    """Of the autoencoder, for each step: decodings, those that are differentiated, encodings."""
    pipe, case = built("sd15"), CASES["sd15"]
    counter = Passes(pipe.vae)
    with pipe.guidance("steered", task="inpainting", image=picture(32), mask=mask(32), **parameters), counter.counted():
        run(pipe, case)
    steps = case.call["num_inference_steps"]
    check = 1  # of the image's size, before the first step
    assert counter.decoded == steps * passes[0] + check
    assert (counter.back, counter.encoded) == (steps * passes[1], steps * passes[2])


@pytest.mark.parametrize("title", TASKS)
def test_only_what_was_measured_counts_as_its_error(title: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    other = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    made = TASKS[title].operator.project(other, TASKS[title].operator.forward(wanted))
    row = compared(TASKS[title], made, wanted)
    assert row["error"] < 1e-5 and row["known"][0] > 90
    assert row["missing"][0] < 20
