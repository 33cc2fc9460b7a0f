"""Distances between two sets of images, taken on features, in double precision, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from .processes import shared


class Gaussian:
    """The normal distribution fitted to features `[n, d]`; with n <= d its covariance is singular, which is allowed."""

    def __init__(self, features: torch.Tensor) -> None:
        features = features.double()
        self.mean = features.mean(0)
        self.covariance = torch.cov(features.T).reshape(features.shape[1], features.shape[1])

    @property
    def spread(self) -> float:
        """Total variance, `tr C`."""
        return self.covariance.trace().item()

    @cached_property
    def root(self) -> torch.Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root


def frechet_distance(sample: Gaussian, reference: Gaussian) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson & Landau, 1982; Heusel et al., 2017).

    `C1 C2` has the eigenvalues of the symmetric `C2^(1/2) C1 C2^(1/2)`, so no root of a non-symmetric matrix is needed.
    Its bias falls with the number of samples: compare only values that were computed from equally many.
    """
    product = reference.root @ sample.covariance @ reference.root
    overlap = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum().item()
    shift: float = (sample.mean - reference.mean).square().sum().item()
    return max(0.0, shift + sample.spread + reference.spread - 2 * overlap)  # rounding may take it below


class KernelDistance:
    """Unbiased squared maximum mean discrepancy to a reference `[m, d]`, with `k(x, y) = (x.y / d + 1)^3`.

    Binkowski et al. (2018), "KID". Zero in expectation for equal distributions whatever the number of samples, so it
    may be slightly negative.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        self.reference = reference.double()

    @cached_property
    def within_reference(self) -> float:
        """Mean kernel over the pairs of different reference images."""
        return _mean_off_diagonal(_cubic_kernel(self.reference, self.reference))

    def statistic(self, sample: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """The distance as a function of the indices of the rows of `sample` `[n, d]` that it may use."""
        sample = sample.double()
        within, across = _cubic_kernel(sample, sample), _cubic_kernel(sample, self.reference).mean(1)

        def distance(rows: torch.Tensor) -> float:
            chosen = within[rows][:, rows]
            return _mean_off_diagonal(chosen) + self.within_reference - 2 * across[rows].mean().item()

        return distance

    def resampled(self, sample: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """As `statistic`, but for indices drawn with replacement: pairs of an image with itself are left out."""
        sample = sample.double()
        within, across = _cubic_kernel(sample, sample), _cubic_kernel(sample, self.reference).mean(1)

        def distance(rows: torch.Tensor) -> float:
            times = torch.bincount(rows, minlength=len(sample)).double()
            pairs = times.sum().square() - times.square().sum()
            total = times @ within @ times - (times.square() * within.diagonal()).sum()
            mean_within = (total / pairs).item()
            return mean_within + self.within_reference - 2 * across[rows].mean().item()

        return distance

    def __call__(self, sample: torch.Tensor) -> float:
        """The distance of all of `sample` `[n, d]`."""
        return self.statistic(sample)(torch.arange(len(sample)))


def _mean_off_diagonal(kernel: torch.Tensor) -> float:
    return ((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))).item()


def _cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Estimate:
    """A statistic of n images, and its values with one group of images left out at a time."""

    value: float
    replicates: tuple[float, ...]

    @property
    def error(self) -> float:
        """The grouped jackknife's standard error, `sqrt((g - 1) / g * sum_i (r_i - mean r)^2)` (Efron, 1982)."""
        replicates = torch.tensor(self.replicates, dtype=torch.double)
        groups = len(replicates)
        return ((groups - 1) / groups * (replicates - replicates.mean()).square().sum()).sqrt().item()

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference; where both come from the same seeds its error is that of the *paired* difference."""
        pairs = zip(self.replicates, other.replicates, strict=True)
        return Estimate(self.value - other.value, tuple(a - b for a, b in pairs))

    @property
    def interval(self) -> Interval:
        """The value and 1.96 errors to either side."""
        return Interval(self.value, self.value - 1.96 * self.error, self.value + 1.96 * self.error)


def jackknife(statistic: Callable[[torch.Tensor], float], count: int, strata: int = 1, groups: int = 10) -> Estimate:
    """Estimate `statistic`, a function of the indices of the images that it may use.

    Args:
        statistic: maps indices `[k]` to a number.
        count: number of images.
        strata: images come in rows of this many, one of each class; a row is never torn apart.
        groups: number of groups.
    """
    indices = torch.arange(count)
    group = indices // strata % groups
    return Estimate(statistic(indices), tuple(statistic(indices[group != left_out]) for left_out in range(groups)))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def within(self, least: float, most: float) -> Interval:
        """As far as the value can lie: the jackknife takes errors to be normal and knows no bounds."""
        low, high = (min(max(end, least), most) for end in (self.low, self.high))
        return Interval(self.value, low, high)


def bootstrap(
    statistic: Callable[[torch.Tensor], float], count: int, repetitions: int = 200, seed: int = 0
) -> Interval:
    """The percentile interval (Efron, 1979): `statistic` of images that are drawn with replacement, 95 of 100 draws.

    A set with repetitions is less varied than the set, so it is for means; a statistic of the set's variety, such as
    a Frechet distance or coverage, comes out of every draw too high or too low. Those are for `jackknife`.

    Args:
        statistic: maps indices `[count]` to a number.
        count: number of images.
        repetitions: number of draws.
        seed: of the draws, so that the interval is always the same.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (repetitions, count), generator=generator)
    drawn = shared(lambda repetition: statistic(draws[repetition]), repetitions, "bootstrap")
    low, high = torch.tensor(drawn, dtype=torch.double).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return Interval(statistic(torch.arange(count)), float(low), float(high))
