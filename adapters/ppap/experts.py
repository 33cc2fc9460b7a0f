"""Experts by noise range: one frozen network, and for each range of timesteps a LoRA and norms of its own.

    expert(t) = floor(N t / T),      t in [n T / N, (n + 1) T / N) for expert n

Go et al., "Towards Practical Plug-and-Play Diffusion Models", CVPR 2023, arXiv:2212.05973.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...guidance.errors import ParameterError, WeightsError
from ...guidance.networks import tensor_of
from ..weights import Weights, save_weights

KIND = "ppap"


class Experts(nn.Module):
    """A copy of a network with N experts; called with noisy images at unit variance and their timestep.

    Args:
        network: of clean images; it is copied, frozen and kept in eval mode.
        count: number of experts N.
        rank, alpha: of each LoRA, whose update is `alpha / rank B A`.
        layers: names of the convolutions and linear layers that get one; by default all but the last.
        timesteps: T, of the pipeline's training.

    Scale and shift of every norm are an expert's own as well, as in the published code: they are few, and noise changes
    what norms see most.
    """

    def __init__(
        self,
        network: nn.Module,
        count: int = 5,
        rank: int = 16,
        alpha: float = 8.0,
        layers: Sequence[str] | None = None,
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.count, self.rank, self.alpha, self.timesteps = count, rank, alpha, timesteps
        self.layers = tuple(layers if layers is not None else adaptable(network))
        if not self.layers:
            raise ParameterError(
                f"ppap: {type(network).__name__} has no convolution or linear layer below its last that experts could "
                "adapt; give a deeper network."
            )
        self.base_size = sum(parameter.numel() for parameter in network.parameters())
        self.network = copy.deepcopy(network).requires_grad_(False)
        for name, norm in [(name, m) for name, m in self.network.named_modules() if _is_norm(m)]:
            self.network.set_submodule(name, Norms(norm, count))
        exactly = "|".join(map(re.escape, self.layers))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly)
        # PEFT fills what is overwritten, or trained, with numbers of the global generator.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            for index in range(count):
                inject_adapter_in_model(config, self.network, adapter_name=name_of(index))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Experts:
        """The network stays in eval mode: its statistics are those of clean images."""
        super().train(False)
        return self

    def route(self, timestep: float) -> int:
        """The expert of a timestep."""
        return max(0, min(int(timestep * self.count / self.timesteps), self.count - 1))

    def bounds(self, index: int) -> tuple[int, int]:
        """The timesteps `low <= t < high` of an expert."""
        low, high = (-(-i * self.timesteps // self.count) for i in (index, index + 1))
        return low, high

    def forward(self, images: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the network returns for images `[batch, ...]`, each by the expert of its timestep `[batch]`."""
        chosen = [self.route(t) for t in timestep.reshape(-1).expand(len(images)).tolist()]
        if len(set(chosen)) == 1:
            return self._by(chosen[0], images)
        rows: dict[int, torch.Tensor] = {}
        for index in set(chosen):
            where = [row for row, expert in enumerate(chosen) if expert == index]
            rows.update(zip(where, self._by(index, images[where]), strict=True))
        return torch.stack([rows[row] for row in range(len(images))])

    def _by(self, index: int, images: torch.Tensor) -> torch.Tensor:
        trains = self._trains(index)
        for module in self.network.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(name_of(index), inference_mode=not trains)
            elif isinstance(module, Norms):
                module.active = name_of(index)
        return tensor_of(self.network(images))

    # -- weights ---------------------------------------------------------------------------------------------------
    def parameters_of(self, index: int) -> dict[str, nn.Parameter]:
        """LoRA and norms of one expert, by a name that does not depend on the expert."""
        part = f".{name_of(index)}."
        named = self.network.named_parameters()
        return {name.replace(part, "."): parameter for name, parameter in named if part in name}

    def train_only(self, index: int) -> None:
        """Let one expert be trained, and nothing else."""
        self.requires_grad_(False)
        for parameter in self.parameters_of(index).values():
            parameter.requires_grad_(True)

    def _trains(self, index: int) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters_of(index).values())

    def copy_expert(self, source: int, target: int) -> None:
        """Let one expert begin where another ended."""
        with torch.no_grad():
            for name, parameter in self.parameters_of(target).items():
                parameter.copy_(self.parameters_of(source)[name])

    @property
    def trainable_share(self) -> float:
        """Parameters of all experts over those of the network."""
        return self.count * sum(p.numel() for p in self.parameters_of(0).values()) / self.base_size

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> Path:
        """Write all experts into one safetensors file.

        Args:
            path: a name that ends in `.safetensors`.
            about: further texts for its header.
        """
        tensors = {
            f"{name_of(index)}.{name}": parameter
            for index in range(self.count)
            for name, parameter in self.parameters_of(index).items()
        }
        made = {"kind": KIND, "experts": self.count, "rank": self.rank, "alpha": self.alpha, "layers": self.layers,
                "timesteps": self.timesteps}  # fmt: skip
        return save_weights(path, tensors, {**(about or {}), KIND: json.dumps(made)})


class Norms(nn.Module):
    """A norm with a scale and a shift of its own for each expert."""

    def __init__(self, norm: nn.Module, count: int) -> None:
        super().__init__()
        for index in range(count):
            self.add_module(name_of(index), copy.deepcopy(norm))
        self.active = name_of(0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.get_submodule(self.active)(states)
        return normed


def load_experts(network: nn.Module, weights: Weights) -> Experts:
    """The network with the experts of a file.

    Raises:
        WeightsError: the file holds no experts, or those of another network.
    """
    if KIND not in weights.metadata:
        raise WeightsError(f"{weights.path} holds no PPAP experts; make some: trimtab train ppap.")
    made: dict[str, Any] = json.loads(weights.metadata[KIND])
    known = dict(network.named_modules())
    if missing := [layer for layer in made["layers"] if layer not in known]:
        raise WeightsError(f"{weights.path}: its experts adapt {missing[0]!r}, which {type(network).__name__} has not.")
    experts = Experts(network, made["experts"], made["rank"], made["alpha"], made["layers"], made["timesteps"])
    for index in range(experts.count):
        for name, parameter in experts.parameters_of(index).items():
            stored = weights.tensors.get(f"{name_of(index)}.{name}")
            if stored is None or stored.shape != parameter.shape:
                given = "nothing" if stored is None else tuple(stored.shape)
                raise WeightsError(
                    f"{weights.path}: {name_of(index)}.{name} is {given}; the network needs {tuple(parameter.shape)}."
                )
            parameter.data.copy_(stored)
    return experts


def name_of(index: int) -> str:
    """The adapter name of an expert."""
    return f"expert_{index}"


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm whose scale and shift can be trained."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return isinstance(module, kinds) and module.weight is not None


def adaptable(network: nn.Module) -> list[str]:
    """The convolutions (without groups) and linear layers of a network, in order, all but the last: its head."""
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    return found[:-1]
