"""What gradient graphs keep alive in memory, weighed while they are built and released."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(eq=False)
class Storage:
    """Memory that a graph keeps alive, and how many of its tensors do."""

    address: int
    size: int
    holders: int = 0


class GraphMeter:
    """Adds up what gradient graphs keep alive at a time: tensors that are no parameters, each storage once.

    Attributes:
        bytes: the largest sum so far; `None` where nothing was watched.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._kept: dict[int, Storage] = {}

    def start(self) -> None:
        """Begin a step: nothing of the one before is alive."""
        self._kept.clear()

    def add(self, tensor: torch.Tensor) -> Storage | None:
        """Count one tensor until it is released, or the next step; parameters are not counted."""
        if isinstance(tensor, nn.Parameter):
            return None
        found = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storage = self._kept.setdefault(found.data_ptr(), Storage(found.data_ptr(), found.nbytes()))
        storage.holders += 1
        self.bytes = max(self.bytes or 0, sum(kept.size for kept in self._kept.values()))
        return storage

    def release(self, storage: Storage) -> None:
        """No longer count what one of its holders held."""
        storage.holders -= 1
        if storage.holders == 0 and self._kept.get(storage.address) is storage:
            del self._kept[storage.address]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what autograd saves within the block, for as long as its graph holds it."""
        self.bytes = self.bytes or 0
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: Saved(saved, self), lambda saved: saved.tensor):
            yield


class Saved:
    """A tensor that autograd saved, counted for as long as its node keeps it."""

    def __init__(self, tensor: torch.Tensor, meter: GraphMeter) -> None:
        # An output that its own node saved as it is would keep itself, and the graph with it, for ever.
        self.tensor, self._meter, self._storage = tensor.detach(), meter, meter.add(tensor)

    def __del__(self) -> None:
        if self._storage is not None:
            self._meter.release(self._storage)
