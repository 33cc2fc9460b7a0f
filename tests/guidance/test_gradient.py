"""How large a step a gradient may take: each rule of `grad_norm`, for each image, by the size of what the run moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab

from .plugins.gaussian_run import noise, pipeline

WEIGHTS = torch.tensor([200.0, 40000.0])


def slope(images: torch.Tensor) -> torch.Tensor:
    """A loss with a gradient that is small for the first image and large for the second."""
    return WEIGHTS * images.flatten(1).sum(1)


def moved(**rule: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What one step to the end takes off each of two images, and the images that it starts from."""
    pipe, start = pipeline([0.3], [0.5]), noise(batch=2)
    stock = pipe(start, 1)
    pipe.add_guidance("steered", losses=(slope,), **rule)
    return stock - pipe(start, 1), start


def size(images: torch.Tensor) -> torch.Tensor:
    return images.square().flatten(1).mean(1).sqrt()


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    shift, _ = moved()
    assert size(shift)[0] * 100 < size(shift)[1]
    return shift


def directions(shift: torch.Tensor) -> torch.Tensor:
    return shift / size(shift).view(-1, 1, 1, 1)


def test_clip_shortens_only_what_is_longer(plain: torch.Tensor) -> None:
    limit = size(plain).mean().item() / 2
    clipped, _ = moved(grad_norm="clip", max_norm=limit)
    torch.testing.assert_close(clipped[0], plain[0], atol=1e-6, rtol=1e-4)
    assert size(clipped)[1].item() == pytest.approx(limit, rel=1e-4)
    torch.testing.assert_close(directions(clipped)[1], directions(plain)[1], atol=1e-4, rtol=0)


def test_unit_makes_every_step_as_long(plain: torch.Tensor) -> None:
    unit, _ = moved(grad_norm="unit", max_norm=25.0)
    torch.testing.assert_close(size(unit), torch.full((2,), 25.0), atol=0, rtol=1e-3)
    torch.testing.assert_close(directions(unit), directions(plain), atol=1e-3, rtol=0)


def test_relative_is_a_share_of_the_sample() -> None:
    relative, start = moved(grad_norm="relative", max_norm=0.1)
    torch.testing.assert_close(size(relative), 0.1 * size(start), atol=0, rtol=1e-3)


def test_none_is_the_default_and_leaves_the_gradient(plain: torch.Tensor) -> None:
    assert torch.equal(moved(grad_norm="none", max_norm=1e-9)[0], plain)


def test_a_gradient_of_zero_stays_zero() -> None:
    pipe, start = pipeline([0.3], [0.5]), noise(batch=2)
    stock = pipe(start, 1)
    pipe.add_guidance("steered", losses=(lambda images: 0 * slope(images),), grad_norm="unit")
    assert torch.equal(pipe(start, 1), stock)


def test_another_rule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(trimtab.ParameterError, match=r"grad_norm='max'.*'none', 'clip', 'unit', 'relative'"):
        pipeline([0.3], [0.5]).add_guidance("steered", losses=(slope,), grad_norm="max")
