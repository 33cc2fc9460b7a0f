"""Linear measurements: each inverse is a right inverse, and a projection measures as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.guidance.operators import LinearOperator, inpainting, luminance, resampling


def images(channels: int = 3, height: int = 24, width: int = 18) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


KNOWN = torch.rand(1, 1, 24, 18, generator=torch.Generator().manual_seed(1)) > 0.5
OPERATORS = {
    "inpainting": inpainting(KNOWN),
    "luminance": luminance(),
    **{f"to {low}": resampling((24, 18), low) for low in ((12, 9), (8, 6), (7, 5), (17, 18), (1, 1))},
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_projection_measures_as_it_should_and_twice_is_once(name: str) -> None:
    operator: LinearOperator = OPERATORS[name]
    x, other = images(), images().flip(0)
    y = operator.forward(other)
    projected = operator.project(x, y)
    torch.testing.assert_close(operator.forward(projected), y, atol=2e-6, rtol=0)
    torch.testing.assert_close(operator.project(projected, y), projected, atol=4e-6, rtol=0)
    torch.testing.assert_close(operator.forward(operator.right_inverse(y)), y, atol=2e-6, rtol=0)
    torch.testing.assert_close(operator.project(x, operator.forward(x)), x, atol=4e-6, rtol=0)


# From almost as many pixels nearly all is decided, so that the rounds come to a few thousandths only.
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "to (17, 18)"])
def test_within_the_range_of_images_there_is_one_that_measures_as_it_should(name: str) -> None:
    operator: LinearOperator = OPERATORS[name]
    y = operator.forward(images().flip(0).mul(1.1).clamp(-1, 1))
    within = operator.project_within(2 * images(), y)
    assert within.abs().max() <= 1
    torch.testing.assert_close(operator.forward(within), y, atol=1e-3, rtol=0)
    inside = 0.2 * images()
    torch.testing.assert_close(operator.project_within(inside, operator.forward(inside)), inside, atol=4e-6, rtol=0)


def test_an_image_on_black_measures_as_another_one_however_many_are_beside_it() -> None:
    """Where the measurement is black nothing is left to choose, which is what takes the most rounds."""
    x = -torch.ones(3, 1, 32, 32)
    x[0, 0, 4:28, 10:22], x[1, 0, 12:30, 2:30], x[2, 0, 8:12, 8:12] = 0.9, 0.3, 1.0
    operator = resampling((32, 32), (8, 8))
    y = operator.forward(x.roll(1, 0))
    within = operator.project_within(x, y)
    torch.testing.assert_close(operator.forward(within), y, atol=5e-4, rtol=0)
    assert torch.equal(operator.project_within(x[:1], y[:1]), within[:1])


def test_known_pixels_are_kept_to_the_bit() -> None:
    x, y = images(), images().flip(0)
    known = KNOWN.expand_as(x)
    projected = OPERATORS["inpainting"].project(x, y)
    assert torch.equal(projected[known], y[known]) and torch.equal(projected[~known], x[~known])


def test_resizing_is_that_of_pil() -> None:
    pixels = (images(3)[0].permute(1, 2, 0).add(1) * 127.5).round().to(torch.uint8)
    resized = Image.fromarray(pixels.numpy()).resize((7, 9), Image.Resampling.BICUBIC)
    x = pixels.permute(2, 0, 1)[None].float()
    ours = resampling((24, 18), (9, 7)).forward(x).clamp(0, 255)
    assert (ours[0].permute(1, 2, 0) - torch.from_numpy(np.array(resized)).float()).abs().max() < 1.5


def test_luminance_is_that_of_pil_and_keeps_the_differences_of_colour() -> None:
    pixels = (images(3)[0].permute(1, 2, 0).add(1) * 127.5).round().to(torch.uint8)
    grey = torch.from_numpy(np.array(Image.fromarray(pixels.numpy()).convert("L"))).float()
    x = pixels.permute(2, 0, 1)[None].float()
    assert (luminance().forward(x)[0, 0] - grey).abs().max() <= 1.0
    projected = luminance().project(x, grey[None, None])
    torch.testing.assert_close(projected[:, 0] - projected[:, 1], x[:, 0] - x[:, 1], atol=1e-3, rtol=0)


def test_a_measurement_of_no_image_is_said() -> None:
    operator = resampling((24, 18), (8, 6))
    beyond = torch.full((1, 3, 8, 6), 1.5)
    with pytest.warns(UserWarning, match=r"no image in -1..1 was found that measures .* off by 0\.5"):
        within = operator.project_within(images()[:1], beyond, rounds=50)
    assert within.abs().max() <= 1
