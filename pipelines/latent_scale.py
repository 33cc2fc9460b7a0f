"""How the latents that a pipeline samples stand to those of its autoencoder: `z = sample / scale + shift`."""

from __future__ import annotations

import ast
from typing import Any

import torch

from .source import attributes, nodes


def scale_and_shift(pipe: Any, autoencoder: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as they apply to latents `[batch, channels, ...]`: numbers, one a channel, or one a channel and frame."""
    config = autoencoder.config

    def along(value: Any) -> torch.Tensor:
        found = torch.as_tensor(value, dtype=torch.float32, device=latents.device)
        if not found.ndim:
            return found
        channels = latents.shape[1]
        if found.numel() == channels:
            return found.view(1, channels, *[1] * (latents.ndim - 2))
        return found.view(1, channels, -1, 1, 1)[:, :, : latents.shape[2]]

    scale = along((getattr(config, "scaling_factor", None) if scales(pipe, autoencoder) else None) or 1.0)
    shift = along(getattr(config, "shift_factor", None) or 0.0)
    if getattr(config, "latents_std", None) is not None:
        scale = scale / along(config.latents_std)
    if getattr(config, "latents_mean", None) is not None:
        shift = shift + along(config.latents_mean)
    if divides_by_sigma_data(type(pipe)):
        scale = scale * pipe.scheduler.config.sigma_data
    return scale, shift


def scales(pipe: Any, autoencoder: Any) -> bool:
    """Whether a pipeline scales its latents by its autoencoder's factor, which Kandinsky's leave alone."""
    if pipe.components.get("movq") is autoencoder:
        return False
    kinds = [kind for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers.pipelines.")]
    names = frozenset[str]().union(*(attributes(kind) for kind in kinds))
    return "decode" not in names or "scaling_factor" in names


def divides_by_sigma_data(kind: type) -> bool:
    """Whether a pipeline takes the standard deviation of its scheduler's data off its latents before it decodes."""
    return any(
        isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "latents" for target in node.targets)
        and any(_divides(part) for part in ast.walk(node.value))
        for node in nodes(kind.__call__)
    )


def _divides(node: ast.AST) -> bool:
    divisor = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
    return isinstance(divisor, ast.Attribute) and divisor.attr == "sigma_data"
