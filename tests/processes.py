"""Programs in several real processes that talk by gloo, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PIPELINES = (
    "dit.pipeline_dit", "flux.pipeline_flux", "stable_diffusion.pipeline_stable_diffusion", "wan.pipeline_wan",
    "stable_diffusion_3.pipeline_stable_diffusion_3", "z_image.pipeline_z_image",
    "stable_video_diffusion.pipeline_stable_video_diffusion",
)  # fmt: skip
PROCESSES = multiprocessing.get_context("forkserver")
# Imported once, in the process of which all others are forks.
PROCESSES.set_forkserver_preload(["trimtab.conformance.tiny", *(f"diffusers.pipelines.{name}" for name in PIPELINES)])


def start(count: int, program: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Processes 0 to `count - 1`, each in `program(*args)`, a function of a module beside this one."""
    folder.mkdir(exist_ok=True)
    running = [
        PROCESSES.Process(target=_in_group, args=(rank, count, program, str(folder), *args)) for rank in range(count)
    ]
    for process in running:
        process.start()
    return running


def finish(running: list[Any], folder: Path, seconds: float = 240.0) -> list[Any]:
    """What each process returned, or the text of its error; `None` of one that died, or had to be ended."""
    deadline = time.monotonic() + seconds
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.is_alive():
            process.kill()
            process.join()
    files = [folder / f"{rank}.pt" for rank in range(len(running))]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def together(count: int, program: Callable[..., Any], folder: Path, *args: Any, seconds: float = 60.0) -> list[Any]:
    """Run `program(*args)` in `count` processes, for so long at most; what each returned."""
    returned = finish(start(count, program, folder, *args), folder, seconds)
    for value in returned:
        assert value is not None, "a process has died, or had to be ended"
        assert not isinstance(value, str), value
    return returned


def _in_group(rank: int, count: int, program: Callable[..., Any], folder: str, *args: Any) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # Accelerate asks, also where the group is there already
    # Accelerate would set as many threads as the machine has cores, and another number rounds otherwise.
    where["OMP_NUM_THREADS"] = "1"
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        value: Any = program(*args)
    except Exception:
        value = traceback.format_exc()
    torch.save(value, Path(folder) / f"{rank}.partial")
    (Path(folder) / f"{rank}.partial").rename(Path(folder) / f"{rank}.pt")
