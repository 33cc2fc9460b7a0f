"""Half precision: what a guidance changes is what it changes in float32, to the rounding of the type."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import CASES, run

import trimtab

NAMES = ["sd15", "sdxl", "sd3", "wan", "qwenimage", "flux_true_cfg"]


@functools.cache
def change(name: str, dtype: torch.dtype) -> torch.Tensor:
    """What PAG adds to the result of a run."""
    pipe = trimtab.guide(CASES[name].build().to(dtype))
    plain = run(pipe, CASES[name])
    with pipe.guidance("pag", scale=2.0):
        guided = run(pipe, CASES[name])
    assert torch.equal(run(pipe, CASES[name]), plain)
    return guided.float() - plain.float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "alike"), [(torch.float16, 0.95), (torch.bfloat16, 0.5)])
def test_the_change_is_that_of_float32(name: str, dtype: torch.dtype, alike: float) -> None:
    """The change is a small difference of large numbers, so its relative error is many times that of the type."""
    expected, actual = change(name, torch.float32), change(name, dtype)
    assert torch.isfinite(actual).all()
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > alike
    assert 0.5 < actual.norm() / expected.norm() < 2
