"""Gradients through float16 keep their digits, however small they are."""

from __future__ import annotations

import torch

from trimtab.guidance.half import carried, size_of


def test_the_size_of_each_image_is_a_power_of_two_above_its_largest_number() -> None:
    gradient = torch.tensor([[3.0, -5.0], [1e-9, 0.0], [0.0, 0.0], [float("inf"), 1.0]])
    size = size_of(gradient).flatten()
    assert size[0] == 8 and size[2] == size[3] == 1
    assert 0.5 <= 1e-9 / size[1] <= 1 and torch.frexp(size).mantissa.eq(0.5).all()


def test_a_gradient_that_float16_could_not_hold_comes_through_each_image_at_its_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    given, weights = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    faint = torch.tensor([1e-12, 1e3]).view(2, 1, 1)

    def gradient(half: bool) -> torch.Tensor:
        leaf = given.clone().requires_grad_(True)
        result = carried(leaf, lambda x: x.half().sin()) if half else leaf.sin()
        (found,) = torch.autograd.grad((faint * weights * result).sum(), leaf)
        return found

    torch.testing.assert_close(gradient(half=True), gradient(half=False), rtol=5e-3, atol=0)


def test_without_a_gradient_nothing_is_added() -> None:
    assert not carried(torch.ones(1, 2), torch.sin).requires_grad
    assert torch.equal(carried(torch.ones(1, 2), torch.sin), torch.ones(1, 2).sin())


def test_a_graph_that_is_kept_may_be_used_twice() -> None:
    leaf = torch.ones(1, 3, requires_grad=True)
    result = carried(leaf, lambda x: (2 * x.half()).float())
    for weight in (1e-10, 1.0):
        (found,) = torch.autograd.grad(weight * result.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(found, torch.full((1, 3), 2 * weight))
