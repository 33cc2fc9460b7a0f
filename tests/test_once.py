"""An error that all processes of a command meet stands there once; one that a single process meets stands there too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab import cli, once
from trimtab.evaluation import command as evaluation
from trimtab.parser import build_parser
from trimtab.pipelines.generate import jobs

PROGRAM = "import sys; from trimtab.once import complain; complain(sys.argv[1])"


def said(run: str | None, *messages: str) -> list[str]:
    """What processes print that this one starts, one a message, all at once."""
    environment = {name: value for name, value in os.environ.items() if name != once.RUN}
    environment |= {} if run is None else {once.RUN: run}
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, text], stderr=subprocess.PIPE, text=True, env=environment)
        for text in messages
    ]
    return sorted(line for process in running for line in process.communicate(timeout=60)[1].splitlines())


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_processes_of_one_run_say_the_same_thing_once_and_different_things_each() -> None:
    assert said("a", "no file", "no memory", "no file") == ["no file", "no memory"]
    assert said("b", "no file") == ["no file"], "another run"


def test_processes_that_nobody_launched_together_know_nothing_of_each_other() -> None:
    assert said(None, "no file", "no file") == ["no file"] * 2


def test_an_old_note_of_a_run_without_a_number_counts_for_nothing() -> None:
    assert said("none", "no file") == ["no file"]
    before = time.time() - 2 * once.RECENT
    for note in once.notes("none", os.getpid()).iterdir():
        os.utime(note, (before, before))
    assert said("none", "no file") == ["no file"]


def test_where_nothing_can_be_noted_it_is_said() -> None:
    once.notes("a", os.getpid()).write_text("a file, no folder")
    assert said("a", "no file", "no file") == ["no file"] * 2


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_what_is_wrong_in_every_process_of_a_command_stands_there_once(command: str, tmp_path: Path) -> None:
    options = [command, "--model", str(tmp_path / "missing"), "--processes", "2", "-o", str(tmp_path / "images")]
    by_launcher = {"generate": jobs.read, "evaluate": evaluation.evaluate}[command]
    by_launcher(build_parser().parse_args(options), cli.REQUEST)  # which refuses nothing, so its processes do
    result = subprocess.run(
        [sys.executable, "-m", "trimtab", *options],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("trimtab: error:") == 1 and "missing" in result.stderr
    assert not list(tmp_path.glob("trimtab-*")), "the launcher clears up"
