"""Losses that other networks see: none at the reference, and a gradient away from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.guidance.errors import ParameterError
from trimtab.guidance.losses import Content, EmbeddingCosine, SemanticMap, Style, Term, check_target


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1))


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


EMBED = nn.Sequential(network(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
LOSSES: dict[str, Any] = {
    "embedding": lambda reference: EmbeddingCosine(EMBED, EMBED(reference).detach()),
    "content": lambda reference: Content(network(), ("1", "2"), reference),
    "style": lambda reference: Style(network(), ("0", "2"), reference),
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_zero_at_the_reference_and_points_there(name: str) -> None:
    reference, other = picture(1), picture(2)
    loss = LOSSES[name](reference)
    assert loss(reference).abs().max() < 1e-6
    x = torch.cat([other, other]).requires_grad_(True)
    value = loss(x)
    assert value.shape == (2,) and value.min() > 1e-6
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert loss(x.detach() - 0.1 * gradient / gradient.abs().max()).sum() < value.sum()


@pytest.mark.parametrize("kind", ["embedding", "content"])
def test_a_network_in_half_precision_is_shown_images_in_its_own(kind: str) -> None:
    half = EMBED if kind == "embedding" else network()
    half = copy.deepcopy(half).bfloat16()
    loss = EmbeddingCosine(half, half(picture(1).bfloat16()).float().detach()) if kind == "embedding" else Content(
        half, ("1",), picture(1)
    )  # fmt: skip
    value = loss(picture(2))
    assert value.dtype == torch.float32 and loss(picture(1)) < 1e-2 < value


def test_style_does_not_know_where_anything_is() -> None:
    """On features of single pixels, a mirrored image has the same style and another content."""
    pointwise, reference = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh()), picture(1)
    mirrored = reference.flip(-1)
    assert Style(pointwise, ("1",), reference)(mirrored).max() < 1e-6
    assert Content(pointwise, ("1",), reference)(mirrored).min() > 1e-3


def test_a_semantic_map_is_a_mean_over_the_places_that_matter() -> None:
    classes = torch.full((1, 8, 8), -100)
    classes[0, 0, 0] = 2
    x = picture(3)
    expected = -network()(x).log_softmax(1)[0, 2, 0, 0]
    torch.testing.assert_close(SemanticMap(network(), classes)(x)[0], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_each_of_several_targets_is_that_of_the_images_made_for_it(name: str) -> None:
    """Two targets for four images: the first two are of the first."""
    first, second = picture(1), picture(2)
    images = torch.cat([first, first, second, second])
    loss = LOSSES[name](torch.cat([first, second]))
    assert loss(images).abs().max() < 1e-6
    assert loss(images.roll(1, 0))[[0, 2]].min() > 1e-6


def test_each_of_several_maps_is_that_of_the_images_made_for_it() -> None:
    logits = nn.Conv2d(3, 2, 1, bias=False)
    logits.weight.data = torch.tensor([[9.0, 0, 0], [-9.0, 0, 0]]).view(2, 3, 1, 1)
    light, dark = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)
    loss = SemanticMap(logits, torch.stack([torch.zeros(8, 8), torch.ones(8, 8)]).long())
    assert loss(torch.cat([light, light, dark, dark])).max() < 1e-6
    assert loss(torch.cat([dark, light, light, dark]))[[0, 2]].min() > 1


@pytest.mark.parametrize("name", LOSSES)
def test_targets_for_another_number_of_images_are_refused_before(name: str) -> None:
    loss = LOSSES[name](torch.cat([picture(1), picture(2)]))
    check_target(loss, torch.zeros(4, 3, 8, 8), "losses[0]")
    with pytest.raises(ParameterError, match=r"losses\[0\], \w+, has targets for 2 images, but 3 are made"):
        check_target(loss, torch.zeros(3, 3, 8, 8), "losses[0]")


@pytest.mark.parametrize("kind", ["embedding", "content"])
def test_a_faint_gradient_goes_through_a_network_of_float16(kind: str) -> None:
    full = EMBED if kind == "embedding" else network()
    half = copy.deepcopy(full).half()

    def gradient(of: nn.Module) -> torch.Tensor:
        x = picture(2).requires_grad_(True)
        wanted = EMBED(picture(1)).detach()
        loss = EmbeddingCosine(of, wanted) if kind == "embedding" else Content(of, ("1", "2"), picture(1))
        return torch.autograd.grad(1e-8 * loss(x).sum(), x)[0]

    exact = gradient(full)
    assert (gradient(half) - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": 3}, "Term: loss=3; needed: a function of images"),
        ({"weight": "a"}, "Term: weight='a'; allowed: a finite number"),
        ({"weight": float("nan")}, "Term: weight=nan; allowed: a finite number"),
        ({"start": 0.9, "stop": 0.1}, "Term: start=0.9, stop=0.1; allowed: start < stop"),
    ],
)
def test_a_term_that_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Term(**{"loss": lambda x: x.flatten(1).mean(1), **given})


class Two(nn.Module):
    def forward(self, images: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize(
    "loss",
    [
        EmbeddingCosine(Two(), torch.ones(3)),
        EmbeddingCosine(EMBED, [1.0, 2.0]),
        SemanticMap(nn.Flatten(), torch.ones(1)),
    ],
)
def test_a_loss_that_cannot_be_taken_is_one_error(loss: Any) -> None:
    with pytest.raises(ParameterError, match=r"losses\[0\], \w+, does not take the pipeline's images"):
        check_target(loss, torch.zeros(1, 3, 8, 8), "losses[0]")
