"""What controls the rows of a further prompt beside it: what would control the pipeline's own negative prompt.

A ControlNet is given the prompt as well, so it runs once more for each further prompt of a step, and its new residuals
take the place of the old ones wherever these are found among the denoiser's arguments. In guess mode the rows of a
negative prompt have none. A pipeline whose unconditional prediction is a call of its own may give that the residuals of
the prompt; so do branches of it. An IP-Adapter has an embedding of no image for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..guidance.branch import UNCOND, Branch, Condition
from ..guidance.errors import UnsupportedPipelineError
from .interception import tap_call, tap_method
from .own_cfg import shares_residuals
from .prediction import with_sample_at
from .rows import map_tensors, take_rows, tensors_in

Arguments = tuple[Any, Any]
"""The positional and the named arguments of a model's call."""

IMAGES = ("ip_adapter_image", "ip_adapter_image_embeds")
PREPARE = "prepare_ip_adapter_image_embeds"


def check_controlled(
    pipe: Any, arguments: Mapping[str, Any], branch: Branch, own: Sequence[Branch], asked_by: str
) -> None:
    """Refuse a branch with a further prompt in a call that has an IP-Adapter's embedding for its own rows only.

    Args:
        own: the branches that the pipeline computes by itself.

    Raises:
        UnsupportedPipelineError: there is no embedding of no image, and the pipeline cannot make one.
    """
    if branch.condition == "cond" or all(arguments.get(name) is None for name in IMAGES):
        return
    alone = arguments.get("ip_adapter_image_embeds") is not None and UNCOND not in own
    if alone or not _knows_no_image(pipe):
        raise UnsupportedPipelineError(
            f"{asked_by} needs the branch {branch}, but its IP-Adapter has embeddings for {type(pipe).__name__}'s own "
            "rows only. Let the pipeline compute its unconditional prediction, with a guidance scale above 1 and what "
            "to avoid as its negative_prompt: 'cfg' without a negative_prompt then takes the place of that scale."
        )


@dataclass
class _ControlCall:
    """A ControlNet's last call.

    Args:
        said: for further prompts: the residuals of the prompt's rows, and those that take their place.
        x_t: at which it was made again, if it was.
        before: what it said before that.
    """

    module: nn.Module
    original: Callable[..., Any]
    args: Any
    kwargs: Any
    output: Any
    said: dict[Condition, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)
    x_t: torch.Tensor | None = None
    before: list[torch.Tensor] = field(default_factory=list)


