"""Perturbed rows inside the denoiser: they join the batch where they begin to differ, and only there.

A perturbed branch equals its parent up to its first perturbed layer. The denoiser is entered with all rows, so that
everything between the blocks (time embeddings, skip connections, control residuals) has them; but a block before that
layer computes the rows that differ so far, and hands the parents' results on to the others. In a perturbed attention
the layer's own forward runs on each group of rows, with the attention function replaced for the perturbed ones; its
norms, rotary embedding, LoRA and projections stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..guidance.branch import Perturbation
from ..guidance.errors import GuidanceRuntimeError
from .families import Family
from .interception import tap_forward
from .rows import map_tensors, take_rows


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows under one perturbation, and the outer block in which they part from their parents."""

    start: int
    stop: int
    perturbation: Perturbation
    joins_at: int


@dataclass(frozen=True)
class Layout:
    """The rows of one denoiser call.

    Args:
        total: number of rows.
        parents: for each row, the row that it equals until it joins; a row that is no branch is its own parent.
        segments: the perturbed rows, last in the batch, those that join first before those that join later.
        text: the denoiser's keyword arguments, where the number of text tokens can be read.
    """

    total: int
    parents: torch.Tensor
    segments: tuple[Segment, ...]
    text: Mapping[str, Any]

    def active(self, block: int) -> int:
        """How many rows (from the first) are computed in this outer block."""
        return min((segment.start for segment in self.segments if segment.joins_at > block), default=self.total)


