"""A LoRA put around the projections of a UNet's attentions for one run; no module is exchanged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ...guidance.errors import UnsupportedPipelineError, WeightsError
from ...guidance.run import DenoiserCall, Run, Step
from ...guidance.source import is_repository
from ..low_rank import LowRank, check_fits, low_ranks
from ..weights import load_weights

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Settings(Protocol):
    """The parameters of the guidance, see `guidance/plugins/smooth.py`."""

    weights: str | None
    weight_name: str | None
    revision: str | None
    sha256: str | None
    scale: float

    def acts(self, step: Step) -> bool: ...


def projections_of(unet: nn.Module) -> list[str]:
    """The projections of a UNet's attentions, all of which have a LoRA."""
    attentions = [name for name, _ in unet.named_modules() if name.endswith(("attn1", "attn2"))]
    return [f"{attention}.{projection}" for attention in attentions for projection in PROJECTIONS]


class UNetLora:
    """The LoRAs of one run.

    Args:
        run: of any of the guidances.
        unet: a `UNet2DConditionModel`.
    """

    def __init__(self, run: Run, unet: nn.Module) -> None:
        self._run, self._unet = run, unet

    def add(self, settings: Settings) -> None:
        """Have a LoRA act in this run.

        Raises:
            WeightsError, SourceError: weights that cannot be had or do not fit.
            UnsupportedPipelineError: fused projections.
        """
        assert settings.weights is not None
        if self._run.dry and is_repository(settings.weights):
            return
        loaded = load_weights(
            settings.weights,
            weight_name=settings.weight_name,
            sha256=settings.sha256,
            revision=settings.revision,
        )
        found = low_ranks(loaded.path, loaded.tensors)
        named = {f"{attention}.{name}": lora for attention, loras in found.items() for name, lora in loras.items()}
        for name, lora in named.items():
            check_fits(loaded.path, name, lora, self._unet)
        if missing := [name for name in projections_of(self._unet) if name not in named]:
            kind = type(self._unet).__name__
            raise WeightsError(f"{loaded.path} lacks the LoRA of {missing[0]} (and {len(missing) - 1} more) of {kind}.")
        if self._run.dry:
            return
        acting = _Acting(settings, named)
        if any(getattr(module, "fused_projections", False) for module in self._unet.modules()):
            raise UnsupportedPipelineError(
                "smooth: the UNet's projections are fused, so its LoRA would not be called; call "
                "pipe.unfuse_qkv_projections() first."
            )
        for name in named:
            linear = self._unet.get_submodule(name)
            self._run.replace(linear, "forward", functools.partial(_adapted, acting, name, linear.forward))
        self._run.around_denoiser(acting.around)


class _Acting:
    """The updates by projection, and their weight just now."""

    def __init__(self, settings: Settings, loras: Mapping[str, LowRank]) -> None:
        self._settings, self.loras, self.scale, self._moved = settings, loras, 0.0, False

    def around(self, step: Step, call: DenoiserCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._moved:
            sample = call.named(args, kwargs)["sample"]
            self.loras, self._moved = {name: lora.to(sample) for name, lora in self.loras.items()}, True
        self.scale = self._settings.scale if self._settings.acts(step) else 0.0
        try:
            return call(*args, **kwargs)
        finally:
            self.scale = 0.0


def _adapted(acting: _Acting, name: str, forward: Any, states: torch.Tensor, *args: Any) -> torch.Tensor:
    output = forward(states, *args)
    return output if acting.scale == 0.0 else output + acting.scale * acting.loras[name](states)
