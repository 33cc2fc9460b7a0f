"""What one condition's fills left: keys and values of every layer, for each distinct prompt and draw of its latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .processors import KeysAndValues


class Bank:
    """Keys and values by layer; row f of each belongs to fill f.

    A fill depends on the pooled prompt, the guidance value and the condition's latents, which make up its key
    `[numbers]`; not on the timestep, the sample, the prompt's tokens or the other conditions.

    Args:
        offload: whether they are kept in main memory.
    """

    def __init__(self, offload: bool) -> None:
        self.layers: dict[str, KeysAndValues] = {}
        self._offload = offload
        self._keys: torch.Tensor | None = None

    def missing(self, keys: torch.Tensor) -> list[int]:
        """One row of `keys` `[rows, numbers]` for each distinct key that no fill belongs to yet."""
        new: list[int] = []
        for row, found in enumerate(self._found(keys).tolist()):
            if found < 0 and not any(torch.equal(keys[row], keys[earlier]) for earlier in new):
                new.append(row)
        return new

    def add(self, keys: torch.Tensor, layers: Mapping[str, KeysAndValues]) -> None:
        """Add fills: their keys `[fills, numbers]`, and what they left in each layer."""
        self._keys = keys if self._keys is None else torch.cat([self._keys, keys])
        for name, states in layers.items():
            key, value = (state.cpu() if self._offload else state for state in states)
            if name in self.layers:
                old_key, old_value = self.layers[name]
                key, value = torch.cat([old_key, key]), torch.cat([old_value, value])
            self.layers[name] = key, value

    def index(self, keys: torch.Tensor) -> torch.Tensor:
        """The fill `[rows]` of each row."""
        return self._found(keys)

    def _found(self, keys: torch.Tensor) -> torch.Tensor:
        """The fill of each row, -1 where there is none."""
        if self._keys is None:
            return keys.new_full((len(keys),), -1, dtype=torch.long)
        same = (keys[:, None] == self._keys[None]).all(dim=-1)
        return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)
