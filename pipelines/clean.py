"""Phase 5: guidance on the clean estimate, by an edit or by the gradient of a loss.

    x_0 <- guide_x0(x_0),    x_0 <- x_0 - d/dx_0 sum_k L_k(x_0)    or    x_0 <- x_0 - d/dx_t sum_k L_k(x_0(x_t))

The second gradient goes through the denoiser: with the weights w_i that were observed, the vector-Jacobian product of
each of its rows is taken with `w_i dL/dp`, and one backward pass serves all losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.base import Guidance, Step
from ..guidance.errors import GuidanceRuntimeError
from .clock import Clock
from .denoiser import Call
from .hooks import Hooks, annotated
from .observation import Observation
from .prediction import primary, sample_argument, with_primary


def needs_graph(guidance: Guidance) -> bool:
    """Whether a guidance differentiates through the denoiser."""
    return guidance.overrides("loss") and guidance.differentiate == "x_t"


def call_with_graph(call: Call) -> Any:
    """The pipeline's call with a gradient graph from its sample to its output, of which the pipeline sees nothing."""
    args, kwargs = list(call.args), dict(call.kwargs)
    key = sample_argument(args, kwargs)
    if key is None:
        raise GuidanceRuntimeError("the denoiser was called without a sample, so no gradient can be taken through it")
    given = args[key] if isinstance(key, int) else kwargs[key]
    with torch.enable_grad():
        call.leaf = primary(given).detach().requires_grad_(True)
        value = with_primary(given, call.leaf)
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value
        output = call.original(*args, **kwargs)
        call.graph = primary(output)
    return with_primary(output, call.graph.detach())


def guide_clean_estimate(
    hooks: Hooks,
    clock: Clock,
    acting: Mapping[str, Guidance],
    step: Step,
    prediction: torch.Tensor,
    observation: Observation,
    calls: Sequence[Call],
) -> torch.Tensor:
    """The prediction whose clean estimate is what the acting guidances make of it."""
    editing = {n: g for n, g in acting.items() if g.overrides("guide_x0") or g.overrides("loss")}
    if not editing:
        return prediction
    assert clock.algebra is not None and step.sample is not None
    algebra, level, sample = clock.algebra, step.level, step.sample
    x0 = algebra.x0(prediction, sample, level).float()
    views = {name: dataclasses.replace(hooks.view(name, step), own=prediction) for name in editing}
    for differentiate in ("x0", "x_t"):
        losing = {n: g for n, g in editing.items() if g.overrides("loss") and g.differentiate == differentiate}
        if not losing:
            continue
        with torch.enable_grad():
            p, x_t = (tensor.detach().float().requires_grad_(True) for tensor in (prediction, sample))
            estimate = x0.detach().requires_grad_(True) if differentiate == "x0" else algebra.x0(p, x_t, level)
            loss = _sum_of_losses(losing, views, estimate)
            if loss is None:
                continue
            if differentiate == "x0":
                gradient = torch.autograd.grad(loss, estimate)[0]
            else:
                on_p, on_x = torch.autograd.grad(loss, (p, x_t), allow_unused=True, materialize_grads=True)
                gradient = on_x + _through_denoiser(on_p, sample, observation, calls)
        if not torch.isfinite(gradient).all():
            raise GuidanceRuntimeError(
                f"{', '.join(losing)}: the gradient of the loss is not finite at step {step.index} of {step.count}. "
                "Lower its weight, let it start later, or compute the loss in float32."
            )
        x0 = x0 - gradient
    for name, guidance in editing.items():
        if guidance.overrides("guide_x0"):
            with annotated(name, "guide_x0", step):
                x0 = guidance.guide_x0(views[name], x0)
    return algebra.from_x0(x0, sample, level, prediction)


def _sum_of_losses(
    losing: Mapping[str, Guidance], views: Mapping[str, Step], estimate: torch.Tensor
) -> torch.Tensor | None:
    total: torch.Tensor | None = None
    for name, guidance in losing.items():
        with annotated(name, "loss", views[name]):
            loss = guidance.loss(views[name], estimate)
        if loss is None:
            continue
        if loss.shape != estimate.shape[:1]:
            raise GuidanceRuntimeError(
                f"{name}: loss returned shape {tuple(loss.shape)}; needed: one number an image, ({estimate.shape[0]},)."
            )
        total = loss if total is None else total + loss
    return None if total is None else total.sum()


def _through_denoiser(
    on_prediction: torch.Tensor, sample: torch.Tensor, observation: Observation, calls: Sequence[Call]
) -> torch.Tensor:
    """`dL/dx_t` by way of the denoiser's rows."""
    total = observation.on_sample * on_prediction
    weights = iter(observation.weights)
    for call in calls:
        assert call.graph is not None and call.leaf is not None
        groups = call.graph.detach().split(observation.batch)
        upstream = torch.cat(
            [observation.view.transpose(next(weights) * on_prediction.to(group.dtype), group) for group in groups]
        )
        inward = torch.autograd.grad(call.graph, call.leaf, upstream)[0].float()
        for rows, given in zip(
            inward.split(observation.batch), call.leaf.detach().split(observation.batch), strict=True
        ):
            total = total + _onto_sample(rows, given.float(), sample.float())
        call.graph = None
    return total


def _onto_sample(gradient: torch.Tensor, given: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to x_t from that with respect to the denoiser's input, in which x_t lies somewhere."""
    if given.ndim != sample.ndim and given.numel() == sample.numel():
        gradient, given = gradient.reshape(sample.shape), given.reshape(sample.shape)
    for dim in range(1, sample.ndim):
        extra = given.shape[dim] - sample.shape[dim]
        if given.ndim != sample.ndim or extra < 0:
            continue
        for start in {0, extra}:
            part = given.narrow(dim, start, sample.shape[dim])
            if part.shape != sample.shape:
                continue
            factor = (part * sample).sum() / sample.square().sum().clamp_min(1e-30)
            if (part - factor * sample).norm() <= 1e-2 * part.norm():
                return factor * gradient.narrow(dim, start, sample.shape[dim])
    raise GuidanceRuntimeError(
        "the sample was not found in the denoiser's input, so no gradient can be taken through it"
    )
