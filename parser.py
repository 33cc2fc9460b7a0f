"""What can be typed: the sub-commands of `trimtab`, and their options."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

REQUEST_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("model", str, "Hub repository or folder; by default one that ships, for prompts or for classes"),
    ("revision", str, "commit, branch or tag of the Hub repository"),
    ("negative-prompt", str, "what the image should not show"),
    ("steps", int, "number of denoising steps"),
    ("scheduler", str, "class name of a Diffusers scheduler, such as EulerDiscreteScheduler"),
    ("height", int, "in pixels"),
    ("width", int, "in pixels"),
    ("guidance-scale", float, "the pipeline's own classifier-free guidance"),
    ("dtype", str, "float32 (default), bfloat16 or float16"),
    ("device", str, "cpu, cuda, cuda:1, ...; by default a GPU if there is one"),
)
TRAININGS: dict[str, tuple[str, str]] = {
    "base": ("the Fashion-MNIST model", "pipelines.fashion.train:train_base"),
    "easycontrol": ("a LoRA for a kind of condition on a Flux model", "adapters.easycontrol.train:train_easycontrol"),
    "ppap": ("experts by noise range for a network of clean images", "adapters.ppap.train:train_ppap"),
    "smooth": ("a LoRA for even interpolation", "adapters.smooth.train:train_smooth"),
    "unicon": ("a kind of partner on a Stable Diffusion model", "adapters.unicon.train:train_unicon"),
    "emoji-autoencoder": ("the autoencoder of the emoji models", "pipelines.emoji.autoencoder:train_autoencoder"),
    "emoji-sd": ("a text-to-image UNet of emoji", "pipelines.emoji.sd:train_sd"),
    "emoji-flux": ("a text-to-image flow transformer of emoji", "pipelines.emoji.flux:train_flux"),
    "emoji-judge": ("a classifier of emoji", "pipelines.emoji.judges:train_judge"),
    "emoji-clip": ("encoders of emoji images and captions", "pipelines.emoji.clip:train_pair"),
}
"""What can be trained: its help, and the function that does it; the function's `settings` are the command's options."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like every other error of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"trimtab: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser("trimtab", description="Guide any Diffusers pipeline while it samples.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command, text in (
        ("generate", "make images"),
        ("explain", "show what generate would compute, without computing it"),
    ):
        sub = commands.add_parser(command, help=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        _add_generation_options(sub)

    way = commands.add_parser("interpolate", help="make images on the way from one to another", allow_abbrev=False)
    _add_generation_options(way)
    way.add_argument("--prompt-to", metavar="PROMPT", help="of the last image; by default that of the first")
    way.add_argument("--image", type=Path, metavar="FILE", help="a real image to begin with, not a noise")
    way.add_argument("--image-to", type=Path, metavar="FILE", help="a real image to end with")
    way.add_argument("--frames", type=int, default=9, metavar="NUMBER", help="images, both ends included")
    way.set_defaults(command="interpolate")

    show_parser = commands.add_parser("show", help="print the recipe, the seed and all settings of an image")
    show_parser.add_argument("file", type=Path, metavar="FILE.png")
    show_parser.set_defaults(command="show")

    trace_parser = commands.add_parser("trace", help="print and draw what each guidance did in a traced run")
    trace_parser.add_argument("file", type=Path, metavar="FILE.json", help="which TRIMTAB_TRACE=1 or Trace.save wrote")
    trace_parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="by default beside the trace")
    trace_parser.set_defaults(command="trace")
    reach_parser = commands.add_parser("reach", help="which pipeline classes of Diffusers can be guided, by inspection")
    reach_parser.add_argument("--json", action="store_true", help="for programs")
    reach_parser.set_defaults(command="reach")

    plugins = commands.add_parser("plugins", help="list the installed guidances").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = plugins.add_parser("list", help="all of them, with their state")
    info = plugins.add_parser("info", help="one of them, with its parameters")
    info.add_argument("name")
    check = plugins.add_parser("check", help="whether they keep the contract; all of them if none is named")
    check.add_argument("names", nargs="*", metavar="NAME")
    for sub in (listing, info, check):
        sub.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(command="plugins list")
    info.set_defaults(command="plugins info")
    check.set_defaults(command="plugins check")

    convert_parser = commands.add_parser(
        "convert", help="write a UniCon model.pth as safetensors; only tensors are read"
    )
    convert_parser.add_argument("file", type=Path, metavar="model.pth")
    convert_parser.set_defaults(command="convert")

    evaluation = commands.add_parser(
        "evaluate", help="measure a folder of images, or images that are made for it", allow_abbrev=False
    )
    evaluation.add_argument("images", nargs="?", type=Path, metavar="FOLDER", help="without it, images are made")
    _add_batch_options(evaluation)
    evaluation.add_argument(
        "--frames", type=_from(3), metavar="N", help="make strips of N images between two seeds each"
    )
    _add_evaluation_options(evaluation)
    evaluation.add_argument("--json", action="store_true", help="for programs")
    evaluation.set_defaults(command="evaluate", prompt=None, like=None, compare=False)

    grid = commands.add_parser(
        "sweep", help="measure every cell of a grid over guidance parameters, against its cost", allow_abbrev=False
    )
    _add_batch_options(grid)
    _add_evaluation_options(grid)
    grid.add_argument("--quality", metavar="MEASURE", help="what is drawn; by default the first that is measured")
    grid.set_defaults(command="sweep", prompt=None, like=None, compare=False)

    models = commands.add_parser("models", help="what models ship, and what makes the others")
    models.add_argument("--json", action="store_true", help="for programs")
    models.set_defaults(command="models")

    what = "\n".join(f"  {name:<12} {text}" for name, (text, _) in TRAININGS.items())
    new = plugins.add_parser("new", help="write a package with a guidance of your own, tests included")
    new.add_argument("name", metavar="VENDOR-NAME", help="such as my-guidance")
    new.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="where to put its folder")
    new.add_argument("--json", action="store_true", help="for programs")
    new.set_defaults(command="plugins new")

    calibration = commands.add_parser(
        "calibrate", help="how far a classifier can be trusted along the trajectory", allow_abbrev=False
    )
    calibration.add_argument("classifier", help="a transformers image classifier, a folder or Hub repository")
    calibration.add_argument("--model", default="trimtab/fashion", help="a pipeline that takes a class or a prompt")
    calibration.add_argument("--class", action="append", dest="classes", required=True, help="repeatable")
    calibration.add_argument("--prompt", default="a photo of a {}", help="with the class in place of the braces")
    calibration.add_argument("--count", type=int, default=100, help="images")
    calibration.add_argument("--steps", type=int, default=25, help="denoising steps")
    calibration.add_argument("--json", action="store_true", help="for programs")
    calibration.set_defaults(command="calibrate")

    training = commands.add_parser(
        "train",
        help="train a model or an adapter",
        epilog=f"what can be trained:\n{what}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    training.add_argument("what", choices=TRAININGS, metavar="WHAT")
    training.add_argument("options", nargs=argparse.REMAINDER, help="see trimtab train WHAT --help")
    training.set_defaults(command="train")
    return parser


def _add_options(parser: argparse.ArgumentParser, options: Sequence[tuple[str, type, str]]) -> None:
    for name, kind, text in options:
        parser.add_argument(f"--{name}", type=kind, metavar=name.split("-")[-1].upper(), help=text)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="for a model that takes text")
    _add_batch_options(parser)
    parser.add_argument("--compare", action="store_true", help="a sheet: none, each guidance alone, all together")
    parser.add_argument(
        "--like", type=Path, metavar="FILE.png", help="repeat this image; other options replace its own"
    )


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--class", action="append", dest="classes", metavar="NAME|INDEX", help="repeatable")
    parser.add_argument("--seeds", metavar="SEEDS", help="0-7 or 0,3,5; by default 0")
    _add_options(parser, REQUEST_OPTIONS)
    parser.add_argument("--guidance", action="append", metavar="NAME[:PARAMETER=VALUE,...]", help="repeatable")
    parser.add_argument(
        "--recipe", metavar="FILE", help="guidances from a recipe: a file, a folder or a Hub repository"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a batch: a prompt a line, or a .jsonl file")
    parser.add_argument(
        "--class-balanced", type=_from(1), metavar="N", help="a batch: N images over all classes in turn"
    )
    parser.add_argument("--processes", type=_from(1), metavar="N", help="split the batch over N processes, resumable")
    parser.add_argument(
        "--branch-parallel",
        type=_from(1),
        metavar="N",
        help="of these processes, N at a time share the branches of an image",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="FOLDER", help="by default out")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="images that they should be like, as a set")
    parser.add_argument("--features", metavar="NAME", help="judge (default), efficientnet-lite0, inception, a model")
    parser.add_argument(
        "--pairs", type=Path, metavar="FOLDER|FILE", help="images that each should be like, by file name, or one image"
    )
    parser.add_argument("--lpips", choices=("alex", "vgg", "squeeze"), help="LPIPS of the pairs; needs torchvision")
    parser.add_argument("--clip", metavar="MODEL", help="folder or repository of a CLIP, for images made of prompts")
    # Of fewer draws none lies beyond the interval's ends, each of which leaves out 2.5 % of them.
    parser.add_argument("--repetitions", type=_from(40), default=200, metavar="N", help="of the bootstrap")


def _from(least: int) -> Callable[[str], int]:
    """A reader of whole numbers that are at least this."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: whole numbers from {least}")
        return int(text)

    return read


def parse_settings(what: str, text: str, settings_class: Any, options: Sequence[str]) -> Any:
    """The settings of a training, whose fields are the options of `trimtab train WHAT`."""
    parser = Parser(f"trimtab train {what}", description=f"Train {text}.", allow_abbrev=False)
    for field in dataclasses.fields(settings_class):
        name, hint = field.name.replace("_", "-"), typing.get_type_hints(settings_class)[field.name]
        kind = next(one for one in (typing.get_args(hint) or (hint,)) if one is not type(None))
        default = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(
            f"--{name}", type=kind, metavar=name.split("-")[-1].upper(), help=field.metadata["doc"] + default
        )
    given = {name: value for name, value in vars(parser.parse_args(options)).items() if value is not None}
    return settings_class(**given)
