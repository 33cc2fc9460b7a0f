"""Condition images as a guidance's parameter gives them."""

from __future__ import annotations

from typing import Any

from PIL import Image, UnidentifiedImageError

from ..guidance.errors import ParameterError


def pictures(value: Any, plugin: str, name: str = "image") -> list[Image.Image]:
    """The images that a parameter stands for: a PIL image, the path of one, or a list of these.

    Args:
        value: the parameter's value.
        plugin, name: the plug-in and its parameter, for messages.

    Raises:
        ParameterError: it is something else, an empty list, or a file that is no image.
    """
    given = value if isinstance(value, (list, tuple)) else [value]
    if not given:
        raise ParameterError(f"{plugin}: {name} is an empty list; give an image, or one for each prompt.")
    return [_picture(item, plugin, name) for item in given]


def _picture(value: Any, plugin: str, name: str) -> Image.Image:
    if isinstance(value, str):
        try:
            return Image.open(value).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ParameterError(f"{plugin}: {name}={value!r} cannot be read as an image: {error}") from None
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    raise ParameterError(
        f"{plugin}: {name} is a {type(value).__name__}; needed: a PIL image, the path of one, or a list of these."
    )
