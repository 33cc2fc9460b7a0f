"""Files appear whole or not at all, and what a killed process leaves of one is known by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.guidance.files import ABANDONED, locked, remove_unfinished, replacing

KILLED = """
import os, signal, sys
from pathlib import Path
from trimtab.guidance.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_is_what_it_was_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="stopped"), replacing(path) as file:
        file.write(b"two")
        raise RuntimeError("stopped")
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_that_has_the_name_of_a_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.png: a folder is where this file should be"):
        replacing(tmp_path / "a.png").__enter__()
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"whole")
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)])
        assert done.returncode == -signal.SIGKILL
    others = {".a.png.tmp", ".a.png.old.tmp", "a.png", "b.png"}
    for name in others - {"a.png", "b.png"}:
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == len(others) + 2
    remove_unfinished(tmp_path, {"a.png"})
    assert len(os.listdir(tmp_path)) == len(others) + 2, "they may be of a command that is still writing"
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
    remove_unfinished(tmp_path, {"a.png"})
    (left,) = set(os.listdir(tmp_path)) - others
    assert left.startswith(".b.png.") and (tmp_path / "a.png").read_bytes() == b"whole"


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.png") as file:
        file.write(b"whole")
        remove_unfinished(tmp_path, {"a.png"})
    assert (tmp_path / "a.png").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a.png"]


def test_a_lock_is_held_by_one_and_free_again(tmp_path: Path) -> None:
    taken = ValueError("somebody holds it")
    with (
        locked(tmp_path / "new" / "lock", taken),
        pytest.raises(ValueError, match="somebody"),
        locked(tmp_path / "new" / "lock", taken),
    ):
        pass
    with locked(tmp_path / "new" / "lock", taken):
        pass
