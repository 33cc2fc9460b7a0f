"""`python -m benchmarks.latents MODEL`: how a measurement of the image is met by a model that works on latents.

Held-out emoji are restored by a text-to-image model in Diffusers' format with their captions as prompts: the right half
from the left one, 64x64 from 16x16, and colours from the luminance. Compared are both ways of `steered` to project
latents, by the decoded image that is encoded again and by gradient, and the residual as a loss through the denoiser,
with the weight of the best error on training images. What the autoencoder makes of the true image bounds them all.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import trimtab
from trimtab.guidance.losses import Term
from trimtab.guidance.operators import LinearOperator, inpainting, luminance, resampling
from trimtab.pipelines.emoji.data import EmojiData, to_unit

from .latents_page import BOUND, page
from .likeness import psnr
from .rows import Rows

KNOWN = torch.arange(64)[None, None, None, :].expand(1, 1, 64, 64) < 32
WEIGHTS = (4.0, 16.0, 64.0)
"""Of the loss, from which the training images choose."""


@dataclass(frozen=True)
class Task:
    """A measurement, how `steered` is told of it, and which columns of it and of the image are compared."""

    operator: LinearOperator
    parameters: Mapping[str, Any]
    known: tuple[int | None, int | None] = (0, None)
    missing: tuple[int | None, int | None] = (0, None)

    def residual(self, measured: torch.Tensor) -> Any:
        """`|y - A x|` of each image, as a loss."""
        return lambda x: (self.operator.forward(x) - measured).flatten(1).norm(dim=1)


TASKS = {
    "The right half from the left half": Task(
        inpainting(KNOWN), {"task": "inpainting", "mask": 1 - KNOWN.float()}, (0, 32), (32, None)
    ),
    "64x64 from 16x16": Task(resampling((64, 64), (16, 16)), {"task": "super_resolution"}),
    "Colours from the luminance": Task(luminance(), {"task": "colourisation"}),
}
LOSS = "the residual as a loss"
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "no guidance": None,
    "encode": {"latent": "encode"},
    "encode, recurrence=3": {"latent": "encode", "recurrence": 3},
    "gradient, 1 step": {"latent": "gradient", "latent_steps": 1},
    "gradient, 5 steps": {"latent": "gradient", "latent_steps": 5},
    "gradient, 20 steps": {"latent": "gradient", "latent_steps": 20},
    "gradient, 5 steps, recurrence=3": {"latent": "gradient", "latent_steps": 5, "recurrence": 3},
    LOSS: {},
}
"""Parameters of `steered`."""


class Passes:
    """Counts an autoencoder's passes: decodings, those that are differentiated, encodings."""

    def __init__(self, autoencoder: Any) -> None:
        self.decoded = self.back = self.encoded = 0
        self._autoencoder = autoencoder

    def _on_decode(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.decoded += 1
        if output.requires_grad:
            self.back += 1

    def _on_encode(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.encoded += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count within the block."""
        handles = [
            self._autoencoder.decoder.register_forward_hook(self._on_decode),
            self._autoencoder.encoder.register_forward_hook(self._on_encode),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Restoration:
    """Restores images by one method at a time.

    Args:
        pipe: the model.
        steps: of denoising.
        guidance_scale: of the pipeline's own guidance.
        batch: images at once.
    """

    pipe: Any
    steps: int
    guidance_scale: float
    batch: int

    def __call__(
        self, task: Task, method: str, wanted: torch.Tensor, captions: list[str], weight: float = 0.0
    ) -> torch.Tensor:
        """Images like `wanted` `[n, 3, 64, 64]` from their measurements; the i-th begins from the noise of seed i."""
        made = []
        for first in tqdm(range(0, len(wanted), self.batch), desc=method):
            chosen = slice(first, first + self.batch)
            measured = task.operator.forward(wanted[chosen])
            self.pipe.clear_guidance()
            parameters = METHODS[method]
            if method == LOSS:
                self.pipe.add_guidance("steered", losses=(Term(task.residual(measured), weight),))
            elif parameters is not None:
                self.pipe.add_guidance("steered", image=measured, **task.parameters, **parameters)
            made.append(self.pipe(
                captions[chosen], height=64, width=64, num_inference_steps=self.steps, output_type="pt",
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(first + i) for i in range(len(measured))],
            ).images * 2 - 1)  # fmt: skip
        return torch.cat(made)

    def evaluations(self) -> int:
        """Of the denoiser, for each image of the last run."""
        if not self.pipe.guidances:
            return self.steps * (1 + (self.guidance_scale > 1))
        done: int = self.pipe.last_guided_run.evaluations
        return done


def compared(task: Task, made: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """PSNR of what was measured and of what was missing, and the root mean square error of the measurement."""
    measured, y = (task.operator.forward(images)[..., slice(*task.known)] for images in (made, wanted))
    missing = (images[..., slice(*task.missing)] for images in (made, wanted))
    found = {"known": psnr(measured, y), "missing": psnr(*missing)}
    means = {name: [v.mean().item(), v.std().item() / len(v) ** 0.5] for name, v in found.items()}
    return {**means, "error": (measured - y).square().mean().sqrt().item()}


def measure(rows: Rows, pipe: Any, args: argparse.Namespace) -> None:
    """Fill the rows that are missing."""
    images, captions = drawn(args.data, True, args.count)
    tuning = drawn(args.data, False, args.tuning)
    restore = Restoration(pipe, args.steps, args.guidance_scale, args.batch)
    with torch.inference_mode():
        again = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    for title, task in TASKS.items():
        bound = {**compared(task, again, images), "evaluations": 0, "passes": [0, 0, 0], "seconds": 0.0, "weight": 0.0}
        rows[f"{title}: {BOUND}"] = bound
    for method, (title, task) in itertools.product(METHODS, TASKS.items()):
        if (key := f"{title}: {method}") in rows:
            continue
        weight = best_weight(restore, task, *tuning) if method == LOSS else 0.0
        passes, started = Passes(pipe.vae), time.process_time()
        with passes.counted():
            made = restore(task, method, images, captions, weight)
        seconds, batches = (time.process_time() - started) / len(images), -(-len(images) // args.batch)
        counts = [count // batches for count in (passes.decoded, passes.back, passes.encoded)]
        rows[key] = {**compared(task, made, images), "evaluations": restore.evaluations(), "passes": counts,
                     "seconds": seconds, "weight": weight}  # fmt: skip


def best_weight(restore: Restoration, task: Task, images: torch.Tensor, captions: list[str]) -> float:
    """The weight of the loss with the lowest error."""
    found = {w: compared(task, restore(task, LOSS, images, captions, w), images)["error"] for w in WEIGHTS}
    return min(found, key=found.__getitem__)


def drawn(file: str, held_out: bool, count: int) -> tuple[torch.Tensor, list[str]]:
    """Images spread over one split, and their captions."""
    data = EmojiData(file, held_out)
    chosen = torch.linspace(0, len(data) - 1, count).long()
    return to_unit(data.images[chosen]), [data.captions[index] for index in chosen.tolist()]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latents", description=__doc__)
    parser.add_argument("model", help="folder of a text-to-image pipeline whose latents an AutoencoderKL decodes")
    parser.add_argument("--data", default="runs/emoji.safetensors", help="the packed emoji")
    parser.add_argument("--count", type=int, default=100, help="held-out images")
    parser.add_argument("--tuning", type=int, default=10, help="training images that choose the loss's weight")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the pipeline's own guidance")
    parser.add_argument("--batch", type=int, default=25, help="images at once")
    parser.add_argument("--trained", default="a finished model", help="how far the model is trained, for the page")
    parser.add_argument("--output", type=Path, default=Path("runs/latents"), help="writes OUTPUT.json and OUTPUT.md")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    pipe = trimtab.GuidedPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    names = ("model", "count", "tuning", "steps", "guidance_scale", "batch", "trained")
    rows = Rows(args.output.with_suffix(".json"), {name: getattr(args, name) for name in names})
    measure(rows, pipe, args)
    text = page(rows, tuple(TASKS), WEIGHTS, shlex.join(["python", "-m", "benchmarks.latents", *given]), args)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
