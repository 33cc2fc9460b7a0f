"""The gradient graph through a denoiser: built over frozen parameters, checkpointed on wish, and pulled back.

With the weights w_i that were observed at `scheduler.step`, the vector-Jacobian product of each row of the denoiser is
taken with `w_i dL/dp`, so that one backward pass serves a pipeline's whole combination without knowing its formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..guidance.errors import GuidanceRuntimeError
from ..guidance.half import size_of
from .call import Call
from .meter import GraphMeter
from .observation import Observation
from .prediction import locate, primary, sample_argument, with_primary
from .taps import put, set_attribute


def prepare(stack: ExitStack, module: nn.Module, meter: GraphMeter, checkpointing: bool) -> None:
    """Have gradients go through a module, not into it, until the stack closes; see `checkpoint_blocks`."""
    freeze(stack, module)
    if checkpointing:
        checkpoint_blocks(stack, module, meter)


def freeze(stack: ExitStack, module: nn.Module) -> None:
    """Let no parameter collect or prepare a gradient until the stack closes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            put(stack, partial(parameter.requires_grad_, False), partial(_thaw, parameter))


def _thaw(parameter: nn.Parameter) -> bool:
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    return frozen


def checkpoint_blocks(stack: ExitStack, module: nn.Module, meter: GraphMeter) -> None:
    """Have a Diffusers model keep only the inputs of its blocks for a gradient, until the stack closes."""

    def recompute(block: Any, *args: Any) -> Any:
        for value in args:
            if isinstance(value, torch.Tensor):
                meter.add(value)
        return checkpoint(block.__call__, *args, use_reentrant=False)

    for child in module.modules():
        if hasattr(child, "gradient_checkpointing"):
            set_attribute(stack, child, "gradient_checkpointing", True)
            set_attribute(stack, child, "_gradient_checkpointing_func", recompute)


def call_with_graph(call: Call, meter: GraphMeter) -> Any:
    """The pipeline's call with a gradient graph from its sample to its output, of which the pipeline sees nothing."""
    args, kwargs = list(call.args), dict(call.kwargs)
    key = sample_argument(args, kwargs)
    if key is None:
        raise GuidanceRuntimeError("the denoiser was called without a sample, so no gradient can be taken through it")
    given = args[key] if isinstance(key, int) else kwargs[key]
    with torch.enable_grad(), meter.watching():
        call.leaf = primary(given).detach().requires_grad_(True)
        value = with_primary(given, call.leaf)
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value
        output = call.original(*args, **kwargs)
        call.graph = primary(output)
    return with_primary(output, call.graph.detach())


def through_denoiser(
    on_prediction: torch.Tensor, sample: torch.Tensor, observation: Observation, calls: Sequence[Call], keep: bool
) -> torch.Tensor:
    """`(dp/dx_t)^T g` for a cotangent g of the pipeline's combined prediction p, by way of the denoiser's rows.

    Args:
        on_prediction: g `[batch, ...]`.
        sample: x_t `[batch, ...]`.
        keep: whether the graph will be needed again.
    """
    on_prediction = observation.kept(torch.zeros_like(on_prediction), on_prediction)
    total = observation.on_sample * on_prediction
    size = size_of(on_prediction) if any(_is_half(call) for call in calls) else torch.ones_like(on_prediction[:1])
    on_prediction = on_prediction / size
    weights = iter(observation.weights)
    for call in calls:
        assert call.graph is not None and call.leaf is not None
        groups = call.graph.detach().split(observation.batch)
        upstream = torch.cat(
            [observation.view.transpose((next(weights) * on_prediction).to(group.dtype), group) for group in groups]
        )
        inward = torch.autograd.grad(call.graph, call.leaf, upstream, retain_graph=keep)[0].float()
        for rows, given in zip(
            inward.split(observation.batch), call.leaf.detach().split(observation.batch), strict=True
        ):
            total = total + size * _onto_sample(rows, given, sample)
    return total


def _is_half(call: Call) -> bool:
    return call.graph is not None and call.graph.dtype == torch.float16


def _onto_sample(gradient: torch.Tensor, given: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to x_t from that with respect to the denoiser's input, in which x_t lies somewhere."""
    place = locate(given, sample)
    if place is None:
        raise GuidanceRuntimeError(
            "the sample was not found in the denoiser's input, so no gradient can be taken through it"
        )
    dim, start, factor = place
    return factor * (gradient.narrow(dim, start, sample.shape[dim]) if dim else gradient.reshape(sample.shape))
