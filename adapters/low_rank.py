"""A low-rank update of one projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class LowRank:
    """`scale B A` of one projection: `down` is A `[rank, in]`, `up` is B `[out, rank]`."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        update = F.linear(F.linear(states, self.down.to(states)), self.up.to(states))
        return update if self.scale == 1.0 else self.scale * update
