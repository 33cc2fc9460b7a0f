"""The exact gradient samples the exact posterior; point estimates of the likelihood do not."""

from __future__ import annotations

import pytest
import torch

from trimtab.benchmarks.posterior import EXACT, GAUSSIAN, TWO, H, Mixture, S, Y, errors


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
def test_the_closed_form_is_that_of_importance_sampling(data: Mixture) -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(data.weights, 400_000, replacement=True, generator=generator)
    roots = torch.linalg.cholesky(data.covariances)
    noise = torch.randn(len(which), 2, generator=generator)
    points = data.means[which] + torch.einsum("nij,nj->ni", roots[which], noise)
    weights = (-(Y - points @ H).square() / (2 * S**2)).softmax(0)
    mean, covariance = data.observed(H, Y, S).moments()
    torch.testing.assert_close(weights @ points, mean, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(points.T, aweights=weights), covariance, atol=0.01, rtol=0)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
def test_only_the_exact_gradient_samples_the_posterior(data: Mixture) -> None:
    mean, covariance, share = errors(data, 3000, 250, [EXACT])[EXACT]
    # Sampling error of 3,000 points, and what 250 steps of a first-order solver leave out of the variance.
    assert mean < 0.03 and covariance < 0.03 and share == pytest.approx(1, abs=0.08)
    rows = errors(data, 1000, 50, ["DPS", "LGD", "MPGD"])
    assert all(found[0] > 0.05 or abs(found[2] - 1) > 0.1 for found in rows.values())
