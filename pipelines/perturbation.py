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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..guidance.branch import Perturbation, Point
from .families import Family
from .grids import image_grids
from .interception import tap_forward
from .layers import Layer
from .layout import Layout
from .rows import AmbiguousRowsError, check_splittable, hidden_states, map_tensors, take_rows, tensors_in
from .tokens import Apart, Places, locate, may_hold_others

Group = tuple[int, int, Perturbation | None]
"""First row, row past the last, and what perturbs them."""


@dataclass
class Running:
    """The rows of the layer that is running on some of them; those inside it see no others."""

    span: tuple[int, int] | None = None


class Perturber:
    """Installs perturbations in one denoiser for the length of one call; idle while `layout` is `None`.

    What is installed holds only numbers and values of that call, so that a compiled denoiser is traced once for each
    plan, and blocks that are compiled one by one share their graphs. Other calls run the denoiser as it is.

    Attributes:
        watched: what the points of the last call kept, by point and layer, `[rows, ...]`.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.layout: Layout | None = None
        self.watched: dict[tuple[Point, str], torch.Tensor] = {}
        self._located: dict[Any, dict[str, Places]] = {}
        self._apart = Apart(family, ())
        self._taps: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._installed = ExitStack()

    def call(self, original: Callable[..., Any], layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the denoiser with these rows."""
        self.watched = {}
        perturbed = [name for segment in layout.segments for name in self.family.own(segment.perturbation.layers)]
        names = perturbed + [name for point in layout.points for name in self.family.own(point.layers)]
        places = self._locate(names, original, layout.total, args, kwargs)
        kept: dict[tuple[Point, str], list[torch.Tensor]] = {}
        self._taps = self._made(layout, dict.fromkeys(names), places, kept, args, kwargs)
        self.layout = layout
        try:
            with self._installed:
                self._install()
                output = original(*args, **kwargs)
        finally:
            self.layout = None
        self.watched = {key: found[-1] for key, found in kept.items() if found}
        return output

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Perturb and watch nothing within, for a call inside another."""
        outer, self.layout = self.layout, None
        paused, self._apart.paused = self._apart.paused, True
        self._installed.close()
        try:
            yield
        finally:
            self.layout, self._apart.paused = outer, paused
            if outer is not None:
                self._install()

    def _install(self) -> None:
        for module, wrapper in self._taps:
            tap_forward(self._installed, module, wrapper)

    def _made(
        self, layout: Layout, names: Sequence[str] | Mapping[str, Any], places: Mapping[str, Places],
        kept: dict[tuple[Point, str], list[torch.Tensor]], args: Sequence[Any], kwargs: Mapping[str, Any],
    ) -> list[tuple[nn.Module, Callable[..., Any]]]:  # fmt: skip
        """What is installed for one call, and where; what points watch goes into `kept`."""
        attentions = not self.family.attentions.keys().isdisjoint(names)
        grids = image_grids(getattr(self.family.module, "config", None), args, kwargs) if attentions else ()
        running, taps = Running(), []
        for name in names:
            layer = Layer.of(self.family, name, places.get(name), grids)
            segments = [segment for segment in layout.segments if name in segment.perturbation.layers]
            points = [point for point in layout.points if name in point.layers]
            acting: list[Perturbation | Point] = [*(segment.perturbation for segment in segments), *points]
            for what in acting:
                layer.check(what)
            groups = tuple((segment.start, segment.stop, segment.perturbation) for segment in segments)
            watching = tuple((point, kept.setdefault((point, name), [])) for point in points)
            active = layout.active(self.family.block_of(name))
            taps.append((layer.module, _in_groups(layer, groups, watching, active, layout.parents, running)))
        for index, block in enumerate(self.family.blocks.values()):
            if (active := layout.active(index)) < layout.total:
                taps.append((block, _prefix(active, layout.parents)))
        return taps

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


def _prefix(active: int, parents: tuple[int, ...]) -> Callable[..., Any]:
    """A block's forward on the rows that differ so far."""
    total, late = len(parents), parents[active:]

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        each = hidden_states(args, kwargs).shape[0] // total
        args, kwargs = _take((args, kwargs), total, each, slice(0, active))
        return _expand(original(*args, **kwargs), active, each, late)

    return forward


def _in_groups(
    layer: Layer, perturbed: tuple[Group, ...], watching: tuple[tuple[Point, list[torch.Tensor]], ...],
    active: int, parents: tuple[int, ...], running: Running,
) -> Callable[..., Any]:  # fmt: skip
    """A layer's forward on the first `active` rows, each group of them under its own perturbation.

    Inside a layer that runs on one group of rows, there are only these.
    """

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = running.span
        first, last = outer or (0, active)
        groups = _groups(perturbed, first, last)
        if len(groups) == 1 and groups[0][2] is None and not watching:
            return original(*args, **kwargs)
        entries, rows = hidden_states(args, kwargs).shape[0], last - first
        each = entries // rows
        if len(groups) > 1 and (not each or entries != each * rows):
            raise AmbiguousRowsError(f"{layer.name} is given what does not split into rows")
        kept: list[tuple[Point, list[torch.Tensor]]] = [(point, []) for point, _ in watching]
        outputs = []
        for start, stop, perturbation in groups:
            part = (args, kwargs)
            if len(groups) > 1:
                part = _take(part, last - first, each, slice(start - first, stop - first))
            running.span = start, stop
            try:
                outputs.append(layer.compute(original, part, perturbation, kept))
            finally:
                running.span = outer
        if first == 0:  # the rows of the branches that may be watched come first
            for (_, found), (_, values) in zip(watching, kept, strict=True):
                found.append(_expand(torch.cat(values), last, each, parents[last:]))
        return outputs[0] if len(outputs) == 1 else _join(outputs)

    return forward


def _groups(perturbed: tuple[Group, ...], first: int, last: int) -> list[Group]:
    """Row ranges from `first` to `last` in order, unperturbed neighbours merged."""
    groups: list[Group] = []
    edge = first
    for start, stop, perturbation in perturbed:
        if first <= start < last:
            if start > edge:
                groups.append((edge, start, None))
            groups.append((start, stop, perturbation))
            edge = stop
    return groups if edge == last else [*groups, (edge, last, None)]


def _take(part: Any, rows: int, each: int, chosen: slice) -> Any:
    """The chosen rows of everything that has rows, or `each` entries (frames) a row."""
    part = take_rows(part, rows, chosen)
    if each > 1:
        part = take_rows(part, rows * each, slice(chosen.start * each, chosen.stop * each))
    return part


def _expand(value: Any, active: int, each: int, late: Sequence[int]) -> Any:
    """Outputs of the first `active` rows, for all rows: the `late` ones get the results of these parents."""

    def expand(tensor: torch.Tensor, name: str) -> torch.Tensor:
        for entries in (each, 1):
            if tensor.ndim and tensor.shape[0] == active * entries:
                return torch.cat([tensor, *(tensor[row * entries : (row + 1) * entries] for row in late)])
        return tensor

    return map_tensors(value, expand)


def _join(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, (tuple, list)):
        return type(first)(_join(parts) for parts in zip(*outputs, strict=True))
    return first
