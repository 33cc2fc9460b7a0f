"""The script for Slurm in the documentation, run as it stands; what starts its tasks is not Slurm."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from zoo.class_conditional import class_conditional

from trimtab import cli
from trimtab.pipelines.generate.manifest import FILE

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames 127.0.0.[1-2]" ] && echo 127.0.0.1 && echo 127.0.0.2
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    found = re.search(r"```bash\n(#!.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    file = tmp_path / "trimtab.sh"
    file.write_text(found[1])
    return file


def test_its_tasks_are_one_batch(script: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port),
        "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    }  # fmt: skip
    class_conditional(["Cat", "Sea lion"], side=16).save_pretrained(tmp_path / "model")
    making = [
        "generate",
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--class-balanced",
        "5",
    ]
    folders = tmp_path / "many", tmp_path / "alone"
    result = subprocess.run(
        ["bash", str(script), *making, "-o", str(folders[0])],
        check=True, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert cli.main([*making, "-o", str(folders[1])]) == 0
    together, alone = ({file.name: file.read_bytes() for file in folder.glob("*.png")} for folder in folders)
    assert together == alone and len(alone) == 5
    # Only the first task tells the files, in order: the two were one group, not two commands.
    rows = [json.loads(line) for line in (folders[0] / FILE).read_text().splitlines()]
    assert [Path(line).name for line in result.stdout.splitlines()] == [row["file"] for row in rows]
    assert [row["index"] for row in rows] == list(range(5))
