"""The published checkpoint: for each attention a LoRA on its projections.

    transformer_blocks.0.attn.processor.q_loras.0.down.weight            [rank, width]
    transformer_blocks.0.attn.processor.proj_loras.0.up.weight           [width, rank]
    single_transformer_blocks.0.attn.processor.k_loras.0.down.weight     [rank, width]

The number after `_loras` counts the conditions in one file. There is no alpha: the update is `w B A h`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...guidance.errors import WeightsError
from ..low_rank import LowRank

PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}


Layers = Mapping[str, Mapping[str, LowRank]]
"""The LoRAs by attention, such as `"transformer_blocks.0.attn"`, and projection: q, k, v, and proj in double blocks."""


def attentions_of(transformer: nn.Module) -> dict[str, Any]:
    """The attentions of a Flux transformer by name, in call order."""
    return {name: module for name, module in transformer.named_modules() if name.endswith(".attn")}


def projections_of(transformer: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    """Each attention and projection that has a LoRA, with its width before and after."""
    for layer, attention in attentions_of(transformer).items():
        for projection in PROJECTIONS:
            if projection != "proj" or not layer.startswith("single_"):
                width = attention.inner_dim
                yield layer, projection, attention.query_dim if projection != "proj" else width, width


def read(path: Path, tensors: Mapping[str, torch.Tensor], transformer: nn.Module, index: int = 0) -> Layers:
    """The LoRAs of a checkpoint, checked against the transformer that they are meant for.

    Args:
        path: of the file, for messages.
        tensors: its content.
        transformer: a `FluxTransformer2DModel`.
        index: which of the checkpoint's conditions.

    Raises:
        WeightsError: a tensor is missing, unknown, not finite, or has a shape that does not fit.
    """
    kind = type(transformer).__name__
    wanted = {f"{layer}.processor.{p}_loras.{index}" for layer, p, _, _ in projections_of(transformer)}
    held = {name.removesuffix(".down.weight").removesuffix(".up.weight") for name in tensors}
    own = {name for name in held if name.rpartition(".")[2] == str(index)}
    if unknown := sorted(own - wanted):
        raise WeightsError(f"{path}: {unknown[0]} (and {len(unknown) - 1} more) has no place in this {kind}.")
    layers: dict[str, dict[str, LowRank]] = {}
    for layer, projection, width_in, width_out in projections_of(transformer):
        name = f"{layer}.processor.{projection}_loras.{index}"
        down, up = (_tensor(path, tensors, f"{name}.{part}.weight", kind) for part in ("down", "up"))
        rank = down.shape[0]
        for part, tensor, shape in (("down", down, (rank, width_in)), ("up", up, (width_out, rank))):
            if tensor.shape != shape:
                raise WeightsError(
                    f"{path}: {name}.{part}.weight has shape {tuple(tensor.shape)}, but {kind} with rank {rank} needs "
                    f"{shape}. It was trained for another base model, or the file is damaged."
                )
        layers.setdefault(layer, {})[projection] = LowRank(down, up)
    return layers


def written(layers: Layers, index: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in the published format."""
    return {
        f"{layer}.processor.{projection}_loras.{index}.{part}.weight": getattr(lora, part)
        for layer, loras in layers.items()
        for projection, lora in loras.items()
        for part in ("down", "up")
    }


def _tensor(path: Path, tensors: Mapping[str, torch.Tensor], name: str, kind: str) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise WeightsError(f"{path} lacks {name}, which {kind} needs; it holds {len(tensors)} tensors.")
    if tensor.ndim != 2:
        raise WeightsError(f"{path}: {name} has shape {tuple(tensor.shape)}, but a matrix is needed.")
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{path}: {name} of shape {tuple(tensor.shape)} holds numbers that are not finite.")
    return tensor
