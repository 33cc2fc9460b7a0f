"""Blocks that can be left out: each hands on what it was given, under the names in its return statement."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..guidance.errors import ParameterError, did_you_mean
from .families import Family
from .source import returned_names


def resolve_blocks(family: Family, layers: str | Sequence[str], plugin: str) -> tuple[str, ...]:
    """Full names of the blocks that a specification stands for, in call order; see `Family.resolve` for its words.

    `"auto"` is an eighth of a transformer's first blocks from 7/24 of their depth on, which is 7, 8 and 9 of the 24 of
    Stable Diffusion 3.5 medium, and the middle block's transformer blocks in a UNet.

    Raises:
        ParameterError: nothing matches, or what does cannot be left out.
    """
    blocks = skippable(family)
    kind = type(family.module).__name__
    if not blocks:
        raise ParameterError(
            f"{plugin}: layers={layers!r}: {kind} has no block that returns what it takes, so none can be left out."
        )
    chosen: set[str] = set()
    for spec in [layers] if isinstance(layers, str) else layers:
        matched = set(_auto(family, blocks)) if spec == "auto" else {n for n in blocks if family.matches(spec, n)}
        if not matched:
            raise ParameterError(
                f"{plugin}: layers={spec!r} matches no block of {kind} that can be left out."
                f"{did_you_mean(spec, ['auto', *blocks])} Allowed: 'auto', or a name or pattern among "
                f"{', '.join(blocks if len(blocks) <= 8 else [*list(blocks)[:3], '...', *list(blocks)[-3:]])}."
            )
        chosen |= matched
    if not chosen:
        raise ParameterError(f"{plugin}: layers={layers!r} names no block; allowed: 'auto', or at least one name.")
    return tuple(name for name in blocks if name in chosen)


def skippable(family: Family) -> dict[str, nn.Module]:
    """The blocks that return what they take, in call order: the outer ones, in a UNet the transformer blocks inside."""
    if family.name != "unet":
        return {name: block for name, block in family.blocks.items() if passes_on(block)}
    return {
        f"{outer}.{name}": block
        for outer, part in family.blocks.items()
        for name, block in part.named_modules()
        if ".transformer_blocks." in f".{name}" and name.rpartition(".")[2].isdigit() and passes_on(block)
    }


def handed_on(passed_on: Sequence[tuple[str, int]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a block returns when it is left out; `passed_on` is of `passes_on`."""
    values = tuple(kwargs.get(name) if place >= len(args) else args[place] for name, place in passed_on)
    return values[0] if len(values) == 1 else values


def passes_on(block: nn.Module) -> tuple[tuple[str, int], ...]:
    """The names of the arguments that a block returns, each with its position; none if it returns anything else."""
    return _returned_arguments(type(block).forward)


@functools.cache
def _returned_arguments(forward: Callable[..., Any]) -> tuple[tuple[str, int], ...]:
    names, taken = returned_names(forward), list(inspect.signature(forward).parameters)[1:]
    return tuple((name, taken.index(name)) for name in names) if names and set(names) <= set(taken) else ()


def _auto(family: Family, blocks: Mapping[str, nn.Module]) -> list[str]:
    if family.name == "unet":
        return [name for name in blocks if name.startswith("mid_block.")] or list(blocks)[-1:]
    stack = next(iter(blocks)).rpartition(".")[0]
    first = [name for name in blocks if name.rpartition(".")[0] == stack]
    start = min(round(7 * len(first) / 24), len(first) - 1)
    return first[start : start + max(1, round(len(first) / 8))]
