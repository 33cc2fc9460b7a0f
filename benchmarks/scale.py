"""`python -m benchmarks.scale`: the pieces that a batch's time is made of, and what follows for N devices.

    T(N) = start + ceil(n / N) * (k * evaluation + image) + (N - 1) * append

with n images of k evaluations each. `append` is the manifest's line, which processes write in turn: they can write
1 / append lines a second together, which bounds the throughput of any N. See `docs/scale.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from trimtab.pipelines.generate import pictures
from trimtab.pipelines.generate.manifest import Manifest
from trimtab.pipelines.generate.request import Request
from trimtab.pipelines.generate.samples import generate, load_pipeline, resolve


@dataclass(frozen=True)
class Pieces:
    """Seconds of each piece.

    Args:
        start: of a process until its pipeline is loaded, imports included.
        evaluation: of the denoiser, an image.
        image: all else that an image takes: text encoder, decoder, file, manifest.
        append: of a line of the manifest alone.
    """

    start: float
    evaluation: float
    image: float
    append: float

    def seconds(self, images: int, evaluations: int, devices: int) -> float:
        """T(N) of the model above."""
        each = evaluations * self.evaluation + self.image
        return self.start + math.ceil(images / devices) * each + (devices - 1) * self.append

    def most_devices(self, evaluations: int) -> int:
        """From how many devices on the manifest, not the denoiser, bounds the throughput."""
        return math.ceil((evaluations * self.evaluation + self.image) / self.append)


def measure(model: str, label: str | None, prompt: str | None, few: int, many: int, repeats: int) -> Pieces:
    """Measure all pieces; a time is the least of `repeats`, since what disturbs only adds.

    Args:
        model: see `trimtab generate`.
        label, prompt: what is made.
        few, many: numbers of steps; their difference in time is that of the evaluations.
        repeats: of every piece.
    """
    load = f"from trimtab import GuidedPipeline; GuidedPipeline.from_pretrained({model!r})"
    start = _least(lambda: subprocess.run([sys.executable, "-c", load], check=True, capture_output=True), repeats)
    request = Request(model=model, class_label=label, prompt=prompt)
    pipe = load_pipeline(request)
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(Path(folder))

        def write(steps: int) -> None:
            one = resolve(Request(model=model, class_label=label, prompt=prompt, steps=steps), pipe)
            image = generate(pipe, one)
            pictures.save(image, Path(folder) / "image.png", one.metadata(image))
            manifest.append({"index": 0, "file": "image.png", "seed": 0, "status": "done"})

        write(few)
        short, long = (_least(partial(write, steps), repeats) for steps in (few, many))
        append = _least(lambda: manifest.append({"index": 0, "file": "image.png", "status": "done"}), repeats)
    evaluation = (long - short) / (many - few)
    return Pieces(start, evaluation, max(short - few * evaluation, append), append)


def _least(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the pieces, and the time of a batch on 1, 2, 4, ... devices."""
    parser = argparse.ArgumentParser(description="What a batch's time is made of.")
    parser.add_argument("--model", default="trimtab/embedded")
    parser.add_argument("--class", dest="label", default="Bag", help="'' for a model that takes a prompt")
    parser.add_argument("--prompt")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--evaluations", type=int, default=50, help="an image, as trimtab explain says")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    pieces = measure(args.model, args.label or None, args.prompt, 5, 25, args.repeats)
    print(json.dumps({name: float(f"{value:.3g}") for name, value in asdict(pieces).items()}))
    for devices in (1, 2, 4, 8, 16, 32, 64):
        seconds = pieces.seconds(args.images, args.evaluations, devices)
        print(f"{devices:>3} devices: {seconds:10.1f} s, {args.images / seconds:8.2f} images a second")
    print(f"the manifest bounds more than {pieces.most_devices(args.evaluations)} devices")


if __name__ == "__main__":
    main()
