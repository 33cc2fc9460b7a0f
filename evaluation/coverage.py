"""How well two sets of features cover each other, by balls around each with the radius of its k-th neighbour.

With B(y) the ball around a real image that reaches its k-th nearest real neighbour:

| measure | share or mean | paper |
| --- | --- | --- |
| precision | of generated images that lie in some ball around a real one | Kynkaanniemi et al., 2019 |
| recall | of real images that lie in some ball around a generated one | Kynkaanniemi et al., 2019 |
| density | number of balls of real images that hold a generated one, over k | Naeem et al., 2020 |
| coverage | of real images whose ball holds a generated one | Naeem et al., 2020 |
"""

from __future__ import annotations

import torch

NEIGHBOUR = 5
"""Which neighbour's distance is a ball's radius, where nothing else is said."""


class Coverage:
    """The four measures of generated features `[n, d]` against real ones `[m, d]`.

    Args:
        generated, real: features.
        k: which neighbour's distance is a ball's radius.
    """

    def __init__(self, generated: torch.Tensor, real: torch.Tensor, k: int = NEIGHBOUR) -> None:
        for name, features in (("generated", generated), ("real", real)):
            if len(features) <= k:
                raise ValueError(f"{name}: {len(features)} images have no {k}th neighbour; needed: more than {k}.")
        generated, real = generated.double(), real.double()
        self.k = k
        self._distances = torch.cdist(generated, real)
        self._between = torch.cdist(generated, generated)
        self._in_real = self._distances <= _radii(torch.cdist(real, real), k)

    def precision(self, generated: torch.Tensor) -> float:
        """Over the generated images of these indices."""
        return self._in_real[generated].any(1).double().mean().item()

    def recall(self, generated: torch.Tensor) -> float:
        """Of all real images, by the generated ones of these indices, whose neighbours are among themselves."""
        radii = _radii(self._between[generated][:, generated], self.k)
        return (self._distances[generated] <= radii[:, None]).any(0).double().mean().item()

    def density(self, generated: torch.Tensor) -> float:
        """Over the generated images of these indices; 1 for equal distributions, and it may be more."""
        return self._in_real[generated].double().sum(1).mean().item() / self.k

    def coverage(self, generated: torch.Tensor) -> float:
        """Of all real images, by the generated ones of these indices."""
        return self._in_real[generated].any(0).double().mean().item()


def _radii(distances: torch.Tensor, k: int) -> torch.Tensor:
    # The nearest of all is the image itself.
    return distances.kthvalue(k + 1, dim=1).values
