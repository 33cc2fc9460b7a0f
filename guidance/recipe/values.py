"""Values of parameters as JSON, and the files of those that JSON cannot hold: tensors and images."""

from __future__ import annotations

import hashlib
import io
import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers.guiders import BaseGuidance
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialized

from ..guiders import create, store
from ..parameters import same

Fetch = Callable[[str, int], bytes]
"""Gives the content of a file that a recipe names, if it has at most so many bytes."""

LARGEST = {".json": 2**20, ".png": 2**26, ".safetensors": 2**30}
"""The most bytes that a recipe and the files beside it may have, by ending."""
LARGEST_IMAGE = 2**26
"""The most pixels of an image; a PNG of few bytes may unpack to many."""
IMAGE_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16")
"""Kinds of image that come back from a PNG as they were."""
DEEPEST = 32
"""The most containers within each other; real recipes have five."""

_TENSOR = "value"
_REFERENCE = {"file", "sha256"}


def encode(value: Any, parameter: str, files: dict[str, bytes] | None) -> Any:
    """A value in JSON's types; a tensor or an image as a reference to a file, whose bytes are put into `files`.

    Raises:
        TypeError: what cannot be stored, or needs a file where there can be none.
    """
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, (list, tuple)):
        return [encode(item, parameter, files) for item in value]
    if isinstance(value, BaseGuidance):
        return encode(store(value), parameter, files)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode(item, parameter, files) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if files is not None and isinstance(value, torch.Tensor):
        return _stored(_safetensors(value), parameter, ".safetensors", files)
    if files is not None and isinstance(value, Image.Image):
        return _stored(_png(value), parameter, ".png", files)
    raise TypeError(type(value).__name__)


def decode(value: Any, hint: Any, fetch: Fetch | None) -> Any:
    """The value again: "inf" as a number, a guider, and a reference as what its file holds, as the type declares it.

    `check_value` makes the tuples.

    Raises:
        ValueError, OSError: a file that is missing, too large, in another format, or not the one that was recorded.
    """
    if _is_reference(value) and (_mentions(hint, torch.Tensor) or _mentions(hint, Image.Image)):
        return _read(value, hint, fetch)
    if isinstance(value, dict) and value.keys() == {"class", "config"} and _mentions(hint, BaseGuidance):
        return create(value["class"], value["config"])
    if isinstance(value, list):
        return [decode(item, hint, fetch) for item in value]
    if isinstance(value, dict):
        return {key: decode(item, hint, fetch) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf") and _mentions(hint, float) else value


def comes_back(value: Any, read: Any) -> bool:
    """Whether what was read is the value that was written."""
    if isinstance(value, BaseGuidance) and isinstance(read, BaseGuidance):
        return store(value) == store(read)
    return same(value, read)


def check_depth(data: object) -> None:
    """Refuse what is nested so deeply that code which walks it could run out of stack: a `ValueError`."""
    level = [data]
    for _ in range(DEEPEST + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _stored(data: bytes, parameter: str, suffix: str, files: dict[str, bytes]) -> dict[str, str]:
    digest = hashlib.sha256(data).hexdigest()
    name = f"{parameter}-{digest[:12]}{suffix}"
    files[name] = data
    return {"file": name, "sha256": digest}


def _safetensors(tensor: torch.Tensor) -> bytes:
    try:
        return serialized({_TENSOR: tensor.detach().cpu().clone().contiguous()})
    except (KeyError, RuntimeError, ValueError) as error:
        raise TypeError(f"{tensor.dtype}, {tensor.layout}") from error


def _png(image: Image.Image) -> bytes:
    if image.mode not in IMAGE_MODES:
        raise TypeError(image.mode)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", icc_profile=None)
    return buffer.getvalue()


def _is_reference(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and value.keys() == _REFERENCE and all(type(item) is str for item in value.values())


def _read(reference: dict[str, str], hint: Any, fetch: Fetch | None) -> torch.Tensor | Image.Image:
    name, suffix = reference["file"], Path(reference["file"]).suffix
    wanted = {".safetensors": torch.Tensor, ".png": Image.Image}.get(suffix)
    if wanted is None or not _mentions(hint, wanted):
        raise ValueError(f"the file {name!r} does not fit; allowed: .safetensors for a tensor, .png for an image")
    if fetch is None:
        raise ValueError(f"the recipe came without its file {name!r}")
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(f"{name!r} is no name of a file beside the recipe")
    data = fetch(name, LARGEST[suffix])
    if (digest := hashlib.sha256(data).hexdigest()) != reference["sha256"]:
        raise ValueError(f"the file {name!r} is not the one that was recorded: its SHA-256 is {digest}")
    return _tensor(data, name) if suffix == ".safetensors" else _image(data, name)


def _tensor(data: bytes, name: str) -> torch.Tensor:
    try:
        return parse_tensors(data)[_TENSOR]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the file {name!r} does not hold a tensor: {error}") from error


def _image(data: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {LARGEST_IMAGE:,}")
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the file {name!r} does not hold an image: {error}") from error


def _mentions(hint: Any, kind: type) -> bool:
    return hint is kind or any(_mentions(part, kind) for part in typing.get_args(hint))
