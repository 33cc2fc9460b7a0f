"""Low-rank updates of the projections of a UNet's attentions, as Diffusers, PEFT and older trainers name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..guidance.errors import WeightsError

_NAMES = (
    # Diffusers and PEFT: unet.<attention>.to_q.lora.down.weight, base_model.model.<attention>.to_q.lora_A.weight
    re.compile(
        r"(?:unet\.|base_model\.model\.)?(?P<attention>.+\.attn(?:1|2|1n))\.(?P<projection>to_q|to_k|to_v|to_out\.0)"
        r"\.(?:lora\.(?P<part>down|up)|lora_(?P<letter>A|B)(?:\.default)?)\.weight"
    ),
    # Diffusers until 0.20: <attention>.processor.to_q_lora.down.weight
    re.compile(
        r"(?:unet\.)?(?P<attention>.+\.attn(?:1|2))\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora"
        r"\.(?P<part>down|up)(?P<letter>)\.weight"
    ),
)


@dataclass(frozen=True)
class LowRank:
    """`scale B A` of one projection: `down` is A `[rank, in]`, `up` is B `[out, rank]`."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def to(self, like: torch.Tensor) -> LowRank:
        """The same where another tensor is, and in its type."""
        return LowRank(self.down.to(like), self.up.to(like), self.scale)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        update = F.linear(F.linear(states, self.down.to(states)), self.up.to(states))
        return update if self.scale == 1.0 else self.scale * update


def low_ranks(path: Path, tensors: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, dict[str, LowRank]]:
    """The updates in a file by attention and projection; tensors of other names are left aside.

    Args:
        path: of the file, for messages.
        tensors: its content.
        scale: of all of them.

    Raises:
        WeightsError: there is none, one lacks a matrix, or holds numbers that are not finite.
    """
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for pattern in _NAMES:
            if match := pattern.fullmatch(name):
                part = match["part"] or {"A": "down", "B": "up"}[match["letter"]]
                projection = "to_out.0" if match["projection"] == "to_out" else match["projection"]
                parts.setdefault((match["attention"], projection), {})[part] = tensor
                shape = tuple(tensor.shape)
                if len(shape) != 2:
                    raise WeightsError(f"{path}: {name} has shape {shape}, but a matrix is needed.")
                if not torch.isfinite(tensor).all():
                    raise WeightsError(f"{path}: {name} of shape {shape} holds numbers that are not finite.")
    if not parts:
        raise WeightsError(f"{path} holds no LoRA of attentions; it holds: {', '.join(list(tensors)[:3])}, ...")
    found: dict[str, dict[str, LowRank]] = {}
    for (attention, projection), both in parts.items():
        if set(both) != {"down", "up"}:
            raise WeightsError(f"{path}: {attention}.{projection} has only one of its two matrices.")
        found.setdefault(attention, {})[projection] = LowRank(both["down"], both["up"], scale)
    return found


def check_fits(path: Path, name: str, lora: LowRank, module: nn.Module, place: str | None = None) -> None:
    """Refuse an update that does not fit its projection.

    Args:
        path: of the file, for messages.
        name: of the update.
        lora: the update.
        module: that holds the projection.
        place: of the projection in it; by default `name`.

    Raises:
        WeightsError: there is no such projection, or a shape differs; the message names file, tensor and both shapes.
    """
    kind = type(module).__name__
    try:
        linear = module.get_submodule(place or name)
    except AttributeError:
        raise WeightsError(f"{path}: {name} has no place in this {kind}.") from None
    rank = lora.down.shape[0]
    wanted = {"down": (rank, linear.in_features), "up": (linear.out_features, rank)}
    for part, shape in wanted.items():
        given = tuple(getattr(lora, part).shape)
        if given != shape:
            raise WeightsError(
                f"{path}: {name}.lora.{part} has shape {given}, but this {kind} with rank {rank} needs {shape}."
            )
