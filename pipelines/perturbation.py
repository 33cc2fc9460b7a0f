"""Perturbed rows inside the denoiser: they join the batch where they begin to differ, and only there.

A perturbed branch equals its parent up to its first perturbed layer. The denoiser is entered with all rows, so that
everything between the blocks (time embeddings, skip connections, control residuals) has them; but a block before that
layer computes the rows that differ so far, and hands the parents' results on to the others. A perturbed layer runs on
each group of rows by itself. In an attention its own forward does, with the attention function replaced for the
perturbed rows; its norms, rotary embedding, LoRA and projections stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..guidance.branch import AttentionTokens, Branch, Perturbation, Point, ScaledAdapters, SkippedBlocks
from ..guidance.errors import GuidanceRuntimeError
from .attention import AttentionReplaced, why_not
from .families import Family
from .grids import image_grid
from .interception import tap_forward
from .lora import scaled
from .rows import AmbiguousRowsError, check_splittable, map_tensors, take_rows, tensors_in
from .skipping import handed_on
from .tokens import Apart, Places, locate, may_hold_others


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
        points: those that have attentions to watch.
        branches: what each row predicts; `None` where that is not known.
    """

    total: int
    parents: torch.Tensor
    segments: tuple[Segment, ...] = ()
    points: tuple[Point, ...] = ()
    branches: tuple[Branch | None, ...] = ()

    def active(self, block: int) -> int:
        """How many rows (from the first) are computed in this outer block."""
        return min((segment.start for segment in self.segments if segment.joins_at > block), default=self.total)


