"""The flow transformer is trained on the levels of noise that its scheduler takes."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trimtab.pipelines.emoji.flux import SHIFT, shifted


def test_levels_are_shifted_as_the_scheduler_shifts_them() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    uniform = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(shifted(uniform), scheduler.sigmas)
    assert shifted(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.0, 2 / 3, 1.0])
