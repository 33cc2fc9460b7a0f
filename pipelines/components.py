"""Which components of a pipeline matter to guidance: its candidate denoisers and its schedulers."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from ..guidance.errors import UnsupportedPipelineError

_BESIDE = ("ControlNet", "Adapter", "Encoder", "Connectors", "Upsampler", "SafetyChecker", "Vocoder")


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The models that may be the denoiser, each once; which of them is shows at `scheduler.step`."""
    found: dict[int, nn.Module] = {}
    for component in pipe.components.values():
        inner = getattr(component, "_orig_mod", component)
        if not isinstance(inner, ModelMixin) or hasattr(inner, "decode"):
            continue
        if not any(word in type(inner).__name__ for word in _BESIDE):
            found.setdefault(id(component), component)
    return list(found.values())


def schedulers_of(pipe: Any) -> list[Any]:
    """The schedulers, each once."""
    schedulers = [component for component in pipe.components.values() if isinstance(component, SchedulerMixin)]
    return list({id(scheduler): scheduler for scheduler in schedulers}.values())


def check_guidable(pipe: Any) -> None:
    """Refuse a pipeline that has nothing to hold on to.

    Raises:
        UnsupportedPipelineError: it has no denoiser, or no scheduler with a `step`.
    """
    kind = type(pipe).__name__
    if not any(hasattr(scheduler, "step") for scheduler in schedulers_of(pipe)):
        raise UnsupportedPipelineError(f"{kind} cannot be guided: it has no scheduler whose step a guidance could join.")
    if not denoisers_of(pipe):
        raise UnsupportedPipelineError(f"{kind} cannot be guided: it has no denoiser among {', '.join(pipe.components)}.")
