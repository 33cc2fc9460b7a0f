"""What one command line asks for, and doing it: `trimtab generate` and `trimtab explain`."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ...guidance import recipe
from ...guidance.base import Guidance
from ...guidance.errors import RecipeError
from ...guidance.planner import Plan
from ...guidance.shipped import EMBEDDED
from ..explain import make_plan
from ..fashion import REPOSITORY
from ..launch import first, launched
from . import options, pictures, prompts
from .comparison import compare, variants
from .local import changed, fingerprints
from .request import Request, RequestError, installed_versions, option
from .samples import attach, call_arguments, generate, load_pipeline, resolve


@dataclass(frozen=True)
class Job:
    """One request a class or prompt, all on the same model, times the seeds.

    Args:
        requests: their seed is replaced.
        seeds: at least one.
        guidances: by name; `None` for those that the model's own folder lists, if any.
        compare: make a sheet a request, not an image a seed.
        repeats: the file that the job repeats with nothing changed, if it does.
        rows: of the prompt file, if there is one, which may be such that it can be read once only.
    """

    requests: Sequence[Request]
    seeds: Sequence[int]
    guidances: dict[str, Guidance] | None = None
    compare: bool = False
    repeats: Path | None = None
    rows: prompts.Rows | None = None


def read(args: Namespace, names: Sequence[str]) -> Job:
    """The job that parsed arguments describe; where they name no model, on the one that ships and takes what they ask.

    Args:
        args: of `trimtab generate`.
        names: options that replace the request's field of the same name.

    Raises:
        TrimtabError, ValueError, OSError: an option that cannot be used, or a file that cannot be read.
    """
    if args.command != "explain":  # which writes nothing
        _check_folder(args.output)
    rows = _rows(args)
    said = {key for _, row in rows or () for key in row}
    classes = args.classes or args.class_balanced is not None or "class_label" in said
    model = REPOSITORY if classes else EMBEDDED
    base = Request(model=model, device="cuda" if torch.cuda.is_available() else "cpu")
    recorded = pictures.load(args.like)[1] if args.like else {}
    if recorded:
        base = Request.from_metadata(recorded)
    fields = [name.replace("-", "_") for name in names]
    changes: dict[str, Any] = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    guidances = _guidances(args)
    subjects: list[dict[str, Any]] = [{"class_label": label, "prompt": args.prompt} for label in args.classes or ()]
    if not subjects and args.prompt is not None:
        subjects = [{"class_label": None, "prompt": args.prompt}]
    unchanged = not (changes or subjects or guidances or args.seeds or args.compare)
    base = dataclasses.replace(base, **changes)
    return Job(
        requests=[dataclasses.replace(base, **subject) for subject in subjects or [{}]],
        seeds=options.seeds(args.seeds) if args.seeds else recorded.get("seeds", [base.seed]),
        guidances=guidances or (recipe.load(base.guidance, recipe.beside(args.like)) if recorded else None),
        compare=args.compare or "rows" in recorded,
        repeats=args.like if unchanged and "frames" not in recorded else None,
        rows=rows,
    )


def run(job: Job, folder: Path) -> Iterator[Path]:
    """Make the job's images or sheets and yield each file once it is complete."""
    pipe, guidances, requests, files = prepare(job)
    recipe.write_files(folder, files)
    rows = len(variants(guidances)) if job.compare else 1
    pipe.set_progress_bar_config(leave=False, disable=not sys.stderr.isatty())
    total = len(requests) * len(job.seeds) * rows
    with tqdm(total=total, desc="images", unit="image", disable=None) as bar:
        for request in requests:
            if job.compare:
                picture, metadata = compare(
                    pipe, request, guidances, job.seeds, begun=bar.set_description_str, done=bar.update
                )
                yield _write(job, picture, folder / f"compare-{request.file_stem(job.seeds)}.png", metadata)
                continue
            for seed in job.seeds:
                one = dataclasses.replace(request, seed=seed)
                image = generate(pipe, one)
                bar.update()
                yield _write(job, image, folder / f"{one.file_stem()}.png", one.metadata(image))


def explain(job: Job) -> None:
    """Print what one image of the job's first class or prompt would cost; nothing is generated."""
    pipe, _, requests, _ = prepare(job)
    pipe.explain_guidance(**call_arguments(pipe, requests[0]))


def plan_of(pipe: Any, request: Request) -> Plan:
    """What making one image of this request costs, with the guidances that are attached; nothing is generated."""
    arguments = call_arguments(pipe, request)
    return make_plan(pipe, pipe.guidances, arguments.pop("num_inference_steps", None), arguments)