class Perturber:
    """Installs perturbations in one denoiser for the length of a run; idle while `layout` is `None`."""

    def __init__(self, family: Family, stack: ExitStack) -> None:
        self.family = family
        self.layout: Layout | None = None
        self._stack = stack
        self._tapped: set[str] = set()

    def joins_at(self, perturbation: Perturbation) -> int:
        """Index of the outer block that holds the first perturbed layer."""
        first = perturbation.layers[0]
        return next(index for index, block in enumerate(self.family.blocks) if first.startswith(block + "."))

    def call(self, original: Callable[..., Any], layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the denoiser with these rows."""
        for segment in layout.segments:
            self._tap(segment.perturbation.layers)
        self.layout = layout
        try:
            return original(*args, **kwargs)
        finally:
            self.layout = None

    def _tap(self, layers: Sequence[str]) -> None:
        for index, (name, block) in enumerate(self.family.blocks.items()):
            if name not in self._tapped:
                self._tapped.add(name)
                tap_forward(self._stack, block, _prefix(self, index))
        for name in layers:
            if name not in self._tapped:
                self._tapped.add(name)
                tap_forward(self._stack, self.family.attentions[name], _perturbed(self, name))


def _prefix(perturber: Perturber, block: int) -> Callable[..., Any]:
    """A block's forward on the rows that differ so far."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = perturber.layout
        active = layout.active(block) if layout is not None else 0
        if layout is None or active == layout.total:
            return original(*args, **kwargs)
        hidden = _hidden_states(args, kwargs)
        each = hidden.shape[0] // layout.total
        args, kwargs = _take((args, kwargs), layout.total, each, slice(0, active))
        return _expand(original(*args, **kwargs), active, each, layout.parents)

    return forward


def _perturbed(perturber: Perturber, name: str) -> Callable[..., Any]:
    """An attention's forward, each group of rows under its own perturbation."""
    block = next(index for index, outer in enumerate(perturber.family.blocks) if name.startswith(outer + "."))

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = perturber.layout
        if layout is None:
            return original(*args, **kwargs)
        active = layout.active(block)
        hidden = _hidden_states(args, kwargs)
        each = hidden.shape[0] // active
        outputs = []
        for start, stop, perturbation in _groups(layout, name, active):
            part = (args, kwargs)
            if (start, stop) != (0, active):
                part = _take(part, active, each, slice(start, stop))
            if perturbation is None:
                outputs.append(original(*part[0], **part[1]))
            else:
                outputs.append(_attend(perturber.family, name, perturbation, original, part, layout.text))
        return outputs[0] if len(outputs) == 1 else _join(outputs)

    return forward


def _groups(layout: Layout, name: str, active: int) -> list[tuple[int, int, Perturbation | None]]:
    """Row ranges in order, unperturbed neighbours merged."""
    groups: list[tuple[int, int, Perturbation | None]] = []
    edge = 0
    for segment in layout.segments:
        if name in segment.perturbation.layers and segment.start < active:
            if segment.start > edge:
                groups.append((edge, segment.start, None))
            groups.append((segment.start, segment.stop, segment.perturbation))
            edge = segment.stop
    return groups if edge == active else [*groups, (edge, active, None)]


def _attend(
    family: Family, name: str, perturbation: Perturbation, original: Callable[..., Any], part: Any, denoiser_kwargs: Any
) -> Any:
    args, kwargs = part
    attention = family.attentions[name]
    states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    own_text = int(states.shape[1]) if isinstance(states, torch.Tensor) else None
    text = family.text_length(attention, own_text, denoiser_kwargs)
    image = _hidden_states(args, kwargs).shape[1]
    with _AttentionReplaced(family, attention, perturbation, image, text) as replaced:
        output = original(*args, **kwargs)
    if not replaced.acted:
        raise GuidanceRuntimeError(_why_not(name, attention, perturbation, replaced.passed_by))
    return output


def _why_not(name: str, attention: nn.Module, perturbation: Perturbation, passed_by: bool) -> str:
    kind = type(perturbation).__name__
    if passed_by:
        return (
            f"{name}: its queries attend to further keys, so there is no map among image tokens for {kind} to change."
        )
    return (
        f"{name}: its processor {type(attention.processor).__name__} does not call scaled_dot_product_attention, "
        f"so {kind} cannot act. Use the default processors: pipe.unet.set_default_attn_processor(), or no attention "
        "slicing and the 'native' attention backend."
    )


class _AttentionReplaced(TorchFunctionMode):
    """Replaces the self-attention function; attention onto something of another length stays."""

    def __init__(self, family: Family, module: nn.Module, perturbation: Perturbation, image: int, text: int) -> None:
        super().__init__()
        self.family, self.module, self.perturbation, self.image, self.text = family, module, perturbation, image, text
        self.acted = self.passed_by = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.shape[-2] != key.shape[-2]:
            self.passed_by = True
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.acted = True
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (tensor.repeat_interleave(repeats, dim=-3) for tensor in (key, value))
        tokens = self.family.image_tokens(self.module, self.image, self.text, query.shape[-2])
        return self.perturbation.attention(query, key, value, tokens, attn_mask, scale)


def _hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    for value in (*args[:1], kwargs.get("hidden_states"), kwargs.get("x")):
        if isinstance(value, torch.Tensor):
            return value
    raise GuidanceRuntimeError("a block was called without hidden states; its layers cannot be perturbed here")


def _take(part: Any, rows: int, each: int, chosen: slice) -> Any:
    """The chosen rows of everything that has rows, or `each` entries (frames) a row."""
    part = take_rows(part, rows, chosen)
    if each > 1:
        part = take_rows(part, rows * each, slice(chosen.start * each, chosen.stop * each))
    return part


def _expand(value: Any, active: int, each: int, parents: torch.Tensor) -> Any:
    """Outputs of the first `active` rows, for all rows: those not computed get their parents' results."""

    def expand(tensor: torch.Tensor, name: str) -> torch.Tensor:
        for entries in {each, 1}:
            if tensor.ndim and tensor.shape[0] == active * entries:
                late = parents[active:].to(tensor.device)
                rows = tensor.unflatten(0, (active, entries))
                return torch.cat([tensor, rows[late].flatten(0, 1)])
        return tensor

    return map_tensors(value, expand)


def _join(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, (tuple, list)):
        return type(first)(_join(parts) for parts in zip(*outputs, strict=True))
    return first
