"""What the processes of the tests of batches and evaluation run: commands of `trimtab`, and their sudden end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trimtab import cli
from trimtab.evaluation import command
from trimtab.parser import REQUEST_OPTIONS, build_parser
from trimtab.pipelines.generate import batch, manifest, pictures


def run(*arguments: str) -> int:
    """`trimtab` with these arguments; its exit code."""
    return cli.main(arguments)


def evaluate(*arguments: str) -> dict[str, Any]:
    """What `trimtab evaluate` would print."""
    args = build_parser().parse_args(["evaluate", *arguments])
    return command.evaluate(args, [name for name, _, _ in REQUEST_OPTIONS])()


def killed(moment: str, number: int, *arguments: str) -> None:
    """`trimtab` with these arguments, until process 0 is ended by force at a moment of its image of this number.

    The other takes a second an image, so that it has not made all of them by then.
    """
    if os.environ["RANK"] == "0":
        MOMENTS[moment](number)
    else:
        slow()
    cli.main(arguments)


def uneven(*arguments: str) -> int:
    """`trimtab` with these arguments, where an image takes process 1 a second longer; how many this process made."""
    made, generate = [], batch.generate

    def counted(pipe: Any, request: Any) -> Any:
        made.append(request.seed)
        return generate(pipe, request)

    batch.generate = counted
    if os.environ["RANK"] == "1":
        slow()
    assert cli.main(arguments) == 0
    return len(made)


def slow() -> None:
    generate = batch.generate

    def slowly(pipe: Any, request: Any) -> Any:
        time.sleep(1.0)
        return generate(pipe, request)

    batch.generate = slowly


def failing(*arguments: str) -> int:
    """`trimtab` with these arguments, where the image of seed 2 cannot be made; the exit code."""
    generate = batch.generate

    def refusing(pipe: Any, request: Any) -> Any:
        if request.seed == 2:
            raise RuntimeError("out of\nmemory")
        return generate(pipe, request)

    batch.generate = refusing
    return cli.main(arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file(number: int, after: bool) -> None:
    save, left = pictures.save, [number]

    def saving(image: Any, path: Path, metadata: dict[str, Any]) -> Path:
        left[0] -= 1
        if left[0] == 0 and not after:
            die()
        saved = save(image, path, metadata)
        if left[0] == 0:
            die()
        return saved

    pictures.save = saving


def within_file(number: int) -> None:
    replacing, left = pictures.replacing, [number]

    @contextmanager
    def dying(path: Path) -> Iterator[BinaryIO]:
        with replacing(path) as file:
            yield file
            left[0] -= 1
            if left[0] == 0:
                die()

    pictures.replacing = dying


def within_row(number: int) -> None:
    append, left = manifest.Manifest.append, [number]

    def appending(self: manifest.Manifest, row: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            with self.path.open("a") as file:
                file.write('{"index": 0, "file"')
            die()
        append(self, row)

    # The program is the process that dies: what it replaces is never put back, and mypy forbids to replace methods.
    manifest.Manifest.append = appending  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[int], None]] = {
    "before its file": lambda number: at_file(number, after=False),
    "within its file": within_file,
    "between its file and its row": lambda number: at_file(number, after=True),
    "within its row": within_row,
}
