"""Low-rank adapters (PEFT) inside a denoiser, and how they act with another strength for some rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..guidance.branch import ScaledAdapters
from ..guidance.errors import ParameterError, did_you_mean
from .families import Family


def adapters_of(family: Family, names: str | Sequence[str], plugin: str) -> ScaledAdapters:
    """The perturbation that switches adapters off.

    Args:
        names: of adapters, or `"all"` for those that are active.

    Raises:
        ParameterError: none is loaded into this denoiser, one is not known, or they are fused into the weights.
    """
    layers = {name: module for name, module in family.module.named_modules() if _has_adapters(module)}
    kind = type(family.module).__name__
    if not layers:
        raise ParameterError(
            f"{plugin}: {kind} has no adapter (LoRA) that could be switched off; load one first, "
            "pipe.load_lora_weights(...), or give a weaker denoiser instead."
        )
    known = {adapter for module in layers.values() for adapter in module.scaling}
    active = {adapter for module in layers.values() for adapter in module.active_adapters}
    wanted = sorted(active) if names == "all" else [names] if isinstance(names, str) else list(names)
    for adapter in wanted:
        if adapter not in known:
            raise ParameterError(
                f"{plugin}: {kind} has no adapter {adapter!r}.{did_you_mean(adapter, known)} "
                f"Allowed: 'all', or names among {', '.join(sorted(known))}."
            )
    if any(module.merged for module in layers.values()):
        raise ParameterError(
            f"{plugin}: adapters are fused into the weights of {kind} and cannot be switched off for a branch; call "
            "pipe.unfuse_lora() first."
        )
    holding = tuple(name for name, module in layers.items() if set(wanted) & set(module.scaling))
    return ScaledAdapters(holding, tuple(wanted))


@contextmanager
def scaled(layer: Any, perturbation: ScaledAdapters) -> Iterator[None]:
    """Within the context, this layer's adapters act with the perturbation's factor."""
    kept = {name: layer.scaling[name] for name in perturbation.adapters if name in layer.scaling}
    layer.scaling.update({name: perturbation.factor * value for name, value in kept.items()})
    try:
        yield
    finally:
        layer.scaling.update(kept)


def _has_adapters(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")
