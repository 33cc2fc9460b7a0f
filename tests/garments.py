"""Files as Fashion-MNIST's are, with noise in them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def garments(folder: Path, count: int) -> str:
    """The folder, with so many images a split, of noise."""
    rng = np.random.default_rng(0)
    arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": np.arange(count) % 10}
    for split in ("train", "t10k"):
        for name, array in arrays.items():
            head = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return str(folder)
