"""Fashion-MNIST as tensors: 60,000 + 10,000 grey images, 28x28, ten balanced classes (Zalando SE, MIT licence)."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

CLASS_NAMES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load(split: str, folder: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[n, 1, 32, 32]` in -1..1 (padded with background) and labels `[n]`.

    Args:
        split: `"train"` or `"t10k"`.
        folder: where the four IDX files lie; by default where Debian's package puts them.

    Raises:
        FileNotFoundError: with the ways to get the data.
        ValueError: a file that is not IDX.
    """
    folder = Path(folder) if folder is not None else DEBIAN_FOLDER
    pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    images = torch.from_numpy(pixels).float().div(127.5).sub(1).unsqueeze(1)
    return torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0), torch.from_numpy(labels).long()


def _read_idx(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. On Debian or Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: get the "
            "four IDX files of Fashion-MNIST (zalandoresearch/fashion-mnist on GitHub) and pass their folder as --data."
        )
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes.")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
