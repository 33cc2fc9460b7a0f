"""Adapters while they are trained: parameters beside a base model that stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from .low_rank import LowRank


class Trained(nn.Module):
    """The trained parameters alone. The base is no part of the module, so it is neither saved nor moved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()

    def low_rank(self, rank: int, width_in: int, width_out: int, std: float) -> LowRank:
        """A new low-rank update, at first without effect.

        Args:
            rank: of the update.
            width_in, width_out: of the projection.
            std: standard deviation of A; B begins at 0.
        """
        return LowRank(self.add(std * torch.randn(rank, width_in)), self.add(torch.zeros(width_out, rank)))

    def add(self, value: torch.Tensor) -> nn.Parameter:
        """A new parameter."""
        parameter = nn.Parameter(value)
        self.weights.append(parameter)
        return parameter
