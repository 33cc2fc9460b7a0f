"""What a training keeps beside model and optimizer in each checkpoint: averaged weights, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class Average:
    """The exponential moving average of the trained parameters, or the parameters themselves at decay 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._ema = EMAModel(parameters, decay=decay, use_ema_warmup=True, power=0.75) if decay else None

    def to(self, device: torch.device) -> None:
        if self._ema is not None:
            self._ema.to(device)

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        if self._ema is not None:
            self._ema.step(parameters)

    @contextmanager
    def in_place_of(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self._ema is None:
            yield
            return
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    def state_dict(self) -> dict[str, Any]:
        return self._ema.state_dict() if self._ema is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ema is not None:
            self._ema.load_state_dict(state)


class Progress:
    """The number of optimizer steps taken, as a checkpointable object."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
