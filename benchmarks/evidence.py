"""`python -m benchmarks.evidence`: every built-in plug-in on a model, measured before and after.

    python -m benchmarks.evidence --autocast                    # all rows that are missing
    python -m benchmarks.evidence pag --autocast                # this row, anew
    python -m benchmarks.evidence --model FOLDER --prompts prompts.txt --reference real --clip runs/emoji-clip

Rows are measured by `trimtab.evaluation`, on images as `trimtab evaluate --class-balanced N` makes them, but in
batches. Each row is kept as it comes, in a file a model, and the page is written from all files that there are. What
a plug-in needs and a model lacks is a row too, in the words of the refusal. A row's times are taken side by side, in
turns.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from trimtab.evaluation.evaluate import Evaluation
from trimtab.evaluation.folders import Pictures, of_files
from trimtab.evaluation.sweep import Cell, measured_cell
from trimtab.guidance import recipe
from trimtab.guidance.errors import TrimtabError
from trimtab.pipelines.fashion import REPOSITORY
from trimtab.pipelines.generate import options, pictures
from trimtab.pipelines.generate.batch import expand
from trimtab.pipelines.generate.jobs import Job, plan_of, prepare
from trimtab.pipelines.generate.request import Request
from trimtab.pipelines.generate.samples import call_arguments, load_pipeline

from .evidence_data import KNOWN, emoji, garments
from .evidence_page import page
from .evidence_rows import COMPARISONS, WEAK, Comparison, comparisons
from .evidence_taken import DOCS
from .rows import Rows

NO_WEAK = "it needs a weaker version of the model; give its folder, --weak"


class Measurement:
    """Makes and measures cells of one model.

    Args:
        args: the command's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = Request(
            model=args.model, steps=args.steps, device=device, guidance_scale=args.guidance_scale,
            height=args.size, width=args.size,
        )  # fmt: skip
        self.pipe = load_pipeline(self.base)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder = args.cache / stem(args.model)
        self.prompts, reference = args.prompts, args.reference
        if args.emoji is not None:
            place = args.cache / f"emoji-{stem(args.categories)}"
            self.prompts, reference = emoji(place, args.emoji, args.categories, args.count)
        elif reference is None and args.model == REPOSITORY:
            reference = garments(args.cache / f"real-{args.references}", args.references, args.data)
        self.evaluation = Evaluation(reference, args.features, clip=args.clip, repetitions=args.repetitions)

    def __call__(self, comparison: Comparison) -> dict[str, Any]:
        """The row of one comparison."""
        before, after = (cell(texts, self.args.weak) for texts in (comparison.before, comparison.guidances))
        if WEAK in after.label:
            return {"setting": after.label, "refused": NO_WEAK}
        try:
            requests = {one.folder: self._requests(one) for one in (before, after)}
            plan_of(self.pipe, requests[after.folder][0])
        except TrimtabError as error:
            return {"setting": after.label, "refused": " ".join(str(error).split())}
        sides = {"before": self._side(before), "after": self._side(after)}
        change = self.evaluation.difference(*(self._made(one) for one in (after, before)))
        return {"setting": after.label, **sides, "change": change, "times": self._times(before, after)}

    def _requests(self, cell: Cell) -> list[Request]:
        """What a cell makes; its guidances are attached."""
        job = Job([self.base], [0], dict(cell.guidances))
        count = None if self.prompts else self.args.count
        _, _, requests, files = prepare(
            job, lambda pipe: expand(job, self.prompts, count, pipe)[: self.args.count], self.pipe
        )
        recipe.write_files(self.folder / cell.folder, files)
        return requests

    def _side(self, cell: Cell) -> dict[str, Any]:
        """The measures of a cell and its cost."""
        measures = measured_cell(self.evaluation, self.folder / cell.folder, self._made(cell).files)
        plan = plan_of(self.pipe, self._requests(cell)[0])
        about = {"label": cell.label, "evaluations": plan.evaluations, "backward_passes": plan.backward_passes}
        return {**about, **measures}

    def _made(self, cell: Cell) -> Pictures:
        """The images of a cell, made where they are missing."""
        place, size = self.folder / cell.folder, self.args.batch
        requests = self._requests(cell)
        paths = [place / f"{request.file_stem()}-{size}{'-bf16' * self.args.autocast}.png" for request in requests]
        for first in tqdm(range(0, len(requests), size), desc=cell.label, leave=False):
            part, files = requests[first : first + size], paths[first : first + size]
            if not all(path.is_file() for path in files):
                for path, request, image in zip(files, part, self._images(part), strict=True):
                    pictures.save(image, path, request.metadata(image))
        return of_files(place, paths)

    def _images(self, requests: Sequence[Request]) -> list[Image.Image]:
        """One batch, each image with its own seed."""
        each = [call_arguments(self.pipe, request) for request in requests]
        arguments = each[0] | {name: [one[name] for one in each] for name in ("prompt",) if name in each[0]}
        if "class_labels" in arguments:
            arguments["class_labels"] = [label for one in each for label in one["class_labels"]]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        with torch.autocast(self.base.device, torch.bfloat16, enabled=self.args.autocast):
            made: list[Image.Image] = self.pipe(generator=generators, **arguments).images
        return made

    def _times(self, *cells: Cell) -> list[float]:
        """Seconds of a small batch after, divided by those before, turn by turn; the first turn warms up.

        On a CPU those of its cores, which other programs lengthen less; elsewhere those of the clock.
        """
        clock = time.process_time if self.base.device == "cpu" else time.perf_counter
        ratios = []
        for _ in tqdm(range(1 + self.args.turns), desc="times", leave=False):
            seconds = []
            for one in cells:
                requests = self._requests(one)[: self.args.timed]
                started = clock()
                self._images(requests)
                seconds.append(clock() - started)
            ratios.append(seconds[1] / seconds[0])
        return ratios[1:]


