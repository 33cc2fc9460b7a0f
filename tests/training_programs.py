"""What the processes of the training tests run: whole runs, and runs that go on from their first checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from trimtab.parser import TRAININGS
from trimtab.training import TrainingSettings, processes
from trimtab.training import train as loop
from trimtab.training.log import read_log

SETTINGS: Mapping[str, Any] = {
    "steps": 2, "batch_size": 1, "accumulate": 2, "mixed_precision": "bf16", "warmup": 0, "checkpoint_every": 1,
    "learning_rate": 1e-2,
}  # fmt: skip


def resume(folder: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each training in all processes: two steps, and again the second from the checkpoint after the first.

    Args:
        folder: for their output.
        runs: settings by training, beside those of `SETTINGS`.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does
    seen = {}
    for what, settings in runs.items():
        whole, parts = (Path(folder) / f"{what}-{name}" for name in ("whole", "parts"))
        train(what, {**settings, "output": str(whole)})
        if PartialState().is_main_process:
            broken_off(whole, parts)
        PartialState().wait_for_everyone()
        train(what, {**settings, "output": str(parts)})
        seen[what] = {
            "losses": [losses(run) for run in (whole, parts)],
            "same": equal(weights(whole), weights(parts)),
            "processes": len(list(next(whole.rglob("checkpoint_0")).glob("random_states_*"))),
        }
    return seen


def run_out(folder: str, minutes: list[float]) -> list[int]:
    """The steps of a training for which each process has another time."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    output = str(Path(folder) / "toy")
    torch.manual_seed(0)
    model, data = nn.Linear(2, 1), TensorDataset(torch.randn(8, 2))
    settings = TrainingSettings(
        output=output, steps=2000, batch_size=2, warmup=0, checkpoint_every=2000,
        minutes=minutes[processes().process_index],
    )  # fmt: skip
    loop(
        "toy",
        model,
        data,
        lambda model, batch, generator: model(batch[0]).square().mean(),
        settings,
        lambda model: None,
    )
    processes().wait_for_everyone()
    return [int(row["step"]) for row in read_log(Path(output))][-1:]


def train(what: str, settings: Mapping[str, Any]) -> None:
    """As `trimtab train WHAT` with these options."""
    module, function = TRAININGS[what][1].split(":")
    run = getattr(importlib.import_module(f"trimtab.{module}"), function)
    run(typing.get_type_hints(run)["settings"](**{**SETTINGS, **settings}))


def broken_off(whole: Path, parts: Path) -> None:
    """A copy of a finished run as it was after its first step."""
    shutil.copytree(whole, parts)
    for last in list(parts.rglob("checkpoint_1")):
        shutil.rmtree(last)
    for file in weights(parts):
        (parts / file).unlink()
    for log in parts.rglob("log.jsonl"):
        log.write_text(log.read_text().splitlines(keepends=True)[0])


def losses(run: Path) -> list[float]:
    """Of all steps, of one model after the other where there are several."""
    logs = sorted(run.rglob("log.jsonl"))
    return [json.loads(row)["loss"] for log in logs for row in log.read_text().splitlines()]


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What was exported, by file."""
    files = [file for file in run.rglob("*.safetensors") if not {"checkpoints", "images"} & set(file.parts)]
    return {str(file.relative_to(run)): load_file(file) for file in files}


def equal(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether there are the same numbers in the same files, and any at all."""
    return one.keys() == other.keys() != set() and all(
        torch.equal(tensor, other[file][name]) for file, tensors in one.items() for name, tensor in tensors.items()
    )


def check(returned: list[dict[str, dict[str, Any]]]) -> None:
    """Two processes were one run of two steps, and the run that was broken off came to the same."""
    for what, seen in returned[0].items():
        whole, parts = seen["losses"]
        assert len(set(whole)) == len(whole) >= SETTINGS["steps"] and parts == whole, what
        assert seen["same"] and seen["processes"] == 2, what
