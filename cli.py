"""The `trimtab` command: what is typed is parsed (`parser.py`), and dispatched here to the modules that do the work.

Exit codes: 0 done, 1 a plug-in that was looked at is broken, 2 a mistake in what was asked for (one line on stderr;
`TRIMTAB_DEBUG=1` shows the traceback), 130 interrupted. Paths of written files go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from .guidance.errors import TrimtabError
from .once import complain
from .parser import REQUEST_OPTIONS, TRAININGS, build_parser, parse_settings

DEBUG = "TRIMTAB_DEBUG"
REQUEST = [name for name, _, _ in REQUEST_OPTIONS]


def generate(args: argparse.Namespace) -> int:
    """`trimtab generate`: write the images or the sheets, and print where they are."""
    from .pipelines.generate import batch, jobs
    from .pipelines.launch import launch, launched, started

    job = jobs.read(args, REQUEST)
    in_batch = any(
        given is not None for given in (args.processes, args.prompts, args.class_balanced, args.branch_parallel)
    )
    if args.processes is not None and not started():
        batch.check(job)
        return launch(args.given, args.processes)
    if in_batch or launched():
        made = batch.run_batch(job, args.output, args.prompts, args.class_balanced, args.branch_parallel or 1)
    else:
        made = jobs.run(job, args.output)
    for path in made:
        print(path)
    return 0


def interpolate(args: argparse.Namespace) -> None:
    """`trimtab interpolate`: write the strip and the animation, print where they are, and how even they are."""
    from .pipelines import interpolate
    from .pipelines.generate import jobs

    job = jobs.read(args, REQUEST)
    *paths, istd = interpolate.make(job, args.output, args.frames, args.prompt_to, (args.image, args.image_to))
    for path in paths:
        print(path)
    print(f"trimtab: ISTD {istd:.4g}", file=sys.stderr)


def explain(args: argparse.Namespace) -> None:
    """`trimtab explain`: print the plan of each class or prompt; nothing is generated."""
    from .pipelines.generate import jobs

    jobs.explain(jobs.read(args, REQUEST))


def show_reach(args: argparse.Namespace) -> None:
    """`trimtab reach`: one line a pipeline class."""
    from .pipelines import reach

    rows = reach.reach()
    print(json.dumps(reach.as_json(rows), indent=2) if args.json else reach.table(rows))


def show(args: argparse.Namespace) -> None:
    """`trimtab show`: print what an image's file says about it."""
    from .pipelines.generate import pictures

    print(json.dumps(pictures.load(args.file)[1], indent=2, ensure_ascii=False))


def convert(args: argparse.Namespace) -> None:
    """`trimtab convert`: write the safetensors file beside the pickle, and print where it is."""
    from .adapters.unicon.checkpoint import convert as write

    print(write(args.file))


def trace(args: argparse.Namespace) -> None:
    """`trimtab trace`: print the table of a traced run, and where its picture is."""
    from .guidance.trace import Trace

    traced = Trace.load(args.file)
    picture = args.output or args.file.with_suffix(".png")
    traced.plot(picture)
    print(f"{traced}\n", file=sys.stderr)
    print(picture)


def list_plugins(args: argparse.Namespace) -> None:
    """`trimtab plugins list`: one line a plug-in, and the traceback of each broken one."""
    from .guidance import listing, registry

    found = [listing.status(name) for name in registry.plugins()]
    print(json.dumps(found, indent=2) if args.json else listing.table(found))


def describe_plugin(args: argparse.Namespace) -> int:
    """`trimtab plugins info`: what a plug-in does, and its parameters; 1 if it cannot be used."""
    from .guidance import listing

    described = listing.details(args.name)
    print(json.dumps(described, indent=2) if args.json else listing.sheet(described))
    return int(described["status"] != "ok")


