"""Diffusers' guiders, as a guidance sees them: which of them can serve as one, and how a recipe keeps one.

A guider is kept as the name of its class and its configuration. Only classes that Diffusers itself exports are made
from a name, so a recipe can run no code of its own.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers.guiders
import torch
from diffusers.guiders import BaseGuidance

from .errors import ParameterError, did_you_mean

PREDICTIONS = ("pred_cond", "pred_uncond")
"""What a guider calls the predictions that a guidance can give it."""

EXPORTED: Mapping[str, type[BaseGuidance]] = {
    name: cls
    for name, cls in sorted(vars(diffusers.guiders).items())
    if isinstance(cls, type) and issubclass(cls, BaseGuidance) and cls is not BaseGuidance
}
"""The guiders of Diffusers by the names of their classes."""

NATIVE = {
    "AutoGuidance": "autoguidance",
    "LTX2Guidance": "cfg",
    "PerturbedAttentionGuidance": "pag",
    "SkipLayerGuidance": "slg",
    "SmoothedEnergyGuidance": "seg",
}
"""For those that cannot serve: the plug-in that does what they do."""

_WORD = re.compile(r"[A-Z0-9]+[a-z]*")

OVER_ALL_AXES = frozenset({"MagnitudeAwareGuidance"})
"""Those whose norm over all axes of an image is one that torch takes over two axes only (Diffusers 0.42)."""


def known_as(name: str) -> str | None:
    """The class in `EXPORTED` that a name means: `"apg"`, `"cfg_zero_star"` or `"TangentialClassifierFreeGuidance"`.

    Papers call a method by the first letters of its words, or of some of them: APG, CFG-Zero*.
    """
    wanted = re.sub(r"[^a-z0-9]", "", name.lower().replace("*", "star")).removesuffix("guidance")
    for cls in EXPORTED:
        words = [word.lower() for word in _WORD.findall(cls.removesuffix("Guidance"))]
        initials = ["".join(word[0] for word in words[:end]) for end in range(len(words) + 1)]
        spelled = {
            short + g + "".join(words[end:]) for end, short in enumerate(initials) for g in ("", "g") if short or not g
        }
        if len(wanted) > 2 and wanted in spelled:
            return cls
    return None


def combine(guider: BaseGuidance, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the guider makes of predictions `[batch, ...]`, by its own names for them."""
    shape = next(iter(predictions.values())).shape
    if type(guider).__name__ in OVER_ALL_AXES:
        predictions = {name: prediction.flatten(2) for name, prediction in predictions.items()}
    combined: torch.Tensor = guider.forward(**predictions)[0]
    return combined.reshape(shape)


def check_usable(guider: BaseGuidance) -> None:
    """Refuse a guider that does more than recombine two predictions.

    Raises:
        ParameterError: it changes layers of the denoiser, or reads other predictions; the message says what to use.
    """
    kind = type(guider)
    others = [name for name in kind._input_predictions if name not in PREDICTIONS]
    if kind.prepare_models is not BaseGuidance.prepare_models:
        why = "changes layers of the denoiser"
    elif others:
        why = f"reads {', '.join(others)}, which only its own modular pipeline computes"
    else:
        return
    plugin = NATIVE.get(kind.__name__)
    remedy = f"use the plug-in instead: add_guidance({plugin!r})" if plugin else "write it as a trimtab.Guidance"
    raise ParameterError(f"{kind.__name__} {why}, so it cannot serve as a guidance; {remedy}.")


def create(name: str, config: Mapping[str, Any] | None = None) -> BaseGuidance:
    """A new guider of Diffusers, by the name of its class or what its paper calls it, see `known_as`.

    Raises:
        ParameterError: Diffusers exports no guider of this name, or it does not take this configuration.
    """
    usable = [known for known in EXPORTED if known not in NATIVE]
    if isinstance(name, str) and name not in EXPORTED:
        name = known_as(name) or name
    if not isinstance(name, str) or name not in EXPORTED:
        raise ParameterError(
            f"Diffusers has no guider {name!r}.{did_you_mean(str(name), usable)} It has: {', '.join(usable)}."
        )
    if (plugin := NATIVE.get(name)) is not None:
        raise ParameterError(f"{name} cannot serve as a guidance; use the plug-in instead: add_guidance({plugin!r}).")
    cls = EXPORTED[name]
    takes = _takes(cls)
    if not isinstance(config, (Mapping, type(None))):
        raise ParameterError(f"{name}: its configuration is {config!r}; needed: an object with {', '.join(takes)}.")
    if unknown := sorted((config or {}).keys() - takes):
        raise ParameterError(f"{name} takes no {', '.join(unknown)}; it takes: {', '.join(takes)}.")
    try:
        with _without_notice():
            return cls(**(config or {}))
    except (TypeError, ValueError, ImportError) as error:
        raise ParameterError(f"{name}: {error}") from error


def store(guider: BaseGuidance) -> dict[str, Any]:
    """The guider as a recipe keeps it: `{"class": ..., "config": {...}}`.

    Raises:
        TypeError: its class is none that Diffusers exports.
    """
    kind = type(guider)
    if EXPORTED.get(kind.__name__) is not kind:
        raise TypeError(f"{kind.__module__}.{kind.__qualname__} is no guider of Diffusers")
    return {"class": kind.__name__, "config": configuration(guider)}


def describe(guider: BaseGuidance) -> str:
    """The guider in one line, with the settings that are not its class's defaults."""
    defaults = inspect.signature(type(guider)).parameters
    given = {key: value for key, value in configuration(guider).items() if value != defaults[key].default}
    return f"{type(guider).__name__}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def configuration(guider: BaseGuidance) -> dict[str, Any]:
    """Its configuration, with what has been set on the object since it was made."""
    kept = {key: guider.config[key] for key in _takes(type(guider)) if key in guider.config}
    with _without_notice():
        made = type(guider)(**kept)
    for key in kept:
        for attribute in (key, f"_{key}"):
            now = vars(guider).get(attribute)
            if now != vars(made).get(attribute):
                kept[key] = now
    return kept


def _takes(cls: type[BaseGuidance]) -> list[str]:
    return list(inspect.signature(cls).parameters)


@contextmanager
def _without_notice() -> Iterator[None]:
    """Diffusers says at each construction that guiders are experimental, as often as a recipe is written or read."""
    logger = logging.getLogger(BaseGuidance.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
