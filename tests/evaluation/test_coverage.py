"""Precision, recall, density and coverage are their definitions, written out."""

from __future__ import annotations

import pytest
import torch

from trimtab.evaluation.coverage import Coverage


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double) + shift


def written_out(generated: torch.Tensor, real: torch.Tensor, k: int) -> dict[str, float]:
    def radius(points: torch.Tensor, i: int) -> float:
        return sorted(float((points[i] - points[j]).norm()) for j in range(len(points)) if j != i)[k - 1]

    def inside(point: torch.Tensor, points: torch.Tensor, i: int) -> bool:
        return float((point - points[i]).norm()) <= radius(points, i)

    held = [[inside(g, real, i) for i in range(len(real))] for g in generated]
    held_back = [[inside(r, generated, i) for i in range(len(generated))] for r in real]
    return {
        "precision": sum(any(row) for row in held) / len(generated),
        "recall": sum(any(row) for row in held_back) / len(real),
        "density": sum(sum(row) for row in held) / (k * len(generated)),
        "coverage": sum(any(row[i] for row in held) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_they_are_their_definitions(k: int) -> None:
    generated, real = features(14, 0, shift=0.5), features(17, 1)
    found, expected = Coverage(generated, real, k), written_out(generated, real, k)
    for name, value in expected.items():
        assert getattr(found, name)(torch.arange(len(generated))) == pytest.approx(value), name


def test_equal_distributions_cover_each_other_and_distant_ones_do_not() -> None:
    near, far = Coverage(features(300, 0), features(300, 1)), Coverage(features(50, 0, shift=50), features(50, 1))
    rows = torch.arange(300)
    assert near.precision(rows) > 0.9 and near.recall(rows) > 0.9 and near.coverage(rows) > 0.9
    assert near.density(rows) == pytest.approx(1.0, abs=0.15)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(far, name)(torch.arange(50)) == 0


def test_too_few_images_for_a_neighbourhood_are_refused() -> None:
    with pytest.raises(ValueError, match="generated: 3 images have no 5th neighbour"):
        Coverage(features(3, 0), features(9, 1))
