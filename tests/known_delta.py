"""A guidance whose delta is known beforehand, to see what arrives at the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recorder import Record

import trimtab


def known(like: torch.Tensor) -> torch.Tensor:
    """A tenth of the same normal tensor for every sample."""
    noise = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(7))
    return 0.1 * noise.to(like).expand_as(like)


def adding(record: Record, at: int) -> trimtab.Guidance:
    """Adds what is known where the schedulers have been stepped `at` times before."""

    @dataclass
    class Known(trimtab.Guidance):
        def delta(self, step: trimtab.Step, predictions: trimtab.Predictions) -> torch.Tensor | None:
            assert step.own is not None
            return known(step.own) if len(record.steps) == at else None

    return Known()
