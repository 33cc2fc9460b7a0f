"""The models that ship with this package, and those that its commands make: `trimtab models`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..guidance.shipped import located


@dataclass(frozen=True)
class Model:
    """A model of this package.

    Args:
        name: what `GuidedPipeline.from_pretrained`, or whatever else the model is for, takes once it ships.
        summary: what it is, in a line.
        data: what it was trained on, and under which licence that is.
        command: makes it.
    """

    name: str
    summary: str
    data: str
    command: str

    @property
    def folder(self) -> Path | None:
        """Where it lies if it ships."""
        place = located(self.name)
        return place if isinstance(place, Path) else None

    @property
    def megabytes(self) -> float | None:
        """Of its weights; `None` where it does not ship."""
        if self.folder is None:
            return None
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors")) / 1e6


_EMOJI = "emoji of Noto (Apache-2.0), Twemoji (CC-BY 4.0) and Fluent (MIT)"

MODELS = (
    Model(
        "trimtab/fashion",
        "class-conditional UNet, 32x32 grey",
        "Fashion-MNIST (MIT)",
        "trimtab train base --steps 2000 --mixed-precision bf16",
    ),
    Model(
        "trimtab/emoji-sd",
        "text-to-image UNet in Stable Diffusion format, 64x64",
        _EMOJI,
        "the commands in its card; one of greater width and of all emoji: make models",
    ),
    Model(
        "trimtab/emoji-unicon",
        "edges as a UniCon partner of emoji-sd, for the plug-in joint",
        _EMOJI,
        "the command in its card; one of all emoji: make models",
    ),
    Model(
        "trimtab/emoji-smooth",
        "the LoRA of Smooth Diffusion on emoji-sd, for the plug-in smooth",
        _EMOJI,
        "the command in its card; one of more steps: make models",
    ),
    Model(
        "trimtab/emoji-flux",
        "text-to-image flow transformer in Flux format, 64x64",
        _EMOJI,
        "the command in its card; one of greater width and of all emoji: make models",
    ),
    Model(
        "trimtab/emoji-easycontrol",
        "edges as an EasyControl condition of emoji-flux, for the plug-in easycontrol",
        _EMOJI,
        "the command in its card; one of all emoji: make models",
    ),
    Model(
        "trimtab/emoji-judge-category-0",
        "classifier of emoji by category; it guides",
        _EMOJI,
        "the command in its card",
    ),
    Model(
        "trimtab/emoji-judge-category-1",
        "the same with another seed; it judges",
        _EMOJI,
        "the command in its card",
    ),
    Model(
        "trimtab/emoji-judge",
        "further classifiers of emoji, by style as well, and noise-aware ones",
        _EMOJI,
        "make models",
    ),
    Model("trimtab/emoji-clip", "encoders of emoji images and captions", _EMOJI, "make models"),
)


def rows() -> list[dict[str, Any]]:
    """What is known of each model, for programs."""
    return [
        {
            "name": model.name,
            "summary": model.summary,
            "data": model.data,
            "ships": model.folder is not None,
            "megabytes": None if model.megabytes is None else round(model.megabytes, 1),
            "command": model.command,
            "licence": None if model.folder is None else _licence(model.folder),
        }
        for model in MODELS
    ]


def table() -> str:
    """The models, for people."""
    lines = []
    for row in rows():
        where = f"ships, {row['megabytes']} MB" if row["ships"] else "not shipped"
        lines += [
            f"{row['name']}: {row['summary']} ({where})",
            f"    data: {row['data']}",
            f"    made by: {row['command']}",
        ]
    return "\n".join(lines)


def _licence(folder: Path) -> str | None:
    """What the model card's header says."""
    card = folder / "README.md"
    found = re.search(r"^license: *(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    return found[1] if found else None
