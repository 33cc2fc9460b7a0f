"""Symmetry: the nearest symmetric image, exactly, and a symmetric picture out of a real model."""

import pytest
import torch
from trimtab_studio import Symmetry

import trimtab

STEP = trimtab.Step(index=0, count=10, timestep=999.0, level=trimtab.Level(alpha=0.1, sigma=0.995))
FLIPS = {"left-right": [(-1,)], "top-bottom": [(-2,)], "half-turn": [(-2, -1)], "kaleidoscope": [(-1,), (-2,)]}


@pytest.fixture(scope="module")
def pipe():
    return trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")


@pytest.mark.parametrize("kind", FLIPS)
def test_the_estimate_becomes_symmetric_and_a_symmetric_one_stays(kind):
    x0 = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    once = Symmetry(kind=kind).guide_x0(STEP, x0)
    for axes in FLIPS[kind]:
        torch.testing.assert_close(once, once.flip(axes))
    torch.testing.assert_close(Symmetry(kind=kind).guide_x0(STEP, once), once)


def test_half_the_strength_goes_half_the_way():
    x0 = torch.tensor([[[[0.0, 1.0]]]])
    torch.testing.assert_close(Symmetry(scale=0.5).guide_x0(STEP, x0), torch.tensor([[[[0.25, 0.75]]]]))


def test_a_picture_is_symmetric(pipe):
    def sneaker():
        generator = torch.Generator().manual_seed(3)
        return pipe("Sneaker", num_inference_steps=10, generator=generator, output_type="pt").images

    plain = sneaker()
    assert (plain - plain.flip(-1)).abs().mean() > 0.1
    with pipe.guidance("studio.symmetry"):
        symmetric = sneaker()
    torch.testing.assert_close(symmetric, symmetric.flip(-1), atol=1e-4, rtol=0)
    assert symmetric.max() > 0.3  # and still a picture
