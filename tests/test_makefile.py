"""`make models` from its first line to its last, each training with what those before it made; and `make evidence`."""

from __future__ import annotations

import os
import re
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
from trimtab.benchmarks.evidence_taken import CONTROLLED, TAKEN

ROOT = Path(__file__).parents[1]
NOTE = """#!/bin/sh
printf '%s ' "$(basename "$0")" >> {log}
for word in "$@"; do printf "'%s' " "$word" >> {log}; done
echo >> {log}
"""
"""Writes down a command instead of running it."""


def run_by(target: str, tmp_path: Path, *options: str) -> list[list[str]]:
    """What make runs, in order."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("trimtab", "python", "npm"):
        (tools / name).write_text(NOTE.format(log=tmp_path / "log"))
        (tools / name).chmod(0o755)
    make = ["make", "--file", str(ROOT / "Makefile"), target, f"BIN={tools}", "INSTALLED=", "TESTABLE=", *options]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment.pop("MAKEFLAGS", None)
    subprocess.run(make, cwd=tmp_path, env=environment, check=True, capture_output=True)
    return [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_make_models_makes_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """On a few drawings, one step of two samples each."""
    monkeypatch.chdir(tmp_path)
    fetch, *others = run_by("models", tmp_path)
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


def test_make_evidence_measures_every_page_that_the_evidence_page_is_taken_from(tmp_path: Path) -> None:
    ran = run_by("evidence", tmp_path)
    for name in {one.source for one in (*TAKEN, *CONTROLLED)} | {"latents"}:
        said = re.search(r"Made by\n\n    (python -m .*)", (ROOT / "docs" / f"{name}.md").read_text())
        assert said is not None and shlex.split(said[1]) in ran, name
    models = [command for command in ran if command[2] == "benchmarks.evidence"]
    assert [command[-1] for command in models] == ["docs/evidence"] * 4 and "--page" in models[-1]
    assert ran[-1] == models[-1], "the page is written when all is measured"
    assert any(command[2] == "benchmarks.evidence_controls" for command in ran)


def test_make_evidence_measures_into_another_folder_what_is_there_already(tmp_path: Path) -> None:
    ran = run_by("evidence", tmp_path, "MEASURED=elsewhere")
    assert not [word for command in ran for word in command if word.startswith("docs")]
