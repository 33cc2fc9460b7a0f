"""A guidance whose parameters are of every kind that a recipe needs a file for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from trimtab import Guidance, parameter


@dataclass
class Paint(Guidance):
    """Has parameters of every kind that needs a file."""

    name: ClassVar[str] = "test.paint"
    mask: Image.Image | None = parameter(None, "Where.")
    target: torch.Tensor | str | None = parameter(None, "What, -1 to 1.", ge=-1, le=1)
    layers: tuple[Image.Image, ...] = parameter((), "More.")
    table: dict[str, torch.Tensor | float] = parameter({}, "By name.")


def gradient(mode: str = "L") -> Image.Image:
    return Image.linear_gradient("L").resize((6, 4)).convert(mode)


def full() -> Paint:
    return Paint(
        mask=gradient(),
        target=torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(3, 4).T,
        layers=(gradient("RGB"), gradient("RGBA")),
        table={"a": torch.arange(3), "b": 0.5, "c": torch.tensor(True)},
    )
