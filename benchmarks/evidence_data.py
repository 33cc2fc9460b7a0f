"""The real images that evidence is measured against, as folders of files, and the prompts that go with them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trimtab.guidance.files import replacing
from trimtab.pipelines.emoji.data import EmojiData
from trimtab.pipelines.emoji.pairs import drawing_pairs, picture
from trimtab.pipelines.fashion.data import load
from trimtab.pipelines.generate import pictures

from .images import to_bytes

KNOWN = "Smileys & Emotion,Animals & Nature,Food & Drink"
"""The categories that the emoji models were trained on."""


def garments(folder: Path, count: int, data: str | None) -> Path:
    """A folder of real test images for the Fashion-MNIST model, written where it is missing."""
    for index, image in enumerate(to_bytes(load("t10k", data)[0][:count])):
        file = folder / f"{index:05}.png"
        if not file.is_file():
            pictures.save(Image.fromarray(image[0].numpy()), file, {"dataset": "Fashion-MNIST t10k", "index": index})
    return folder


def emoji(folder: Path, file: Path, categories: str, count: int) -> tuple[Path, Path]:
    """A file of `count` prompts, the captions of held-out drawings in turn, and a folder of these drawings.

    Args:
        folder: for both.
        file: the packed data set.
        categories: of the drawings.
        count: prompts; where there are more than captions these come again.
    """
    pairs = drawing_pairs(EmojiData(file, held_out=True, categories=categories), "edges")
    prompts, drawings = folder / f"prompts-{count}.txt", folder / "drawings"
    lines = [pairs.captions[i % len(pairs)] for i in range(count)]
    with replacing(prompts) as written:
        written.write("\n".join(lines).encode() + b"\n")
    for index, (caption, image) in enumerate(zip(pairs.captions, pairs.targets, strict=True)):
        pictures.save(picture(image), drawings / f"{index:05}.png", {"prompt": caption})
    return prompts, drawings
