"""What a command line asks for, and what is refused of it before a model is loaded."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from trimtab.cli import REQUEST
from trimtab.parser import build_parser
from trimtab.pipelines.generate import batch, jobs
from trimtab.pipelines.generate.request import RequestError


def read(*arguments: str) -> jobs.Job:
    return jobs.read(build_parser().parse_args([*arguments]), REQUEST)


def lines(folder: Path, text: str, name: str = "prompts.jsonl") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def pipe(folder: Path, text: str) -> Path:
    """What `<(...)` of a shell is."""
    os.mkfifo(folder / "pipe")
    threading.Thread(target=(folder / "pipe").write_text, args=(text,), daemon=True).start()
    return folder / "pipe"


# -- a prompt file beside other options --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "given", "message"),
    [
        ("p.txt", "a boat\n", ["a fox"], "PROMPT and --prompts: the lines of {} have their own prompt; leave out"),
        ("p.jsonl", '{"prompt": "a boat"}', ["a fox"], "PROMPT and --prompts: .* leave out PROMPT, or --prompts"),
        (
            "p.jsonl",
            '{"seed": 1}\n{"class_label": "Bag"}',
            ["--class", "Coat"],
            "--class and --prompts: .* class_label",
        ),
        ("p.jsonl", '{"seed": 1}', ["--class", "Bag", "--class", "Coat"], "2 classes are given for all lines of {}; "),
    ],
)
def test_an_option_that_the_lines_of_a_prompt_file_would_set_aside_is_refused(
    tmp_path: Path, name: str, text: str, given: list[str], message: str
) -> None:
    file = lines(tmp_path, text, name)
    with pytest.raises(RequestError, match=message.format(re.escape(file))):
        read("generate", *given, "--prompts", file)


def test_what_the_lines_leave_open_an_option_says_for_all(tmp_path: Path) -> None:
    file = lines(tmp_path, '{"seed": 1}\n{"seed": 5, "negative_prompt": "dark"}\n')
    (asked,) = read("generate", "a fox", "--prompts", file).requests
    assert asked.prompt == "a fox"
    (asked,) = read("evaluate", "--class", "Bag", "--prompts", file).requests
    assert asked.class_label == "Bag"


def test_the_model_that_ships_for_classes_is_taken_where_some_line_says_one(tmp_path: Path) -> None:
    classes, prompts = '{"seed": 3, "class_label": "Bag"}', '{"prompt": "a \\"class_label\\""}'
    assert read("generate", "--prompts", lines(tmp_path, classes)).requests[0].model == "trimtab/fashion"
    assert read("generate", "--prompts", lines(tmp_path, prompts)).requests[0].model != "trimtab/fashion"


def test_a_prompt_file_that_can_be_read_once_only_is_carried_along(tmp_path: Path) -> None:
    file = pipe(tmp_path, "a fox\n\na boat\n")
    job = read("generate", "--prompts", str(file))
    assert [one.prompt for one in batch.expand(job, file, None, None)] == ["a fox", "a boat"]


def test_a_prompt_file_that_can_be_read_once_only_is_refused_for_several_processes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--prompts: .*/pipe is no regular file, so only one process can read it"):
        read("generate", "--processes", "2", "--prompts", str(pipe(tmp_path, "")))


# -- where images go ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["generate", "interpolate", "evaluate", "sweep"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path, command: str, below: str) -> None:
    file = Path(lines(tmp_path, "", "taken"))
    with pytest.raises(RequestError, match=rf"-o {file / below}: {file} is a file; give a folder"):
        read(command, "--class", "Bag", "-o", str(file / below))


def test_a_folder_that_is_missing_is_none_of_these_mistakes_nor_one_that_nothing_goes_to(tmp_path: Path) -> None:
    read("generate", "--class", "Bag", "-o", str(tmp_path / "deep" / "er"))
    assert not (tmp_path / "deep").exists()
    read("explain", "--class", "Bag", "-o", lines(tmp_path, "", "taken"))