def check_plugins(args: argparse.Namespace) -> int:
    """`trimtab plugins check`: whether plug-ins keep the contract; 1 if one is broken, or a named one is blocked."""
    from .guidance import listing, registry

    found = [listing.status(name) for name in args.names or registry.plugins()]
    checked = [{**one, "advice": listing.advice(one)} for one in found]
    print(json.dumps(checked, indent=2) if args.json else listing.report(checked))
    return int(any(one["status"] == "broken" or (args.names and one["status"] != "ok") for one in found))


def new_plugin(args: argparse.Namespace) -> None:
    """`trimtab plugins new`: write a package with one guidance; print where it is."""
    from . import scaffold

    folder = scaffold.write(args.name, args.output)
    if not args.json:
        print(folder)
        return
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(folder), "files": files}, indent=2))


def evaluate(args: argparse.Namespace) -> int:
    """`trimtab evaluate`: measures of a folder of images, or of images made for it, with intervals."""
    from .evaluation import command
    from .pipelines.launch import first, launch, started

    run = command.evaluate(args, REQUEST)
    if args.processes is not None and not started():
        return launch(args.given, args.processes)
    result = run()
    if first():
        print(json.dumps(result, indent=2) if args.json else command.table(result))
    return 0


def sweep(args: argparse.Namespace) -> int:
    """`trimtab sweep`: print where the results, the plot and the sheet are."""
    from .evaluation import sweep as sweeping
    from .pipelines.launch import launch, started

    run = sweeping.sweep(args, REQUEST)
    if args.processes is not None and not started():
        return launch(args.given, args.processes)
    for path in run():
        print(path)
    return 0


def list_models(args: argparse.Namespace) -> None:
    """`trimtab models`: what ships, where it came from, and what makes the others."""
    from .pipelines import models

    print(json.dumps(models.rows(), indent=2) if args.json else models.table())


def calibrate(args: argparse.Namespace) -> None:
    """`trimtab calibrate`: print the calibration error of a classifier at each step."""
    from .pipelines import calibration
    from .pipelines.loading import GuidedPipeline

    pipe = GuidedPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    classes = [int(one) if one.isdecimal() else one for one in args.classes]
    rows = calibration.calibrate(pipe, args.classifier, classes, count=args.count, steps=args.steps, prompt=args.prompt)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) if args.json else calibration.table(rows))


def training_of(args: argparse.Namespace) -> tuple[Callable[[Any], Any], Any]:
    """The training that is asked for, and its settings."""
    text, where = TRAININGS[args.what]
    module, function = where.split(":")
    run = getattr(importlib.import_module(f".{module}", __package__), function)
    return run, parse_settings(args.what, text, typing.get_type_hints(run)["settings"], args.options)


def train(args: argparse.Namespace) -> None:
    """`trimtab train`: train, or continue, and print where the model is; under `accelerate launch` as well."""
    from .pipelines.launch import first
    from .training import end_processes

    run, settings = training_of(args)
    folder = run(settings)
    end_processes()
    if first():
        print(folder)


ACTIONS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "generate": generate,
    "explain": explain,
    "interpolate": interpolate,
    "show": show,
    "trace": trace,
    "reach": show_reach,
    "plugins list": list_plugins,
    "plugins info": describe_plugin,
    "plugins check": check_plugins,
    "convert": convert,
    "evaluate": evaluate,
    "sweep": sweep,
    "models": list_models,
    "plugins new": new_plugin,
    "calibrate": calibrate,
    "train": train,
}
"""What each sub-command does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: without the program's name; by default those of this process.
    """
    # It would warn of image processors that want torchvision, whoever needs them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    args = build_parser().parse_args(arguments)
    args.given = list(sys.argv[1:] if arguments is None else arguments)
    code = 0
    try:
        code = int(ACTIONS[args.command](args) or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing is wrong, and the exit must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TrimtabError, ValueError, OSError) as error:
        if os.environ.get(DEBUG, "") not in ("", "0"):
            raise
        where = [f"({note})" for note in getattr(error, "__notes__", ())]
        complain(f"trimtab: error: {' '.join([*str(error).split(), *where])}")
        return 2
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    raise SystemExit(main())
