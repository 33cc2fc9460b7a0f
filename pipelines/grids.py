"""Where each image token lies in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from .prediction import sample_argument

Grid = tuple[int, ...]


def image_grids(config: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Grid, ...]:
    """The heights and widths, or frames, heights and widths, that image tokens of this denoiser call may have.

    Args:
        config: the denoiser's, which may tell the size of its patches.
        args, kwargs: its arguments: positions or sizes of packed latents, or a sample in rows and columns of
            which a token is a patch.
    """
    return (*_of_positions(kwargs), *_of_sizes(kwargs), *_of_sample(config, args, kwargs))


def grid_of(tokens: int, grids: Sequence[Grid]) -> Grid | None:
    """The first of these grids that has so many tokens; `None` if none has."""
    for shape in grids:
        if prod(shape) == tokens:
            return shape if len(shape) < 3 or shape[0] > 1 else shape[1:]
    return None


def _of_positions(kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    ids = kwargs.get("img_ids")
    if not isinstance(ids, torch.Tensor):
        return []
    ids = ids[0] if ids.ndim == 3 else ids
    ranks = [torch.unique(column, return_inverse=True) for column in ids.unbind(dim=1)]
    varying = [(len(values), rank) for values, rank in ranks if len(values) > 1]
    shape = tuple(size for size, _ in varying)
    if not shape or prod(shape) != len(ids) or len(shape) > 3:
        return []
    place = torch.zeros_like(varying[0][1])
    for size, rank in varying:
        place = place * size + rank
    return [shape] if torch.equal(place, torch.arange(len(ids), device=place.device)) else []


def _of_sizes(kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    found = []
    shapes = kwargs.get("img_shapes")
    while isinstance(shapes, (list, tuple)) and shapes and not isinstance(shapes[0], int):
        shapes = shapes[0]
    if isinstance(shapes, (list, tuple)):
        found.append(tuple(shapes))
    sizes = tuple(size for name in ("num_frames", "height", "width") if isinstance(size := kwargs.get(name), int))
    return [*found, sizes] if len(sizes) == 3 else found


def _of_sample(config: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    key = sample_argument(args, kwargs)
    sample = None if key is None else args[key] if isinstance(key, int) else kwargs[key]
    if isinstance(sample, list):
        # A row that is a list holds several pictures, which are no grid together.
        sample = sample[0][None] if isinstance(sample[0], torch.Tensor) else None
    if not isinstance(sample, torch.Tensor) or sample.ndim not in (4, 5):
        return []
    height, width = sample.shape[-2:]
    patch = getattr(config, "patch_size", None)
    if sample.ndim == 4 or patch is None:
        # A UNet halves the sides again and again.
        sides = (2**halvings for halvings in range(8)) if patch is None else (patch,)
        return [_patches((height, width), (side, side)) for side in sides if isinstance(side, int)]
    by_axis = (
        tuple(patch) if isinstance(patch, (list, tuple)) else (getattr(config, "patch_size_t", 0) or 1, patch, patch)
    )
    frames = sample.shape[1 if sample.shape[2] == getattr(config, "in_channels", None) else 2]
    return [_patches((frames, height, width), by_axis)]


def _patches(sides: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-side // each) for side, each in zip(sides, patch, strict=True))
