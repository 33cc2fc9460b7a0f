"""Whether a pipeline computes an unconditional prediction by itself, told from its class and the call's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .components import denoisers_of

_CFG_NAMES = ("guidance_scale", "max_guidance_scale", "true_cfg_scale")


def has_cfg(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the call computes an unconditional prediction by itself, by the pipeline's own test where it has one."""
    scale = next((arguments[name] for name in reversed(_CFG_NAMES) if arguments.get(name) is not None), 1.0)
    if "true_cfg_scale" in arguments:
        return scale > 1 and any(
            arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")
        )
    test = getattr(type(pipe), "do_classifier_free_guidance", None)
    if isinstance(test, property) and test.fget is not None:
        try:
            return bool(test.fget(Seen(pipe, _guidance_scale=float(scale), guidance_scale=float(scale))))
        except Exception:  # a property that reads what only a running call sets: judge by the scale
            return scale > 1
    distilled = any(getattr(getattr(m, "config", None), "guidance_embeds", False) for m in denoisers_of(pipe))
    return scale > 1 and not distilled


class Seen:
    """The pipeline as its own methods would see it with some attributes set."""

    def __init__(self, pipe: Any, **attributes: Any) -> None:
        self._pipe = pipe
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)
