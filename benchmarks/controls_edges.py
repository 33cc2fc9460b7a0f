"""EasyControl and UniCon judged by edges: those of an image against those that it was given, drawing by drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trimtab.guidance.image_processor import of_processor
from trimtab.guidance.networks import load_network, names_of
from trimtab.pipelines.emoji.data import SIZE, edges
from trimtab.pipelines.emoji.pairs import DrawingPairs, picture

from .emoji import Attach, Sampler, lines, mean
from .likeness import edge_f1
from .rows import Row

STRENGTHS = (0.1, 1.0)
PAG = 1.0
TRIGGER, COARSE = "edge_map, ", 0.7
PLAIN, WRONG, GUIDED = "no control", "another drawing's edges", "its edges, and a classifier"
ALONE = "its edges, strength=1"

Measured = tuple[Row, Image.Image]
"""The numbers of a part, and its sheet."""


@dataclass(frozen=True)
class Requested:
    """A category that each image is to be of: one classifier guides to it, and another one, trained apart, judges.

    Args:
        categories: one for each drawing.
        guide, judge: folders or names of transformers classifiers.
        scale: of `classifier`.
    """

    categories: Sequence[str]
    guide: str
    judge: str
    scale: float

    def attach(self, pipe: Any, numbers: Sequence[int]) -> None:
        """Guide the drawings with these numbers."""
        wanted = tuple(self.categories[i] for i in numbers)
        pipe.add_guidance("classifier", classifier=self.guide, target=wanted, scale=self.scale)

    @torch.no_grad()
    def reached(self, images: torch.Tensor) -> torch.Tensor:
        """1 where the judge finds in an image `[3, height, width]` in -1..1 what was requested, 0 elsewhere, `[n]`."""
        network, processor = load_network(self.judge, None, "judge")
        found = network(of_processor(processor, images.shape[1])(images.clamp(-1, 1))).logits.argmax(1).tolist()
        names = names_of(network)
        return torch.tensor([float(names[i] == one) for i, one in zip(found, self.categories, strict=True)])


def as_edges(maps: torch.Tensor) -> torch.Tensor:
    """Drawn edge maps `[n, 3, h, w]`, dark on white, as edges in 0..1."""
    return ((1 - maps.mean(1, keepdim=True)) / 2).clamp(0, 1)


def ways_of_easycontrol(weights: Path, pairs: DrawingPairs, requested: Requested) -> dict[str, Attach]:
    """Without a condition, with a wrong one, with the right one, and with PAG or a classifier beside it."""

    def attach(given: torch.Tensor, strength: float = 1.0, pag: float = 0.0, guided: bool = False) -> Attach:
        def way(pipe: Any, numbers: Sequence[int]) -> None:
            images = [picture(given[i]) for i in numbers]
            pipe.add_guidance("easycontrol", weights=str(weights), image=images, cond_size=SIZE, strength=strength)
            if pag:
                pipe.add_guidance("pag", scale=pag)
            if guided:
                requested.attach(pipe, numbers)

        return way

    return {
        PLAIN: lambda pipe, numbers: None,
        WRONG: attach(pairs.sources.roll(1, 0)),
        **{f"its edges, strength={strength:g}": attach(pairs.sources, strength) for strength in STRENGTHS},
        f"its edges, and pag scale={PAG:g}": attach(pairs.sources, pag=PAG),
        GUIDED: attach(pairs.sources, guided=True),
    }


def easycontrol(sampler: Sampler, weights: Path, pairs: DrawingPairs, requested: Requested) -> Measured:
    """How well the edges of images follow those that were given, and how many are of their category."""
    wanted = as_edges(pairs.sources)
    made = {name: sampler(pairs, way, name)[0] for name, way in ways_of_easycontrol(weights, pairs, requested).items()}
    judged = {**made, "the drawings themselves": pairs.targets}
    found = compared({name: (edges(images), wanted) for name, images in judged.items()})
    reached = {name: requested.reached(images) for name, images in judged.items()}
    for name, right in reached.items():
        found[name]["category"] = mean(right)
        less = {one: reached[one] for one in (PLAIN, ALONE) if one != name}
        found[name]["more of the category"] = {one: mean(right - base) for one, base in less.items()}
    shown = {"edges": pairs.sources, **made, "the drawing": pairs.targets}
    return found, lines("EasyControl, held-out drawings", pairs, shown)


def unicon(sampler: Sampler, weights: Path, pairs: DrawingPairs) -> Measured:
    """Edges in each mode: of images against those that were given, and estimated ones against those of the image."""
    wanted = as_edges(pairs.sources)

    def run(
        mode: str, given: torch.Tensor | None, pag: float = 0.0, **parameters: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def attach(pipe: Any, numbers: Sequence[int]) -> Any:
            if pag:
                pipe.add_guidance("pag", scale=pag)
            image = None if given is None else [picture(given[i]) for i in numbers]
            options = {"trigger": TRIGGER, "noise_strength": COARSE, **parameters}
            return pipe.add_guidance("joint", weights=str(weights), mode=mode, image=image, **options)

        return sampler(pairs, attach, mode)

    plain = sampler(pairs, lambda pipe, numbers: None, PLAIN)[0]
    condition, wrong = run("condition", pairs.sources)[0], run("condition", pairs.sources.roll(1, 0))[0]
    stronger = run("condition", pairs.sources, signal_scale=1.0)[0]
    perturbed = run("condition", pairs.sources, pag=PAG)[0]
    estimate = run("estimate", pairs.targets)[0]
    both, coarse = run("joint", None), run("coarse", pairs.sources)
    images = {
        PLAIN: plain,
        f"condition: {WRONG}": wrong,
        "condition: its edges": condition,
        "condition: its edges, signal_scale=1": stronger,
        f"condition: its edges, and pag scale={PAG:g}": perturbed,
        "coarse: its edges": coarse[0],
    }
    maps = {
        "estimate: edges of the drawing": (as_edges(estimate), wanted),
        "joint: edges beside the image": (as_edges(both[1]), edges(both[0])),
        "coarse: edges beside the image": (as_edges(coarse[1]), edges(coarse[0])),
    }
    followed = compared({name: (edges(one), wanted) for name, one in images.items()})
    shown = {
        "edges": pairs.sources, "no control": plain, "condition": condition, "and signal 1": stronger,
        f"and pag {PAG:g}": perturbed, "coarse": coarse[0],
        "coarse: its edges": coarse[1], "joint": both[0], "joint: its edges": both[1],
        "the drawing": pairs.targets, "estimate": estimate,
    }  # fmt: skip
    return followed | compared(maps), lines("UniCon, held-out drawings", pairs, shown)


def compared(found: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """F1 of edges that were found and those that they are compared with, both by row.

    `own` is the mean over drawings, `other` that against the edges of another drawing. `more` says by how much a row
    exceeds those without control and with wrong edges, drawing by drawing; where there are none, what it has of another
    drawing's edges itself.
    """
    own = {name: edge_f1(edge_map, right) for name, (edge_map, right) in found.items()}
    other = {name: edge_f1(edge_map, right.roll(1, 0)) for name, (edge_map, right) in found.items()}
    baselines = {name: PLAIN if name == PLAIN else WRONG for name in own if name == PLAIN or name.endswith(WRONG)}
    rows: dict[str, dict[str, Any]] = {}
    for name, values in own.items():
        exceeded = {short: own[one] for one, short in baselines.items()} or {WRONG: other[name]}
        more = {} if name in baselines else {short: mean(values - base) for short, base in exceeded.items()}
        rows[name] = {"own": mean(values), "other": mean(other[name]), "more": more}
    return rows
