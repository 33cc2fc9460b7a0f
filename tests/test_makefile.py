"""`make models` from its first line to its last: each training finds what those before it made."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from npm_archives import write_archives
from zoo import picture

import trimtab
from trimtab import cli

ROOT = Path(__file__).parents[1]
NOTE = """#!/bin/sh
printf '%s ' "$(basename "$0")" >> {log}
for word in "$@"; do printf "'%s' " "$word" >> {log}; done
echo >> {log}
"""
"""Writes down a command instead of running it."""


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """What `make models` runs, in order."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("trimtab", "python", "npm"):
        (tools / name).write_text(NOTE.format(log=tmp_path / "log"))
        (tools / name).chmod(0o755)
    make = ["make", "--file", str(ROOT / "Makefile"), "models", f"BIN={tools}", "INSTALLED="]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment.pop("MAKEFLAGS", None)
    subprocess.run(make, cwd=tmp_path, env=environment, check=True, capture_output=True)
    return [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_make_models_makes_all_models(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """On a few drawings, one step of two samples each."""
    monkeypatch.chdir(tmp_path)
    fetch, *others = commands
    archives = write_archives(tmp_path / "runs" / "npm")
    assert fetch[:2] == ["npm", "pack"] and len(fetch) - 2 == len(list(archives.glob("*.tgz")))
    for program, *arguments in others:
        if program == "python":
            monkeypatch.setattr("sys.argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            AcceleratorState._reset_state(True)  # for `make` each is a process of its own
            assert cli.main([*arguments, "--steps", "1", "--batch-size", "2", "--accumulate", "1"]) == 0
    AcceleratorState._reset_state(True)
    flux = trimtab.GuidedPipeline.from_pretrained("runs/emoji-flux/model")
    flux.add_guidance(
        "easycontrol", weights="runs/emoji-easycontrol/easycontrol.safetensors", image=picture(64), cond_size=64
    )
    sd = trimtab.GuidedPipeline.from_pretrained("runs/emoji-sd/model")
    sd.add_guidance("joint", weights="runs/emoji-unicon/model", mode="joint")
    sd.add_guidance("smooth", weights="runs/emoji-smooth/smooth_lora.safetensors")
    sd.add_guidance("classifier", classifier="runs/emoji-judge-category-0/model", target=0)
    for pipe, more in ((flux, {"height": 64, "width": 64, "max_sequence_length": 32}), (sd, {})):
        assert pipe("red square", num_inference_steps=1, **more).images[0].size == (64, 64)
