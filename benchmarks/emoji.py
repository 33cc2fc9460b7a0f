"""Images of captions by the emoji models, with what is attached to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

import trimtab
from trimtab.evaluation.distances import bootstrap
from trimtab.pipelines.emoji.data import SIZE, EmojiData
from trimtab.pipelines.emoji.pairs import DrawingPairs, drawing_pairs, picture
from trimtab.pipelines.generate.pictures import Row, sheet
from trimtab.pipelines.generate.samples import length_of_text

SHOWN = 8

Attach = Callable[[Any, Sequence[int]], Any]
"""Attaches a control to a pipeline for the drawings with these numbers; returns the guidance, or `None`."""


@dataclass(frozen=True)
class Sampler:
    """Makes images of captions by one model.

    Args:
        model: folder of the pipeline.
        scale: the name of its scale of classifier-free guidance.
        guidance: that scale.
        steps: of denoising.
        batch: images at once.
    """

    model: Path
    scale: str
    guidance: float
    steps: int
    batch: int

    @cached_property
    def pipe(self) -> Any:
        """The pipeline."""
        pipe = trimtab.GuidedPipeline.from_pretrained(self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def images(self, captions: Sequence[str], **call: Any) -> torch.Tensor:
        """Images `[n, 3, 64, 64]` in -1..1, with what is attached."""
        call = {**call, self.scale: self.guidance, "num_inference_steps": self.steps, "output_type": "pt"}
        call |= length_of_text(self.pipe)
        negative = [""] * len(captions)
        made = self.pipe(list(captions), negative_prompt=negative, height=SIZE, width=SIZE, **call).images
        return 2 * made.float() - 1

    def __call__(self, pairs: DrawingPairs, attach: Attach, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An image for each drawing's caption, from the noise of its number, and its partner, if it has one."""
        images, partners = [], []
        for start in tqdm(range(0, len(pairs), self.batch), desc=what):
            numbers = range(start, min(start + self.batch, len(pairs)))
            self.pipe.clear_guidance()
            guidance = attach(self.pipe, numbers)
            generators = [torch.Generator().manual_seed(number) for number in numbers]
            images.append(self.images(pairs[numbers].captions, generator=generators))
            partner = getattr(guidance, "partner", None)
            partners.append(images[-1] if partner is None else 2 * partner.float() - 1)
        return torch.cat(images), torch.cat(partners)


def of_held_out(data: Path, categories: str, count: int) -> DrawingPairs:
    """So many held-out drawings with their edges, of all categories or of these; always the same ones."""
    pairs = drawing_pairs(EmojiData(data, held_out=True, categories=categories), "edges")
    return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:count].tolist()]


def mean(values: torch.Tensor) -> list[float]:
    """The mean over drawings, and its 95% interval by the bootstrap."""
    found = bootstrap(lambda rows: values[rows].mean().item(), len(values), 1000)
    return [found.value, found.low, found.high]


def lines(title: str, pairs: DrawingPairs, rows: Mapping[str, torch.Tensor]) -> Image.Image:
    """A sheet whose columns are the first drawings."""
    count = min(SHOWN, len(pairs))
    shown = [Row(label, [picture(image) for image in images[:count]]) for label, images in rows.items()]
    return sheet(title, [f"{number}" for number in range(count)], shown)