def cell(texts: Sequence[str], weak: Path | None) -> Cell:
    """The guidances of one side of a comparison."""
    given = [text if weak is None else text.replace(WEAK, str(weak)) for text in texts]
    lacking = any(WEAK in text for text in given)
    return Cell(" + ".join(given) or "no guidance", {} if lacking else options.guidances(given))


def measure(rows: Rows, args: argparse.Namespace, command: Callable[[str], str]) -> None:
    """Fill the rows that are missing or were refused, and those that are named; each says what repeats it."""
    wanted = args.names or [name for name in COMPARISONS if "after" not in rows.get(name, {})]
    measurement = Measurement(args) if wanted else None
    for name in tqdm(wanted, desc="rows"):
        assert measurement is not None
        found = comparisons(bool(args.prompts or args.emoji), hasattr(measurement.pipe, "unet"))
        rows[name] = {**measurement(found[name]), "command": command(name)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"rows to measure anew, of {', '.join(COMPARISONS)}")
    parser.add_argument("--model", default=REPOSITORY, help="a folder or repository")
    parser.add_argument("--count", type=int, default=500, help="images a row")
    parser.add_argument("--prompts", type=Path, help="for a model that takes text: a prompt a line")
    parser.add_argument("--emoji", type=Path, help="the packed emoji: prompts and references are its held-out drawings")
    parser.add_argument("--categories", default=KNOWN, help="of these, with commas between")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--size", type=int, help="pixels a side; by default the pipeline's own")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's own, which every row has; 1 for none")
    parser.add_argument("--batch", type=int, default=50, help="images at once")
    parser.add_argument("--autocast", action="store_true", help="denoise in bfloat16")
    parser.add_argument("--weak", type=Path, help="folder of a weaker version of the model")
    parser.add_argument("--reference", type=Path, help="folder of real images; by default Fashion-MNIST's test images")
    parser.add_argument("--references", type=int, default=1000, help="how many of these")
    parser.add_argument("--features", default="judge", help="see trimtab evaluate")
    parser.add_argument("--clip", help="see trimtab evaluate")
    parser.add_argument("--repetitions", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--timed", type=int, default=10, help="images of a turn whose time is taken")
    parser.add_argument("--turns", type=int, default=5, help="whose times are taken")
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what is there")
    parser.add_argument("--taken", type=Path, default=DOCS, help="folder of what the other benchmarks measured")
    parser.add_argument("--cache", type=Path, default=Path("runs/evidence"), help="folder of the images")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence/evidence"), help="writes OUTPUT.md, OUTPUT/")
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args(given)
    if unknown := set(args.names) - set(COMPARISONS):
        parser.error(f"{', '.join(sorted(unknown))}: no row; allowed: {', '.join(COMPARISONS)}.")
    apart = ("names", "data", "cache", "output", "weak", "timed", "turns", "page", "taken")
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    settings |= {name: str(settings[name]) for name in ("prompts", "reference", "emoji") if settings[name] is not None}
    if args.emoji is None:  # rows that were measured before there was this option stay
        settings = {name: value for name, value in settings.items() if name not in ("emoji", "categories")}
    if args.size is None:  # likewise
        del settings["size"]
    file = args.output / f"{stem(args.model)}.json"
    how = [word for word in given if word not in args.names]
    if not args.page:
        measure(
            Rows(file, settings), args, lambda name: shlex.join(["python", "-m", "benchmarks.evidence", name, *how])
        )
    args.output.with_suffix(".md").write_text(page(args.output, COMPARISONS, args.taken))
    print(args.output.with_suffix(".md"))


def stem(model: str) -> str:
    """A file name for a model."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
