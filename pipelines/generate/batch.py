"""Many images, split over processes: `trimtab generate --prompts FILE` and `--class-balanced N`.

Image i has the seed `first + i` and is made alone in its batch. So it does not depend on the number of processes nor on
which of them makes it, and neither does its file's name. Each takes the next image when it is done with one; processes
that share the branches of an image count as one. What is done stands in the manifest; only at the end do they wait for
each other, and a batch that was stopped at any moment continues where it was.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ...guidance import recipe
from ...guidance.files import locked, remove_unfinished
from ...once import by_main
from . import pictures
from .jobs import Job, pinned, prepare
from .manifest import Manifest
from .prompts import read_prompts
from .request import Request, RequestError
from .samples import class_names, generate
from .turns import Turns

POLL_SECONDS = 0.5


def balanced(count: int, classes: Sequence[str], base: Request) -> list[Request]:
    """`count` requests over all classes in turn, so that any run of `len(classes)` images has one of each."""
    return [dataclasses.replace(base, class_label=classes[i % len(classes)], seed=base.seed + i) for i in range(count)]


def expand(job: Job, prompts: Path | None, count: int | None, pipe: Any) -> list[Request]:
    """The requests of a batch: of a prompt file, of `count` images over the model's classes, or one a class and seed.

    Raises:
        RequestError: options that contradict each other, a model without classes, or see `read_prompts`.
    """
    base = dataclasses.replace(job.requests[0], seed=job.seeds[0])
    if prompts is None and count is None:
        return [dataclasses.replace(one, seed=seed) for one in job.requests for seed in job.seeds]
    if prompts is not None and count is not None:
        raise RequestError("--prompts and --class-balanced: give one of them.")
    if len(job.seeds) > 1:
        raise RequestError("--seeds: in a batch image i has the seed FIRST + i; give the first one only.")
    if prompts is not None:
        return read_prompts(prompts, base, pipe, job.rows)
    if base.class_label is not None:
        raise RequestError("--class and --class-balanced: give one of them; a balanced batch is of all classes.")
    classes = list(class_names(pipe))
    if not classes:
        raise RequestError(f"--class-balanced: {base.model} has no classes; use --prompts FILE.")
    return balanced(count or 0, classes, base)


def check(job: Job) -> None:
    """Refuse what no batch can be.

    Raises:
        RequestError: a comparison sheet, whose images belong together.
    """
    if job.compare:
        raise RequestError(
            "--compare makes one sheet, in one process; leave out --prompts, --class-balanced, --processes."
        )


@dataclass(frozen=True)
class Made:
    """What a batch has made.

    Args:
        requests: in order.
        files: of the images that did not fail, in order.
        rows: what the manifest says of each image.
        manifest: where it says so.
    """

    requests: list[Request]
    files: list[Path]
    rows: list[dict[str, Any]]
    manifest: Path

    def check(self) -> None:
        """Whether all images were made.

        Raises:
            RequestError: images failed; the message names the first.
        """
        failed = [row for row in self.rows if row["status"] == "failed"]
        if failed:
            raise RequestError(
                f"{len(failed)} of {len(self.rows)} images failed, and {self.manifest} says why. The first: "
                f"{failed[0]['subject']}, seed {failed[0]['seed']}: {failed[0]['error']} The same command tries them "
                "again."
            )


def run_batch(
    job: Job, folder: Path, prompts: Path | None = None, count: int | None = None, sharing: int = 1
) -> Iterator[Path]:
    """Make this process's share of the images; the first process yields all files, in order, once they are there.

    Args:
        job: the settings of all images.
        folder: for the files and the manifest.
        prompts, count: see `expand`.
        sharing: neighbouring processes that share the branches of one image.

    Raises:
        RequestError: at the end, when images failed.
    """
    made = make_batch(job, folder, prompts, count, sharing=sharing)
    if PartialState().is_main_process:
        yield from made.files
        made.check()


def alone(folder: Path) -> AbstractContextManager[None]:
    """Let no other command make images in the folder within the block.

    Raises:
        RequestError: one does.
    """
    return locked(
        folder / ".batch.lock",
        RequestError(f"{folder}: another command makes images there; wait for it, or give another folder: -o FOLDER."),
    )


def make_batch(
    job: Job, folder: Path, prompts: Path | None = None, count: int | None = None, pipe: Any = None, sharing: int = 1
) -> Made:
    """Make this process's share of the images, and wait for the others.

    An image whose file is there, and whole, is not made again. One that fails is noted in the manifest and the batch
    goes on.

    Args:
        job, folder, prompts, count, sharing: see `run_batch`.
        pipe: the job's pipeline, where it is loaded already; its guidances are replaced.
    """
    check(job)
    state = PartialState(cpu=job.requests[0].device == "cpu")
    job = pinned(job)
    pipe, _, requests, files = prepare(job, lambda pipe: expand(job, prompts, count, pipe), pipe)
    pipe.set_progress_bar_config(disable=True)
    mesh = pipe.enable_branch_parallel(sharing) if sharing > 1 else None
    group = state.process_index if mesh is None else mesh.index
    paths = [folder / f"{request.file_stem()}.png" for request in requests]
    _check_different(requests)
    with ExitStack() as stack:
        turns = Turns(folder, by_main(lambda: stack.enter_context(alone(folder)) or uuid.uuid4().hex))
        manifest = Manifest(folder)
        if state.is_main_process:
            turns.begin()
            remove_unfinished(folder, {manifest.path.name, *files, *(path.name for path in paths)})
            recipe.write_files(folder, files)
            there = {index: path.name for index, path in enumerate(paths) if pictures.whole(path)}
            manifest.keep(there, failed=False)
        state.wait_for_everyone()
        done = manifest.rows()
        missing = [index for index in range(len(requests)) if index not in done]
        state.wait_for_everyone()  # until all have read what is missing
        with tqdm(total=len(requests), desc="images", unit="image", disable=not state.is_main_process) as bar:
            for piece in turns.take(group, len(missing)):
                index = missing[piece]
                row = {"index": index, **_make(pipe, requests[index], paths[index])}
                if mesh is None or mesh.rank == 0:
                    with turns.held():
                        manifest.append(row)
                if state.is_main_process:
                    _show(bar, manifest.count())
            while (finished := manifest.count()) < len(requests):
                with turns.held():
                    _show(bar, finished)
                time.sleep(POLL_SECONDS)
            _show(bar, finished)
        rows = manifest.rows()
        state.wait_for_everyone()  # until nobody takes another turn
        if state.is_main_process:
            manifest.keep({index: path.name for index, path in enumerate(paths)})
    made = [folder / row["file"] for row in rows.values() if row["status"] == "done"]
    return Made(requests, made, list(rows.values()), manifest.path)


def _check_different(requests: Sequence[Request]) -> None:
    """Refuse a batch in which an image stands twice, which would be one file."""
    first: dict[str, int] = {}
    for index, request in enumerate(requests):
        if (other := first.setdefault(request.file_stem(), index)) != index:
            raise RequestError(
                f"images {other + 1} and {index + 1} of the batch are one and the same: {request.subject}, seed "
                f"{request.seed}; give one of them another seed, or leave it out."
            )


def _make(pipe: Any, request: Request, path: Path) -> dict[str, Any]:
    """Make one image, unless its file is there and whole; returns what the manifest says of it."""
    mesh = pipe.branch_parallel
    row: dict[str, Any] = {"file": path.name, "seed": request.seed, "subject": request.subject}
    try:
        if not pictures.whole(path):
            image = generate(pipe, request)
            if mesh is None or mesh.rank == 0:
                pictures.save(image, path, request.metadata(image))
    except Exception as error:
        if mesh is not None and mesh.lost:
            raise
        return {**row, "status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {**row, "status": "done"}


def _show(bar: Any, finished: int) -> None:
    bar.update(finished - bar.n)
