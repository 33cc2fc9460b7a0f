"""What the processes of the branch parallel tests run; every process returns what it has seen."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from diffusers import FirstBlockCacheConfig
from torch import distributed
from zoo import CASES, run

import trimtab
from trimtab import Guidance, Step
from trimtab.pipelines.budget import Budget
from trimtab.pipelines.generate import batch
from trimtab.pipelines.generate.jobs import Job
from trimtab.pipelines.generate.options import guidances
from trimtab.pipelines.generate.request import Request
from trimtab.pipelines.generate.samples import load_pipeline
from trimtab.pipelines.parallel.lockstep import Lockstep, Moment
from trimtab.pipelines.rows import AmbiguousRowsError


@dataclass
class Bright(Guidance):
    """The mean of the image, differentiated through the denoiser."""

    differentiate: ClassVar[str] = "x_t"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return step.decode(x0).flatten(1).mean(1)


@dataclass(frozen=True)
class Setting:
    """A guided run: a case of the zoo, plug-ins, arguments of the call, and what is changed in the pipeline."""

    case: str
    plugins: dict[str, Any]
    call: dict[str, Any]
    change: Callable[[Any], None] = lambda pipe: None

    def pipe(self) -> Any:
        pipe = trimtab.guide(CASES[self.case].build())
        self.change(pipe)
        for name, parameters in self.plugins.items():
            if isinstance(parameters, Guidance):
                pipe.add_guidance(parameters)
            else:
                pipe.add_guidance(name.split()[0], name=name, **parameters)
        return pipe


def sequential(pipe: Any) -> None:
    pipe.guidance_rows = "sequential"


def batched(pipe: Any) -> None:
    pipe.guidance_rows = "batched"


def cached(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def smaller(seed: int) -> torch.nn.Module:
    """Another denoiser of the same kind, with other weights."""
    unet = CASES["sd15"].build().unet
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.0 - 0.1 * seed)
    return unet


PAG: dict[str, Any] = {"pag": {"scale": 2.0}}
SETTINGS: dict[str, Callable[[], Setting]] = {
    "rows of one call": lambda: Setting("sd15", PAG, {}),
    "rows of two images": lambda: Setting("sd15", PAG, {"num_images_per_prompt": 2}),
    "rows without a shared prefix": lambda: Setting("sd3", PAG, {}, batched),
    "seven branches": lambda: Setting(
        "sd15",
        {**PAG, "seg": {"scale": 2.0}, "slg": {"layers": ["mid_block"]}, "perp_neg": {"negative_prompt": "blue"}},
        {},
    ),
    "branches of a pipeline without CFG": lambda: Setting("flux", {**PAG, "cfg": {"scale": 3.0}}, {}),
    "two calls of a pipeline": lambda: Setting("wan", PAG, {}),
    "a learned variance": lambda: Setting("dit", PAG, {}),
    "the pipeline's own CFG alone": lambda: Setting("sd15", {}, {}),
    "calls of their own": lambda: Setting("sd15", {**PAG, "seg": {"scale": 2.0}}, {}, sequential),
    "other denoisers": lambda: Setting(
        "sd15", {"autoguidance 1": {"weak": smaller(1)}, "autoguidance 2": {"weak": smaller(2)}}, {}
    ),
    "another point": lambda: Setting("sd15", {"sag": {"scale": 1.0}}, {}),
    "a gradient through the denoiser": lambda: Setting(
        "sd15", {"bright": Bright(), **PAG, "seg": {"scale": 2.0}}, {}
    ),
    "frames of a video": lambda: Setting("svd", PAG, {}),
    "inputs in lists": lambda: Setting("z_image", {**PAG, "seg": {"scale": 2.0}}, {}),
    "a step cache": lambda: Setting("flux", PAG, {}, cached),
}  # fmt: skip


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest number expected."""
    return float((actual - expected).abs().max() / expected.abs().max())


def compare(*names: str) -> dict[str, dict[str, Any]]:
    """Each setting in this process alone, and shared with all others."""
    seen: dict[str, dict[str, Any]] = {}
    for name in names:
        setting = SETTINGS[name]()
        pipe, case = setting.pipe(), CASES[setting.case]
        alone = run(pipe, case, **setting.call)
        counted = vars(pipe.last_guided_run) if setting.plugins else None
        mesh = pipe.enable_branch_parallel()
        plan = pipe.explain_guidance(**{**case.call, **setting.call})
        shared = run(pipe, case, **setting.call)
        seen[name] = {
            "difference": difference(shared, alone), "output": shared, "measured": mesh.measured, "notes": plan.notes,
            "counted": counted in (None, vars(pipe.last_guided_run)), "plan": (plan.evaluations, plan.calls),
            "after": pipe.explain_guidance(**{**case.call, **setting.call}).notes, "rank": mesh.rank,
        }  # fmt: skip
        pipe.disable_branch_parallel()
        seen[name]["undone"] = torch.equal(run(pipe, case, **setting.call), alone)
    return seen


@contextmanager
def kept(errors: dict[str, str], name: str) -> Any:
    """Note the text and the kind of the error within."""
    try:
        yield
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"


