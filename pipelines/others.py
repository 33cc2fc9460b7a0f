"""Denoisers beside the pipeline's own: a weaker checkpoint, a smaller sibling."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import diffusers
from torch import nn

from ..guidance.errors import ParameterError
from ..guidance.shipped import located
from .budget import Budget
from .components import denoisers_of
from .conditions import Conditions
from .denoiser import Denoiser

_MUST_AGREE = (
    "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "caption_channels",
    "pooled_projection_dim", "num_class_embeds", "num_embeds_ada_norm", "addition_embed_type", "text_dim",
    "context_in_dim", "cap_feat_dim", "patch_size", "guidance_embeds",
)  # fmt: skip
"""Settings that decide what a denoiser takes and returns."""


class OtherDenoisers:
    """The denoisers that branches of one run name, besides the pipeline's own.

    What was loaded stays with the pipeline for its next run, until a run does without.
    """

    def __init__(self, pipe: Any, conditions: Conditions, stack: ExitStack, budget: Budget | None = None) -> None:
        self._pipe, self._conditions, self._stack, self._budget = pipe, conditions, stack, budget
        self._kept: dict[str, nn.Module] = pipe.__dict__.get("_trimtab_loaded", {})
        self._denoisers: dict[str | nn.Module, Denoiser] = {}
        stack.callback(self._drop_unused)

    def prepare(self, source: str | nn.Module, plugin: str) -> None:
        """Load, check and place a denoiser.

        Raises:
            ParameterError: as `check_other`.
        """
        if source in self._denoisers:
            return
        kind, config, own = check_other(self._pipe, source, plugin)
        if isinstance(source, nn.Module):
            module = source
            device, wanted = _device_of(module), _device_of(own)
            if device != wanted and "meta" not in (device, wanted):
                raise ParameterError(
                    f"{plugin}: the other denoiser is on {device}, the pipeline's on {wanted}; move it there."
                )
        else:
            if source not in self._kept:
                place, revision = placed(source)
                self._kept[source] = kind.from_pretrained(
                    place, subfolder=config, revision=revision, torch_dtype=own.dtype, use_safetensors=True
                )
            module = self._kept[source] = self._kept[source].to(self._pipe._execution_device)
            self._pipe.__dict__["_trimtab_loaded"] = self._kept
        self._denoisers[source] = Denoiser(module, self._conditions, self._stack, self._budget)

    def of(self, source: str | nn.Module) -> tuple[Denoiser, Callable[..., Any]]:
        """A denoiser that was prepared, and its forward.

        Raises:
            ParameterError: it was not.
        """
        if source not in self._denoisers:
            raise ParameterError(
                f"A branch names the denoiser {source!r}, which setup did not prepare; call run.prepare_denoiser in it."
            )
        denoiser = self._denoisers[source]
        return denoiser, denoiser.module.__call__

    def _drop_unused(self) -> None:
        for source in set(self._kept) - set(self._denoisers):
            del self._kept[source]
        if not self._kept:
            self._pipe.__dict__.pop("_trimtab_loaded", None)


def check_other(pipe: Any, source: str | nn.Module, plugin: str) -> tuple[Any, str | None, Any]:
    """The class of another denoiser, the subfolder that holds it, and the one of the pipeline that it can stand for.

    Args:
        source: a module, a folder or a repository on the Hub (`repository@revision` for one of its revisions): of a
            denoiser, or of a pipeline that has one.

    Raises:
        ParameterError: there is none, or it takes or returns something else than the pipeline's own.
    """
    own = {name: module for name, module in pipe.components.items() if any(module is d for d in denoisers_of(pipe))}
    if isinstance(source, nn.Module):
        candidates: list[tuple[Any, str | None, Any]] = [(type(source), None, getattr(source, "config", {}))]
    else:
        candidates = [found for folder in (None, *own) if (found := _described(source, folder)) is not None]
        if not candidates:
            raise ParameterError(
                f"{plugin}: {source!r} holds no denoiser. Allowed: a folder, or a repository on the Hub, of a "
                f"Diffusers model or pipeline; the parts looked for in a pipeline: {', '.join(own)}."
            )
    kind, folder, config = candidates[0]
    where, reasons = source if isinstance(source, str) else "the given module", []
    for name, module in own.items():
        differing = [
            f"{key}={config.get(key)!r} (the pipeline's: {module.config.get(key)!r})"
            for key in _MUST_AGREE
            if config.get(key) != module.config.get(key)
        ]
        if not differing:
            return kind, folder, module
        reasons.append(f"{name}: {', '.join(differing)}")
    raise ParameterError(
        f"{plugin}: the {kind.__name__} of {where} does not take and "
        f"return what the pipeline's denoiser does: {'; '.join(reasons)}."
    )


def placed(source: str) -> tuple[Any, str | None]:
    """Where a denoiser lies: a folder, or `repository` or `repository@revision` on the Hub."""
    place = located(source)
    if os.path.exists(place):
        return place, None
    repository, _, revision = source.partition("@")
    return located(repository), revision or None


def _described(source: str, folder: str | None) -> tuple[Any, str | None, Any] | None:
    """Class, subfolder and configuration of a model, without its weights."""
    place, revision = placed(source)
    if os.path.isdir(place) and not os.path.isfile(os.path.join(place, folder or "", "config.json")):
        return None
    try:
        config = diffusers.AutoModel.load_config(place, subfolder=folder, revision=revision)
    except (OSError, ValueError):
        return None
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    return (kind, folder, config) if kind is not None else None


def _device_of(module: Any) -> str:
    return str(next(module.parameters()).device)