class Perturber:
    """Installs perturbations in one denoiser for the length of a run; idle while `layout` is `None`.

    Attributes:
        watched: what the points of the last call kept, by point and layer, `[rows, ...]`.
    """

    def __init__(self, family: Family, stack: ExitStack) -> None:
        self.family = family
        self.layout: Layout | None = None
        self.watched: dict[tuple[Point, str], torch.Tensor] = {}
        self._arguments: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})
        self._places: Mapping[str, Places] = {}
        self._located: dict[Any, dict[str, Places]] = {}
        self._apart = Apart(family, ())
        self._stack = stack
        self._tapped: set[str] = set()
        self._span: tuple[int, int] | None = None  # the rows of the layer that is running on some of them

    @cached_property
    def _modules(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.family.module.named_modules())

    def own(self, layers: Sequence[str]) -> list[str]:
        """Those of `layers` that this denoiser has; the others are of a pipeline's other denoiser."""
        return [name for name in layers if name in self._modules]

    def acts_on(self, branch: Branch) -> bool:
        """Whether a branch differs here from its condition's prediction: not if no perturbed layer is this one's."""
        return branch.perturbation is None or branch.denoiser is not None or bool(self.own(branch.perturbation.layers))

    def joins_at(self, perturbation: Perturbation) -> int:
        """Index of the outer block that holds the first perturbed layer; -1 if that may come before all blocks."""
        return min(self.block_of(name) for name in self.own(perturbation.layers))

    def block_of(self, name: str) -> int:
        """Index of the outer block that is or holds a layer; -1 if none does."""
        blocks = enumerate(self.family.blocks)
        return next((index for index, block in blocks if f"{name}.".startswith(f"{block}.")), -1)

    def call(self, original: Callable[..., Any], layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the denoiser with these rows."""
        layers = [name for segment in layout.segments for name in self.own(segment.perturbation.layers)]
        layers += [name for point in layout.points for name in self.own(point.layers)]
        self._places = self._locate(layers, original, layout.total, args, kwargs)
        self._tap(layers)
        self.layout, self._arguments, self.watched = layout, (args, kwargs), {}
        try:
            return original(*args, **kwargs)
        finally:
            self.layout, self._arguments = None, ((), {})

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Perturb and watch nothing within, for a call inside another."""
        outer, self.layout = self.layout, None
        paused, self._apart.paused = self._apart.paused, True
        try:
            yield
        finally:
            self.layout, self._apart.paused = outer, paused

    def _locate(
        self, layers: Sequence[str], original: Callable[..., Any], rows: int, args: Sequence[Any], kwargs: Any
    ) -> Mapping[str, Places]:
        """Where the image tokens are, asked once a run for each size of the call; nothing where all are image."""
        attentions = [name for name in dict.fromkeys(layers) if name in self.family.attentions]
        if not attentions or not may_hold_others(self.family, attentions, args, kwargs):
            return {}
        with suppress(AmbiguousRowsError):
            check_splittable(args, kwargs, rows)
            args, kwargs = take_rows((tuple(args), dict(kwargs)), rows, slice(rows - 1, rows))
        known = (tuple(attentions), tuple(tuple(tensor.shape) for tensor in tensors_in((args, kwargs))))
        if known not in self._located:
            self._apart = Apart(self.family, attentions)
            self._located[known] = locate(self._apart, original, args, kwargs)
        return self._located[known]

    def _tap(self, layers: Sequence[str]) -> None:
        for index, (name, block) in enumerate(self.family.blocks.items()):
            if name not in self._tapped:
                self._tapped.add(name)
                tap_forward(self._stack, block, _prefix(self, name, index))
        for name in layers:
            if name not in self._tapped:
                self._tapped.add(name)
                tap_forward(self._stack, self.family.module.get_submodule(name), _inner(self, name))

    def run(self, name: str, original: Callable[..., Any], active: int, args: Sequence[Any], kwargs: Any) -> Any:
        """A layer's forward on the first `active` rows, each group of them under its own perturbation.

        Inside a layer that runs on one group of rows, there are only these.
        """
        layout, outer = self.layout, self._span
        assert layout is not None
        first, last = span = outer or (0, active)
        groups = _groups(layout, name, first, last)
        points = [point for point in layout.points if name in point.layers]
        if len(groups) == 1 and groups[0][2] is None and not points:
            return original(*args, **kwargs)
        each, rest = divmod(_hidden_states(args, kwargs).shape[0], last - first)
        if len(groups) > 1 and (rest or not each):
            raise AmbiguousRowsError(f"{name} is given what does not split into rows")
        kept: dict[Point, list[torch.Tensor]] = {point: [] for point in points}
        outputs = []
        for start, stop, perturbation in groups:
            part = (args, kwargs)
            if (start, stop) != span:
                part = _take(part, last - first, each, slice(start - first, stop - first))
            self._span = start, stop
            try:
                outputs.append(self._compute(name, original, part, perturbation, kept))
            finally:
                self._span = outer
        if first == 0:  # the rows of the branches that may be watched come first
            for point, values in kept.items():
                self.watched[point, name] = _expand(torch.cat(values), last, each, layout.parents)
        return outputs[0] if len(outputs) == 1 else _join(outputs)

    def _compute(
        self, name: str, original: Callable[..., Any], part: Any, perturbation: Perturbation | None,
        kept: Mapping[Point, list[torch.Tensor]],
    ) -> Any:  # fmt: skip
        """One group of rows; what the points watch is appended to `kept`."""
        args, kwargs = part
        module = self.family.module.get_submodule(name)
        if isinstance(perturbation, SkippedBlocks):
            return handed_on(module, args, kwargs)
        if isinstance(perturbation, ScaledAdapters):
            with scaled(module, perturbation):
                return original(*args, **kwargs)
        if perturbation is None and not kept:
            return original(*args, **kwargs)

        def grid(tokens: AttentionTokens) -> AttentionTokens:
            config = getattr(self.family.module, "config", None)
            return replace(tokens, grid=image_grid(tokens.stop - tokens.start, config, *self._arguments))

        processor = getattr(module, "processor", None)
        with AttentionReplaced(perturbation, kept, self._places.get(name), grid, processor) as replaced:
            output = original(*args, **kwargs)
        if not replaced.acted:
            acting = type(perturbation or next(iter(kept))).__name__
            raise GuidanceRuntimeError(why_not(name, module, acting, replaced.passed_by))
        return output


def _prefix(perturber: Perturber, name: str, block: int) -> Callable[..., Any]:
    """A block's forward on the rows that differ so far."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = perturber.layout
        if layout is None:
            return original(*args, **kwargs)
        active = layout.active(block)
        if active == layout.total:
            return perturber.run(name, original, active, args, kwargs)
        hidden = _hidden_states(args, kwargs)
        each = hidden.shape[0] // layout.total
        args, kwargs = _take((args, kwargs), layout.total, each, slice(0, active))
        return _expand(perturber.run(name, original, active, args, kwargs), active, each, layout.parents)

    return forward


def _inner(perturber: Perturber, name: str) -> Callable[..., Any]:
    """The forward of a layer inside a block, or of one outside of all blocks, where all rows are."""
    block = perturber.block_of(name)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = perturber.layout
        if layout is None:
            return original(*args, **kwargs)
        return perturber.run(name, original, layout.active(block) if block >= 0 else layout.total, args, kwargs)

    return forward


def _groups(layout: Layout, name: str, first: int, last: int) -> list[tuple[int, int, Perturbation | None]]:
    """Row ranges from `first` to `last` in order, unperturbed neighbours merged."""
    groups: list[tuple[int, int, Perturbation | None]] = []
    edge = first
    for segment in layout.segments:
        if name in segment.perturbation.layers and first <= segment.start < last:
            if segment.start > edge:
                groups.append((edge, segment.start, None))
            groups.append((segment.start, segment.stop, segment.perturbation))
            edge = segment.stop
    return groups if edge == last else [*groups, (edge, last, None)]


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
