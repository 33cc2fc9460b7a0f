"""The measures of image quality agree with closed forms and with independent implementations."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.evaluation.distances import Estimate, Gaussian, Interval, KernelDistance, frechet_distance, jackknife


def features(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def with_moments(mean: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """Two-point-per-axis features whose sample mean and diagonal covariance are exactly these."""
    dimension = len(mean)
    unit = torch.cat([torch.eye(dimension), -torch.eye(dimension)]).double()
    return mean + unit * deviations * math.sqrt((2 * dimension - 1) / 2)


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    mean_1, mean_2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -2.0])
    deviation_1, deviation_2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    distance = frechet_distance(
        Gaussian(with_moments(mean_1, deviation_1)), Gaussian(with_moments(mean_2, deviation_2))
    )
    expected = (mean_1 - mean_2).square().sum() + (deviation_1 - deviation_2).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_correlated_gaussians_is_symmetric_and_agrees_with_the_eigenvalues_of_the_product() -> None:
    first = Gaussian(features(300, 6) @ features(6, 6, seed=1))
    second = Gaussian(features(300, 6, seed=2) @ features(6, 6, seed=3) + 0.5)
    roots = torch.linalg.eigvals(first.covariance @ second.covariance).real.sqrt()
    shift = (first.mean - second.mean).square().sum().item()
    expected = shift + first.spread + second.spread - 2 * roots.sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_to_itself_is_zero_even_where_the_covariance_is_singular() -> None:
    few = Gaussian(features(8, 20))
    assert 0.0 <= frechet_distance(few, few) < 1e-6


def test_an_interval_ends_where_the_value_can_lie() -> None:
    assert Interval(0.1, -0.2, 0.4).within(0, 1) == Interval(0.1, 0.0, 0.4)
    assert Interval(0.9, 0.7, 1.1).within(0, 1) == Interval(0.9, 0.7, 1.0)
    assert Interval(-0.1, -0.3, 0.1).within(-1, 1) == Interval(-0.1, -0.3, 0.1)


def test_kernel_distance_is_unbiased_for_equal_distributions_and_grows_with_a_shift() -> None:
    reference = KernelDistance(features(400, 4, seed=99))
    values = torch.tensor([reference(features(60, 4, seed=seed)) for seed in range(40)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)) + 0.02
    assert reference(features(60, 4) + 1) > values.max()


def test_kernel_distance_agrees_with_a_sum_written_out() -> None:
    x, y = features(5, 3), features(7, 3, seed=1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.dot(b).item() / 3 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert KernelDistance(y)(x) == pytest.approx(within_x + within_y - 2 * across, rel=1e-9)


def test_jackknife_error_of_a_mean_over_groups_of_one_is_the_standard_error() -> None:
    values = features(50, 1).flatten()
    estimate = jackknife(lambda rows: values[rows].mean().item(), count=50, groups=50)
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.error == pytest.approx((values.std() / math.sqrt(50)).item(), rel=1e-9)


def test_jackknife_leaves_out_whole_rows_of_strata() -> None:
    seen: list[torch.Tensor] = []
    jackknife(lambda rows: float(seen.append(rows % 5) or 0), count=40, strata=5, groups=4)
    assert all((torch.bincount(classes) == len(classes) // 5).all() for classes in seen)


def test_difference_of_paired_estimates_has_the_error_of_the_pair() -> None:
    first, second = Estimate(2.0, (1.0, 2.0, 3.0)), Estimate(1.0, (0.5, 1.5, 2.5))
    assert (first - second).value == 1.0
    assert (first - second).error == pytest.approx(0.0)
    assert first.error > 0
