"""Somebody else's network, as a guidance uses it within one run: frozen, in eval mode, put back afterwards."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .errors import SourceError
from .shipped import located


def borrow(stack: ExitStack, network: nn.Module) -> None:
    """Put a network into eval mode and freeze its parameters until the stack closes."""
    for module in network.modules():
        if module.training:
            module.training = False
            stack.callback(setattr, module, "training", True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)


def soften(stack: ExitStack, network: nn.Module, beta: float) -> int:
    """Replace every `nn.ReLU` by `Softplus(beta)` until the stack closes; returns how many there were.

    The weights stay. Activations that are called as functions are not found.
    """
    found = [(parent, name) for parent in network.modules() for name, child in parent.named_children()
             if type(child) is nn.ReLU]  # fmt: skip
    for parent, name in found:
        stack.callback(setattr, parent, name, getattr(parent, name))
        setattr(parent, name, nn.Softplus(beta))
    return len(found)


def device_of(network: nn.Module, like: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Where a network's parameters are, and in which type; those of `like` where it has none."""
    first = next((p for p in network.parameters() if p.is_floating_point()), like)
    return first.device, first.dtype


def takes(network: nn.Module, argument: str) -> bool:
    """Whether its forward has an argument of this name."""
    return argument in inspect.signature(network.forward).parameters


def tensor_of(output: Any) -> torch.Tensor:
    """Logits, a map or an embedding in what a network returned."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "predicted_depth", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    first: torch.Tensor = output[0]
    return first


def load_classifier(source: str, revision: str | None, label: str) -> tuple[nn.Module, Any]:
    """A transformers image classifier (safetensors only) and its processor, if it has one.

    Args:
        source: folder or repository.
        revision: branch, tag or commit.
        label: of the guidance, for messages.

    Raises:
        SourceError: there is none.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        network, found = AutoModelForImageClassification.from_pretrained(
            located(source), revision=revision, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{label}: classifier={source!r} gives no transformers image classifier; needed: a folder or repository "
            f"of one, with weights in safetensors format. {' '.join(str(error).split())}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise SourceError(
            f"{label}: classifier={source!r} was not trained to classify: it lacks {missing[0]}, for which there would "
            "be random numbers."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(located(source), revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        processor = None
    return network, processor


def names_of(network: nn.Module) -> tuple[str, ...]:
    """The names of a transformers classifier's classes; none for another module."""
    named = getattr(getattr(network, "config", None), "id2label", None) or {}
    return tuple(str(named[index]) for index in sorted(named))
