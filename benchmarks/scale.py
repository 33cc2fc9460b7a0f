"""`python -m benchmarks.scale`: the pieces of a batch's time, what follows for N devices, and whole batches.

    T(N) = start + ceil(n / N) * (k * evaluation + image) + (N - 1) * append

with n images of k evaluations each. `append` is the manifest's line, which processes write in turn: they can write
1 / append lines a second together, which bounds the throughput of any N. Batches of one process and of several are
timed beside what the model says of them. See `docs/scale.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trimtab.pipelines.fashion.card import machine
from trimtab.pipelines.generate import pictures
from trimtab.pipelines.generate.manifest import Manifest
from trimtab.pipelines.generate.request import Request
from trimtab.pipelines.generate.samples import generate, load_pipeline, resolve

FEW, MANY = 5, 25
"""Numbers of steps; their difference in time is that of the evaluations."""
DEVICES = (1, 2, 4, 8, 16, 32, 64)


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


def starting(model: str, repeats: int) -> float:
    """Seconds of a process until its pipeline is loaded; the least of `repeats`, since what disturbs only adds."""
    load = f"from trimtab import GuidedPipeline; GuidedPipeline.from_pretrained({model!r})"
    return _least(lambda: subprocess.run([sys.executable, "-c", load], check=True, capture_output=True), repeats)


def making(
    model: str, label: str | None, prompt: str | None, repeats: int, few: int = FEW, many: int = MANY
) -> tuple[float, float, float]:
    """Seconds of an evaluation, of the rest of an image, and of a line of the manifest; each the least of `repeats`.

    Args:
        model: see `trimtab generate`.
        label, prompt: what is made.
        repeats: of every piece.
        few, many: numbers of steps.
    """
    pipe = load_pipeline(Request(model=model))
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
    return evaluation, max(short - few * evaluation, append), append


def batch(model: str, label: str | None, prompt: str | None, images: int, steps: int, processes: int) -> float:
    """Seconds of `trimtab generate` for a batch without guidance, one thread a process."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        row = {"class_label": label} if label else {"prompt": prompt}
        prompts.write_text(f"{json.dumps(row)}\n" * images)
        command = [sys.executable, "-m", "trimtab", "generate", "--model", model, "--prompts", str(prompts)]
        command += ["--steps", str(steps), "--processes", str(processes), "-o", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return time.perf_counter() - began


def _least(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


PAGE = """# Throughput measured

Made by

    {command}

on {machine}, {model}, one thread a process. Seconds of the pieces of [T(N)](scale.md), the least of {repeats}:

| start | evaluation | image | append |
| --- | --- | --- | --- |
| {start:.3g} | {evaluation:.3g} | {image:.3g} | {append:.3g} |

{note}{batches}

What T(N) says of {images:,} images of {evaluations} evaluations:

| devices | hours | images a second |
| --- | --- | --- |
{forecast}

From {bound:,} devices on the manifest bounds the throughput.
"""


def page(result: Mapping[str, Any]) -> str:
    """The page for what was measured."""
    pieces = Pieces(**result["pieces"])
    head = "| whole batches of {images} images of {steps} steps | seconds | T(N) | times as fast as one process |"
    batches = [head.format(**result["batch"]), "| --- | --- | --- | --- |"]
    alone = result["batch"]["seconds"].get("1")
    for processes, seconds in result["batch"]["seconds"].items():
        said = pieces.seconds(result["batch"]["images"], result["batch"]["steps"], int(processes))
        faster = f"{alone / seconds:.2f}" if alone else ""
        batches.append(f"| {processes} process{'es' * (processes != '1')} | {seconds:.1f} | {said:.1f} | {faster} |")
    forecast = []
    for devices in DEVICES:
        seconds = pieces.seconds(result["images"], result["evaluations"], devices)
        forecast.append(f"| {devices} | {seconds / 3600:.3g} | {result['images'] / seconds:.3g} |")
    return PAGE.format(
        **{name: result[name] for name in ("command", "machine", "model", "repeats", "images", "evaluations")},
        **result["pieces"],
        note=f"{result['note']}\n\n" if result["note"] else "",
        batches="\n".join(batches),
        forecast="\n".join(forecast),
        bound=pieces.most_devices(result["evaluations"]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="What a batch's time is made of.")
    parser.add_argument("--model", default="trimtab/fashion")
    parser.add_argument("--class", dest="label", default="Bag", help="'' for a model that takes a prompt")
    parser.add_argument("--prompt")
    parser.add_argument("--images", type=int, default=10_000, help="of the forecast")
    parser.add_argument("--evaluations", type=int, default=50, help="an image of the forecast, as trimtab explain says")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=40, help="images of the batches that are timed")
    parser.add_argument("--steps", type=int, default=50, help="of their images")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="that make a batch")
    parser.add_argument("--note", default="", help="a sentence for the page, on what else the machine did")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"), help="writes OUTPUT.json and OUTPUT.md")
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args(given)
    label = args.label or None
    pieces = Pieces(starting(args.model, args.repeats), *making(args.model, label, args.prompt, args.repeats))
    timed = {
        str(processes): batch(args.model, label, args.prompt, args.batch, args.steps, processes)
        for processes in tqdm(args.processes, desc="batches")
    }
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.scale", *given]), "machine": machine(), "note": args.note,
        "model": args.model, "repeats": args.repeats, "images": args.images, "evaluations": args.evaluations,
        "pieces": asdict(pieces), "batch": {"images": args.batch, "steps": args.steps, "seconds": timed},
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
