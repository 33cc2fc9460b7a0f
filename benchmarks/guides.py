"""Networks that guide the Fashion-MNIST model: never the judge's architecture, seed or weights.

A plain classifier of clean images with ReLU and batch norm, as one takes it off the shelf, and the same trained on
noisy images; each is trained where its file is missing.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from trimtab.adapters.ppap.noise import noised
from trimtab.pipelines.fashion.data import CLASS_NAMES, load


class Guide(nn.Module):
    """A pyramid of three residual stages and a mean over the image: no pooling, no hidden layer, unlike the judge.

    467,000 parameters; its forward pass and that of its gradient cost a tenth of an evaluation of the Fashion-MNIST
    model.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 64, 128)) -> None:
        super().__init__()
        self.halve = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs))
            for inputs, outputs in pairwise((1, *widths))
        )
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        ) for width in widths)  # fmt: skip
        self.activation = nn.ReLU()
        self.head = nn.Linear(widths[-1], len(CLASS_NAMES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[n, 1, 32, 32]` to class logits `[n, 10]`."""
        h = images
        for halve, block in zip(self.halve, self.blocks, strict=True):
            h = self.activation(halve(h))
            h = self.activation(h + block(h))
        return self.head(h.mean((2, 3)))


def load_guide(file: Path, noisy: Any = None, data: str | None = None, steps: int = 1500, seed: int = 17) -> Guide:
    """The guide of a file, trained first where it does not exist.

    Args:
        file: its weights.
        noisy: a scheduler, for one that is trained on noisy images at unit variance.
        steps: of 128 images.
    """
    torch.manual_seed(seed)
    guide = Guide()
    if not file.exists():
        _train(guide, noisy, data, steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(guide.state_dict(), file)
    guide.load_state_dict(load_file(file))
    return guide.eval()


def _train(guide: Guide, noisy: Any, data: str | None, steps: int) -> None:
    images, labels = load("train", data)
    optimizer = torch.optim.AdamW(guide.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for _ in tqdm(range(steps), desc="train guide"):
        chosen = torch.randint(len(images), (128,))
        batch = images[chosen]
        if noisy is not None:
            batch = noised(noisy, batch, torch.randn_like(batch), torch.randint(1000, (128,)))
        loss = F.cross_entropy(guide(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