def prepare(
    job: Job, expand: Callable[[Any], Sequence[Request]] | None = None, pipe: Any = None
) -> tuple[Any, dict[str, Guidance], list[Request], dict[str, bytes]]:
    """The loaded pipeline with its guidances attached; these; the requests as the model understands them; the files
    that the recipe in each image refers to.

    Args:
        job: what to prepare.
        expand: makes the requests, given the pipeline; by default they are the job's.
        pipe: the job's pipeline, where it is loaded already.
    """
    pipe = load_pipeline(job.requests[0]) if pipe is None else pipe
    guidances = recipe.pinned(pipe.guidances if job.guidances is None else job.guidances)
    attach(pipe, guidances)
    files: dict[str, bytes] = {}
    fixed: dict[str, Any] = {
        "guidance": recipe.dump(guidances, files),
        "files": fingerprints(job.requests[0].model, guidances),
    }
    requests = job.requests if expand is None else expand(pipe)
    return pipe, guidances, [dataclasses.replace(resolve(one, pipe), **fixed) for one in requests], files


def pinned(job: Job) -> Job:
    """The job with the same commits and hashes in all processes, of which the first one tells them.

    To be called in all of them.
    """
    if job.guidances is None:
        return job
    told = [{name: _changes(one, one.pinned()) for name, one in job.guidances.items()} if first() else {}]
    if launched():
        broadcast_object_list(told)
    return dataclasses.replace(
        job, guidances={name: dataclasses.replace(one, **told[0][name]) for name, one in job.guidances.items()}
    )


def _changes(guidance: Guidance, other: Guidance) -> dict[str, Any]:
    return {name: value for name, value in other.parameters.items() if value is not guidance.parameters[name]}


def _rows(args: Namespace) -> prompts.Rows | None:
    """What the lines of a prompt file say; it is refused that an option says it as well, or says several things."""
    if args.prompts is None:
        return None
    if (args.processes is not None or launched()) and args.prompts.exists() and not args.prompts.is_file():
        raise RequestError(
            f"--prompts: {args.prompts} is no regular file, so only one process can read it; save it as a file."
        )
    rows = prompts.read_rows(args.prompts)
    said = {key for _, row in rows for key in row}
    for key, given in (("prompt", args.prompt), ("class_label", args.classes)):
        if given is not None and key in said:
            raise RequestError(
                f"{option(key)} and --prompts: the lines of {args.prompts} have their own {key}; leave out "
                f"{option(key)}, or --prompts."
            )
    if len(args.classes or ()) > 1:
        raise RequestError(
            f"--class and --prompts: {len(args.classes)} classes are given for all lines of {args.prompts}; give one "
            'of them, or each line its own: {"class_label": NAME}.'
        )
    return rows


def _check_folder(folder: Path) -> None:
    """Refuse a place for images where no folder can be."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if not there.is_dir():
        raise RequestError(f"-o {folder}: {there} is a file; give a folder, which is made where it is missing.")


def _guidances(args: Namespace) -> dict[str, Guidance]:
    """Those of `--recipe`, then those of `--guidance`."""
    found = recipe.read(args.recipe) if args.recipe else {}
    for name, guidance in options.guidances(args.guidance or ()).items():
        if name in found:
            raise RecipeError(f"--guidance: {name} is in {args.recipe} already; give it in one place.")
        found[name] = guidance
    return found


def _write(job: Job, image: Any, path: Path, metadata: dict[str, Any]) -> Path:
    """Write the file; where the job repeats another, say on stderr whether it came out the same."""
    if job.repeats is None:
        return pictures.save(image, path, metadata)
    original, recorded = pictures.load(job.repeats)
    written = pictures.save(image, path, metadata)
    if original.mode == image.mode and original.size == image.size and original.tobytes() == image.tobytes():
        print(f"trimtab: the same as {job.repeats}, bit for bit", file=sys.stderr)
        return written
    now, then = installed_versions(), recorded.get("versions", {})
    differing = [
        f"{name} {then.get(name)} then, {now.get(name)} now" for name in now if now.get(name) != then.get(name)
    ]
    differing += [f"{name} has other files now" for name in changed(recorded.get("files", {}), metadata["files"])]
    unknown = "" if "files" in recorded else "the model's files or "
    reason = "; ".join(differing) or f"{unknown}the machine must have changed"
    print(f"trimtab: warning: differs from {job.repeats}: {reason}", file=sys.stderr)
    return written
