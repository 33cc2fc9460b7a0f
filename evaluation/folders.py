"""Images in files, read a batch at a time: a folder of thousands need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..guidance.source import sha256
from ..pipelines.generate import pictures
from ..pipelines.launch import first
from .features import EvaluationError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 50
OF_ONE_IMAGE = {"seed", "prompt", "negative_prompt", "class_label"}
"""Settings that differ between the images of one set."""

logger = logging.getLogger("trimtab")


@dataclass(frozen=True)
class Batch:
    """Some images: their names, their bytes `[n, 3, height, width]`, and the settings inside each (or none)."""

    names: tuple[str, ...]
    images: torch.Tensor
    settings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Pictures:
    """Image files of one folder, all of one size `(width, height)`."""

    folder: Path
    files: tuple[Path, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self) // BATCH)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that tells these files from others of the same names."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file.name) + f"\0{sha256(file)}\n".encode())
        return digest.hexdigest()[:16]

    def batch(self, index: int) -> Batch:
        """The images of one batch, in the order of the files."""
        return read(self.files[index * BATCH : (index + 1) * BATCH])


def read_folder(folder: Path) -> Pictures:
    """All images of a folder, in the order of their names; warns where they were made with several settings.

    Raises:
        EvaluationError: there is no such folder, no image in it, or they differ in size.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}.")
    files = [file for file in folder.iterdir() if file.suffix.lower() in ENDINGS]
    if not files:
        raise EvaluationError(f"{folder} holds no images ({', '.join(ENDINGS)}).")
    found = of_files(folder, files)
    if first() and (differing := _differing(found.files)):
        logger.warning(
            "%s holds images that were made with several settings (%s): they are measured as one set.",
            folder,
            ", ".join(differing),
        )
    return found


def of_files(folder: Path, files: Sequence[Path]) -> Pictures:
    """These images of a folder, in the order of their names, so that draws of a bootstrap are always the same.

    Raises:
        EvaluationError: they differ in size.
    """
    files, sizes = sorted(files), []
    for file in tqdm(files, desc=f"look into {folder.name}", leave=False, disable=not first()):
        with Image.open(file) as opened:
            sizes.append(opened.size)
        if sizes[-1] != sizes[0]:
            raise EvaluationError(f"{file}: {_by(sizes[-1])} pixels, {files[0].name} {_by(sizes[0])}.")
    return Pictures(folder, tuple(files), sizes[0])


def read(files: Sequence[Path]) -> Batch:
    """These images, all of one size.

    Raises:
        EvaluationError: a file that is no image, or whose pixels are no bytes.
    """
    images = torch.stack([_pixels(file) for file in files])
    return Batch(tuple(file.name for file in files), images, tuple(map(_settings, files)))


def _pixels(file: Path) -> torch.Tensor:
    """An image in bytes `[3, height, width]`; what is transparent is on white, as in `EmojiData.images`."""
    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode.startswith("I;16"):
                # Pillow clips these, though of colours of 16 bits it takes the high byte, as is done here.
                fine = np.asarray(image)
                grey = (fine >> 8).astype(np.uint8)
                grey[fine == image.info.get("transparency", -1)] = 255
                image = Image.fromarray(grey)
            if "transparency" in opened.info and [part.args for part in opened.tile] == ["RGB;16B"]:
                # Pillow drops the low bytes, and with them which pixels have this colour.
                raise EvaluationError(f"{file}: a colour of 16 bits a channel is transparent; save it with alpha.")
            if image.mode in ("I", "F"):
                raise EvaluationError(f"{file}: its pixels are of 32 bits; allowed: 8 or 16 bits a channel.")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image.convert("RGBA"))
                image = white
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read as an image: {error}.") from error


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        return pictures.load(file)[1]
    except pictures.PictureError:
        return {}


def _differing(files: Sequence[Path]) -> list[str]:
    """The settings of a set, by name, that are not those of all images; files without any count for nothing."""
    values: dict[str, set[str]] = {}
    for file in files:
        with Image.open(file) as opened:  # its header only, where the settings stand
            text = opened.info.get(pictures.KEY)
        try:
            settings = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            continue
        for name, value in settings.items() if isinstance(settings, dict) else ():
            if name not in OF_ONE_IMAGE:
                values.setdefault(name, set()).add(json.dumps(value, sort_keys=True))
    return sorted(name for name, found in values.items() if len(found) > 1)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
