"""Training data: pairs of images with captions, from a JSONL file or from folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..guidance.errors import ParameterError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


class Pairs(Dataset[dict[str, Any]]):
    """Square crops `[3, size, size]` in -1 to 1 of `source` and `target`, which lie on each other, and a `caption`.

    Args:
        data: a JSONL file whose rows have `source`, `target` and `caption`, the paths relative to its folder; or a
            folder with the folders `source` and `target`, in which files of one name are a pair, and perhaps
            `captions.jsonl` with rows of `file` and `caption`.
        size: side of the crops, in pixels.
        source, target: names of the columns or folders; where `source` is empty there are no pairs, only images.
        whole: whether images are squashed to the square, and not cut; `aspect` then is the target's height by width.
        padded: whether `source` is padded with grey to the square instead.

    Raises:
        ParameterError: there are none, a folder or one of a pair is missing, or a row lacks a column; the message says
            which.
    """

    def __init__(
        self, data: str, size: int, source: str = "source", target: str = "target", whole: bool = False,
        padded: bool = False,
    ) -> None:  # fmt: skip
        self._size, self._whole, self._padded = size, whole, padded
        path = Path(data)
        self._rows = list(_of_file(path, source, target) if path.is_file() else _of_folder(path, source, target))
        if not self._rows:
            raise ParameterError(f"data={data!r} holds no pairs of images; needed: a JSONL file, or a folder.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, square = self._rows[index], Image.Image.resize if self._whole else ImageOps.fit
        target = Image.open(row["target"]).convert("RGB")
        found = {"target": self._pixels(target, square), "caption": row["caption"]}
        if "source" in row:
            source = Image.open(row["source"]).convert("RGB")
            found["source"] = self._pixels(source, _padded if self._padded else square)
        return {**found, "aspect": torch.tensor(target.height / target.width)} if self._whole else found

    def _pixels(self, picture: Image.Image, square: Callable[..., Image.Image]) -> torch.Tensor:
        made = square(picture, (self._size, self._size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1) / 127.5 - 1.0


def _padded(picture: Image.Image, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    return ImageOps.pad(picture, size, method, color=(128, 128, 128))


def crop_and_resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central part of squares `[batch, 3, size, size]` that has the aspect ratio of a size, scaled to it."""
    size = images.shape[-1]
    longest = max(height, width)
    rows, columns = size * height // longest, size * width // longest
    top, left = (size - rows) // 2, (size - columns) // 2
    part = images[..., top : top + rows, left : left + columns]
    return F.interpolate(part, (height, width), mode="bilinear", antialias=True)


def unsquashed(images: torch.Tensor, aspects: torch.Tensor, aspect: float, size: tuple[int, int]) -> torch.Tensor:
    """The central parts of one aspect ratio of images that were squashed to squares, scaled to a size.

    Args:
        images: `[batch, 3, side, side]`.
        aspects: height by width of each before.
        aspect: of the parts; an image of this aspect ratio stays whole.
        size: height and width.
    """
    parts = []
    for image, own in zip(images, aspects.tolist(), strict=True):
        shares = (min(1.0, aspect / own), min(1.0, own / aspect))
        rows, columns = (max(1, round(side * share)) for side, share in zip(image.shape[1:], shares, strict=True))
        top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
        part = image[None, :, top : top + rows, left : left + columns]
        parts.append(F.interpolate(part, size, mode="bilinear", antialias=True))
    return torch.cat(parts)


def _of_file(path: Path, source: str, target: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row = json.loads(line)
        wanted = {"target": target} | ({"source": source} if source else {})
        if missing := [column for column in (*wanted.values(), "caption") if column not in row]:
            raise ParameterError(f"{path}, line {number} lacks {', '.join(missing)}; it has: {', '.join(row)}.")
        yield {name: path.parent / row[column] for name, column in wanted.items()} | {"caption": row["caption"]}


def _of_folder(path: Path, source: str, target: str) -> Iterator[Mapping[str, Any]]:
    if not path.is_dir():
        raise ParameterError(f"data={str(path)!r} is neither a file nor a folder.")
    for name, folder in (("source", source), ("target", target)):
        if folder and not (path / folder).is_dir():
            there = ", ".join(sorted(found.name for found in path.iterdir() if found.is_dir())) or "none"
            raise ParameterError(
                f"{name}={folder!r} is no folder in {path}; allowed are those that there are: {there}."
            )
    captions = path / "captions.jsonl"
    rows = [json.loads(line) for line in captions.read_text().splitlines()] if captions.is_file() else []
    texts = {row["file"]: row["caption"] for row in rows}
    for file in sorted((path / target).iterdir()):
        if file.suffix.lower() in IMAGES:
            pair = {"target": file} | ({"source": path / source / file.name} if source else {})
            if missing := [str(one) for one in pair.values() if not one.is_file()]:
                raise ParameterError(f"{missing[0]} is missing, the other of the pair with {file}; add or remove one.")
            yield pair | {"caption": texts.get(file.name, "")}