def disturb() -> dict[str, Any]:
    """What happens when one of three processes is slow, fails, does something else, or ends."""
    pipe, case = SETTINGS["rows of one call"]().pipe(), CASES["sd15"]
    alone = run(pipe, case)
    mesh = pipe.enable_branch_parallel()
    seen: dict[str, Any] = {"rank": mesh.rank}
    errors: dict[str, str] = {}

    def at_second_step(does: Callable[[], None]) -> Any:
        def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index == 1 and mesh.rank == 1:
                does()
            return tensors

        return callback

    def fail() -> None:
        raise LookupError("no such file")

    seen["slow"] = difference(run(pipe, case, callback_on_step_end=at_second_step(lambda: time.sleep(0.5))), alone)
    seen["waited"] = mesh.measured.waiting
    with kept(errors, "failed"):
        run(pipe, case, callback_on_step_end=at_second_step(fail))
    with kept(errors, "other seed"):
        run(pipe, case, seed=mesh.rank)
    with kept(errors, "other prompt"):
        run(pipe, case, prompt="a red fox" if mesh.rank else "a blue fox")
    with kept(errors, "fewer steps"):
        run(pipe, case, num_inference_steps=2 if mesh.rank else 3)
    with kept(errors, "other guidance"), pipe.guidance("seg", start=0.0 if mesh.rank else 0.5):
        run(pipe, case)
    seen["after errors"] = difference(run(pipe, case), alone)

    rows: list[int] = []

    def full(module: Any, args: Any) -> None:
        rows.append(len(args[0]))
        if mesh.rank == 1 and len(rows) == 1:
            torch.empty(2**60, dtype=torch.uint8)

    whole = pipe.last_guided_run.forward_calls
    handle = pipe.unet.mid_block.register_forward_pre_hook(full)
    seen["out of memory"] = difference(run(pipe, case), alone)
    seen["further calls"] = pipe.last_guided_run.forward_calls - whole
    images = {"num_images_per_prompt": 2}
    rows.clear()
    seen["half the memory"], seen["rows"] = run(pipe, case, **images), rows
    handle.remove()

    began = time.monotonic()
    with kept(errors, "ended"):
        run(pipe, case, callback_on_step_end=at_second_step(lambda: os._exit(7)))
    seen["noticed"] = time.monotonic() - began
    with kept(errors, "ended before"):
        run(pipe, case)
    pipe.disable_branch_parallel()
    seen["alone"] = torch.equal(run(pipe, case), alone)
    seen["half the memory"] = difference(seen["half the memory"], run(pipe, case, **images))
    return {**seen, "errors": errors, "lost": mesh.lost}


def limits() -> list[tuple[str | None, int | None, bool]]:
    """What an agreement raises, and what the budget is then: where one process has another, or could not go on."""
    lockstep = Lockstep(2, timeout=20.0)
    seen = []
    failures = (None, AmbiguousRowsError("a list"), RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    for failure in failures:
        budget, raised = Budget(rows=4, splits=False) if lockstep.rank else Budget(), None
        try:
            lockstep.agree(Moment.WHOLE_CALL, (), failure if lockstep.rank else None, budget)
        except (AmbiguousRowsError, RuntimeError) as error:
            raised = type(error).__name__
        seen.append((raised, budget.rows, budget.splits))
    return seen


def hang() -> dict[str, Any]:
    """One process does not come back; the other waits for no longer than its limit."""
    pipe, case = SETTINGS["rows of one call"]().pipe(), CASES["sd15"]
    mesh = pipe.enable_branch_parallel(timeout=1.0)
    errors: dict[str, str] = {}
    began = time.monotonic()
    if mesh.rank == 0:
        with kept(errors, "hung"):
            run(pipe, case)
    else:
        time.sleep(4.0)
    return {"errors": errors, "noticed": time.monotonic() - began}


def interrupt() -> dict[str, Any]:
    """One process is interrupted; the other learns of it at once."""
    pipe, case = SETTINGS["rows of one call"]().pipe(), CASES["sd15"]
    mesh = pipe.enable_branch_parallel(timeout=20.0)
    errors: dict[str, str] = {}

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if mesh.rank == 1:
            raise KeyboardInterrupt
        return tensors

    began = time.monotonic()
    with kept(errors, "interrupted"), suppress(KeyboardInterrupt):
        run(pipe, case, callback_on_step_end=stop)
    return {"errors": errors, "noticed": time.monotonic() - began, "lost": mesh.lost, "_": time.sleep(2.0)}


def elsewhere() -> list[list[float]]:
    """Numbers in host memory, in a group whose predictions travel between devices that are not there."""
    distributed.destroy_process_group()
    distributed.Backend.register_backend("elsewhere", distributed.ProcessGroupGloo, devices=["meta"])
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("elsewhere", init_method=f"file://{folder}/store", rank=0, world_size=1)
        return Lockstep(1, timeout=5.0).gather(torch.tensor([1.0, 2.0])).tolist()


def make(model: str, folder: str, count: int, sharing: int) -> list[str]:
    """A batch of images, as `trimtab generate --processes 4 --branch-parallel N` makes it."""
    request = Request(model=model, device="cpu", steps=2)
    job = Job([request], [0], guidances(["cfg:scale=2", "pag:scale=2"]))
    return [path.name for path in batch.run_batch(job, Path(folder), None, count, sharing)]


def load(model: str) -> bool:
    """Whether a process knows which device is its own once its pipeline is on one."""
    load_pipeline(Request(model=model, device="cpu"))
    return bool(PartialState._shared_state)


def refuse() -> list[str]:
    """Numbers of processes that are none."""
    pipe = trimtab.guide(CASES["sd15"].build())
    errors: dict[str, str] = {}
    for number, given in enumerate(({"processes": 3}, {"processes": 0}, {"processes": True}, {"timeout": 0})):
        with kept(errors, str(number)):
            pipe.enable_branch_parallel(**given)
    return list(errors.values())