class Controls:
    """The controls of one run of one pipeline, watched in its own calls."""

    def __init__(self, pipe: Any, stack: ExitStack) -> None:
        self._kind = type(pipe).__name__
        self._call: _ControlCall | None = None
        self._images: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._residuals_are_shared = shares_residuals(type(pipe))
        if isinstance(getattr(pipe, "controlnet", None), nn.Module):
            tap_call(stack, pipe.controlnet, self._watch_controlnet)
        if _knows_no_image(pipe):
            tap_method(stack, pipe, PREPARE, self._watch_images)

    def _watch_controlnet(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        self._call = _ControlCall(module, original, args, kwargs, output)
        return output

    def _watch_images(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        both = result
        if not bound.arguments["do_classifier_free_guidance"] and bound.arguments["ip_adapter_image"] is not None:
            bound.arguments["do_classifier_free_guidance"] = True
            both = original(*bound.args, **bound.kwargs)
        pairs = [tuple(tensor.chunk(2)) for tensor in tensors_in(both)]
        if all(len(pair) == 2 for pair in pairs):
            self._images = [shown for _, shown in pairs], [none for none, _ in pairs]
        return result

    def of_other_prompt(
        self, condition: Condition, arguments: Arguments, roles: Callable[..., list[str] | None],
        prompted: Callable[[nn.Module, Any, Any], Arguments],
    ) -> Arguments:  # fmt: skip
        """A denoiser's arguments for rows of the prompt, with the controls that those of another condition have.

        Args:
            arguments: with the other prompt in them already.
            roles: see `Conditions.roles`.
            prompted: puts that prompt into a model's arguments.

        Raises:
            UnsupportedPipelineError: the controls are not found in the arguments, or not understood.
        """
        arguments, _ = _exchanged(arguments, *self._images)
        if self._call is None or self._residuals_are_shared:
            return arguments
        if condition not in self._call.said:
            self._call.said[condition] = self._residuals(self._call, roles, prompted)
        old, new = self._call.said[condition]
        arguments, found = _exchanged(arguments, old, new)
        if found < len(old):
            raise UnsupportedPipelineError(
                f"{self._kind}: what its ControlNet returned is not found among the denoiser's arguments, so it cannot "
                f"control the branch {condition}. Use the pipeline's own guidance_scale and negative_prompt."
            )
        return arguments

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """What is asked of another x_t within is forgotten after it: the step stays at its own."""
        outer = self._call
        try:
            yield
        finally:
            self._call = outer

    def of_other_sample(self, arguments: Arguments, batch: int, sample: torch.Tensor, x_t: torch.Tensor) -> Arguments:
        """A denoiser's arguments at another x_t, with the residuals that the ControlNet has for that.

        Args:
            batch: images of the run.
            sample, x_t: the x_t of the pipeline's call, and the other `[batch, ...]`.

        Raises:
            UnsupportedPipelineError: x_t or the residuals are not found.
        """
        if self._call is None:
            return arguments
        if self._call.x_t is not x_t:  # a second call of the pipeline may share the residuals of the first
            self._call = _at(self._call, batch, sample, x_t)
        old, new = self._call.before, tensors_in(self._call.output)
        arguments, found = _exchanged(arguments, old, new)
        if not found and self._call.kwargs.get("guess_mode"):
            # They are joined to those of the negative prompt's rows, which are none.
            arguments, found = _exchanged(arguments, *([_beside_none(one) for one in some] for some in (old, new)))
        if found < len(old):
            raise UnsupportedPipelineError(
                f"{self._kind}: what its ControlNet returned is not found among the denoiser's arguments, so nothing "
                "can be predicted at another x_t; leave out what blurs it (sag), or evaluates a step several times."
            )
        return arguments

    def _residuals(
        self, call: _ControlCall, roles: Callable[..., list[str] | None],
        prompted: Callable[[nn.Module, Any, Any], Arguments],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        """The residuals of the prompt's rows, and those that rows of another prompt have instead."""
        every = tensors_in(call.output)
        rows = len(every[0])
        known = roles(call.module, call.kwargs, rows) or ["cond"] * rows
        chosen = torch.tensor([row for row, role in enumerate(known) if role == "cond"])
        old = take_rows(every, rows, chosen)
        if call.kwargs.get("guess_mode"):
            return old, [torch.zeros_like(tensor) for tensor in old]
        args, kwargs = take_rows((tuple(call.args), dict(call.kwargs)), rows, chosen)
        try:
            args, kwargs = prompted(call.module, args, kwargs)
        except UnsupportedPipelineError:
            if kwargs.get("encoder_hidden_states") is not None:
                raise
            return old, old  # this one sees no prompt
        with torch.no_grad():
            return old, tensors_in(call.original(*args, **kwargs))


def _at(call: _ControlCall, batch: int, sample: torch.Tensor, x_t: torch.Tensor) -> _ControlCall:
    """The same call of the ControlNet at another x_t."""
    before = tensors_in(call.output)
    rows = len(before[0])
    there, here = (torch.cat([tensor] * (rows // batch)) for tensor in (sample, x_t))
    args, kwargs = with_sample_at(call.args, call.kwargs, range(rows), there, here)
    with torch.no_grad():
        output = call.original(*args, **kwargs)
    return _ControlCall(call.module, call.original, args, kwargs, output, x_t=x_t, before=before)


def _beside_none(residual: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(residual), residual])


def _exchanged(arguments: Arguments, old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> tuple[Arguments, int]:
    """Arguments with each tensor that equals one of `old` replaced by its counterpart, and how many were."""
    left = list(zip(old, new, strict=True))

    def exchange(tensor: torch.Tensor, name: str) -> torch.Tensor:
        for index, (known, other) in enumerate(left):
            if tensor.shape == known.shape and torch.equal(tensor, known.to(tensor)):
                del left[index]
                return other.to(tensor)
        return tensor

    exchanged = map_tensors(arguments, exchange)
    return exchanged, len(old) - len(left)


def _knows_no_image(pipe: Any) -> bool:
    """Whether a pipeline makes an IP-Adapter's embedding of no image together with that of an image."""
    prepare = getattr(pipe, PREPARE, None)
    return prepare is not None and "do_classifier_free_guidance" in inspect.signature(prepare).parameters
